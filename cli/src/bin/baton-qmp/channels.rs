//! The channels of `migrate` and `migrate-incoming`: what is wrong with them, in QEMU's words, and where they lead.

use baton_ipc::Address;
use baton_ipc::FileAddress;
use baton_ipc::InetOptions;
use serde_json::Value;

use crate::failure::Failure;
use crate::schema::Object;

/// Where a `migrate-incoming` leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Socket(Address),
    File(FileAddress),
}

/// Both channels of a `migrate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Both {
    pub(crate) main: Address,
    pub(crate) cpr: Address,
}

/// The entries of one type.
fn of_type<'a>(channels: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    channels
        .iter()
        .filter(move |channel| channel.get("channel-type").and_then(Value::as_str) == Some(kind))
}

/// Checks how many entries of each type a list has.
pub(crate) fn count(channels: &[Value]) -> Result<(), Failure> {
    for kind in ["main", "cpr"] {
        if of_type(channels, kind).count() > 1 {
            return Err(Failure::generic(format_args!(
                "Channel list has more than one {kind} entry"
            )));
        }
    }
    if of_type(channels, "main").next().is_none() {
        return Err(Failure::generic("Channel list has no main entry"));
    }
    Ok(())
}

/// Whether there is a cpr entry.
pub(crate) fn has_cpr(channels: &[Value]) -> bool {
    of_type(channels, "cpr").next().is_some()
}

/// Where the channels of a counted list lead.
pub(crate) fn both(channels: &[Value]) -> Result<Both, Failure> {
    let addr = |kind: &'static str| {
        of_type(channels, kind)
            .next()
            .and_then(|one| one.get("addr"))
    };
    let (Some(main), Some(cpr)) = (addr("main"), addr("cpr")) else {
        return Err(Failure::generic("missing 'cpr' migration channel"));
    };
    let main = main_address(main)?;
    let cpr =
        unix(cpr).ok_or_else(|| Failure::generic("bad cpr channel address; must be unix"))??;
    Ok(Both { main, cpr })
}

fn main_address(addr: &Value) -> Result<Address, Failure> {
    if addr.get("transport").and_then(Value::as_str) == Some("file") {
        return Err(Failure::generic(
            "Migration requires streamable transport (eg unix)",
        ));
    }
    unix(addr).or_else(|| inet(addr)).unwrap_or_else(|| {
        Err(Failure::generic(
            "bad main channel address; this VMM takes a unix or an inet socket",
        ))
    })
}

/// The address of a Unix socket; `None` for anything else.
fn unix(addr: &Value) -> Option<Result<Address, Failure>> {
    let text = |key: &str| addr.get(key).and_then(Value::as_str);
    match (text("transport"), text("type"), text("path")) {
        (Some("socket"), Some("unix"), Some(path)) => {
            Some(Address::unix(path).map_err(Failure::generic))
        }
        _ => None,
    }
}

/// The address of a TCP port; `None` for anything else.
fn inet(addr: &Value) -> Option<Result<Address, Failure>> {
    let text = |key: &str| addr.get(key).and_then(Value::as_str);
    match (text("transport"), text("type"), text("host"), text("port")) {
        (Some("socket"), Some("inet"), Some(host), Some(port)) => {
            let flag = |key: &str| addr.get(key).and_then(Value::as_bool);
            let options = InetOptions {
                to: addr.get("to").is_some(),
                ipv4: flag("ipv4"),
                ipv6: flag("ipv6"),
                keep_alive: flag("keep-alive") == Some(true),
                mptcp: flag("mptcp") == Some(true),
            };
            Some(options.tcp(host, port).map_err(Failure::generic))
        }
        _ => None,
    }
}

/// The file of a `migrate` in mode `cpr-reboot`.
pub(crate) fn file(arguments: &Object) -> Result<FileAddress, Failure> {
    let channels = arguments.get("channels").and_then(Value::as_array);
    let uri = arguments.get("uri").and_then(Value::as_str);
    let addr = channels.map(|channels| of_type(channels, "main").next());
    let addr = addr.flatten().and_then(|main| main.get("addr"));
    if channels.is_some_and(|channels| has_cpr(channels)) {
        return Err(Failure::generic("mode 'cpr-reboot' has no cpr channel"));
    }
    match (uri.and_then(|uri| uri.strip_prefix("file:")), addr) {
        (Some(place), _) => place.parse().map_err(Failure::generic),
        (None, Some(addr)) if is_file(addr) => file_address(addr),
        _ => Err(Failure::generic(
            "mode 'cpr-reboot' takes a file here: file:PATH[,offset=BYTES]",
        )),
    }
}

fn is_file(addr: &Value) -> bool {
    addr.get("transport").and_then(Value::as_str) == Some("file")
}

fn file_address(addr: &Value) -> Result<FileAddress, Failure> {
    let path = addr.get("filename").and_then(Value::as_str);
    let offset = addr.get("offset").and_then(Value::as_i64).unwrap_or(0);
    let offset = u64::try_from(offset)
        .map_err(|_| Failure::generic(format_args!("{offset} is no offset into a file")))?;
    FileAddress::new(path.unwrap_or_default(), offset).map_err(Failure::generic)
}

/// Where `migrate-incoming` is to listen, or what it is to read.
pub(crate) fn incoming(arguments: &Object) -> Result<Place, Failure> {
    let channels = arguments.get("channels").and_then(Value::as_array);
    match (arguments.get("uri").and_then(Value::as_str), channels) {
        (Some(uri), None) => match uri.split_once(':') {
            Some(("unix", path)) => {
                let address = Address::unix(path).map_err(Failure::generic)?;
                Ok(Place::Socket(address))
            }
            Some(("tcp", _)) => uri.parse().map(Place::Socket).map_err(Failure::generic),
            Some(("file", place)) => place.parse().map(Place::File).map_err(Failure::generic),
            Some((protocol @ ("vsock" | "fd" | "exec" | "rdma"), _)) => {
                Err(Failure::generic(format_args!(
                    "'{protocol}' is not supported by this VMM; use a unix or an inet socket"
                )))
            }
            _ => Err(Failure::generic(format_args!(
                "unknown migration protocol: {uri}"
            ))),
        },
        (None, Some(channels)) => match channels.as_slice() {
            [channel] if channel.get("channel-type").and_then(Value::as_str) == Some("main") => {
                let addr = channel.get("addr").unwrap_or(&Value::Null);
                if is_file(addr) {
                    return file_address(addr).map(Place::File);
                }
                main_address(addr).map(Place::Socket)
            }
            _ => Err(Failure::generic(
                "Channel list must have only one entry, for type 'main'",
            )),
        },
        _ => Err(Failure::generic("need either 'uri' or 'channels' argument")),
    }
}
