//! Where a broker is to wait for a guest, in the words of QEMU's `-incoming`: an address, `defer`, a channel as JSON, or a
//! channel as dotted keys. The last one of each kind of channel wins, as in QEMU.

mod members;

use std::path::Path;

use baton_ipc::Address;
use baton_ipc::FileAddress;
use baton_ipc::InetOptions;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;

use self::members::Members;
use crate::failure::failure;

/// Where a guest comes from. `None` waits for `migrate-incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// Another broker, by both channels.
    Broker { cpr: Address, main: Option<Address> },
    /// A state file.
    File(Option<FileAddress>),
}

/// What one `--incoming` says.
enum Place {
    Defer,
    Socket(Address),
    File(FileAddress),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Main,
    Cpr,
}

impl Incoming {
    /// Both channels of all `--incoming`; none when there is none.
    pub(crate) fn parse(texts: &[String]) -> Result<Option<Self>, Refusal> {
        let (mut cpr, mut main) = (None, None);
        for text in texts {
            match channel(text).map_err(|reason| usage(&format!("--incoming {text}: {reason}")))? {
                (Kind::Cpr, place) => cpr = Some(place),
                (Kind::Main, place) => main = Some(place),
            }
        }
        match (cpr, main) {
            (Some(Place::Socket(cpr)), Some(Place::Socket(main))) => Ok(Some(Self::Broker {
                cpr,
                main: Some(main),
            })),
            (Some(Place::Socket(cpr)), None | Some(Place::Defer)) => {
                Ok(Some(Self::Broker { cpr, main: None }))
            }
            (Some(_), _) => Err(usage("Migration requires streamable transport (eg unix)")),
            (None, None) => Ok(None),
            (None, Some(Place::File(file))) => Ok(Some(Self::File(Some(file)))),
            (None, Some(Place::Defer)) => Ok(Some(Self::File(None))),
            (None, Some(Place::Socket(_))) => Err(usage(
                "a guest comes with its descriptors only: --incoming for a cpr channel is missing",
            )),
        }
    }
}

fn usage(reason: &str) -> Refusal {
    failure(
        Exit::Usage,
        reason,
        "as in: --incoming unix:/run/web1.main --incoming cpr,addr.transport=socket,addr.type=unix,addr.path=/run/web1.cpr",
    )
}

/// Whether it begins with a protocol, as QEMU decides it (`migration/migration.c`, `migrate_is_uri`).
fn is_uri(text: &str) -> bool {
    let rest = text.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == '-');
    rest.starts_with(':')
}

fn channel(text: &str) -> Result<(Kind, Place), String> {
    if text == "defer" {
        return Ok((Kind::Main, Place::Defer));
    }
    if text.starts_with('{') {
        return of_members(Members::of_json(text)?);
    }
    if !is_uri(text) {
        return of_members(Members::of_keys(text)?);
    }
    match text.split_once(':') {
        Some(("unix", path)) => Ok((Kind::Main, Place::Socket(unix(path)?))),
        Some(("file", place)) => {
            // Absolute before it is parsed, which only an absolute one can be.
            let place = std::path::absolute(place).map_err(|e| e.to_string())?;
            let place = place.to_str().ok_or("the path is no text")?.parse();
            let place = place.map_err(|e: baton_ipc::AddressError| e.to_string())?;
            Ok((Kind::Main, Place::File(place)))
        }
        Some(("fd" | "tcp", _)) => text
            .parse()
            .map(|address| (Kind::Main, Place::Socket(address)))
            .map_err(|e: baton_ipc::AddressError| e.to_string()),
        Some((protocol @ ("vsock" | "exec" | "rdma"), _)) => {
            Err(format!("'{protocol}' is not supported by this VMM"))
        }
        _ => Err(format!("unknown migration protocol: {text}")),
    }
}

fn of_members(mut channel: Members) -> Result<(Kind, Place), String> {
    let kind = match channel.text("channel-type")?.as_str() {
        "main" => Kind::Main,
        "cpr" => Kind::Cpr,
        other => {
            return Err(format!(
                "Parameter 'channel-type' does not accept value '{other}'"
            ));
        }
    };
    let mut addr = channel.object("addr")?;
    let place = place(kind, &mut addr)?;
    addr.end()?;
    channel.end()?;
    Ok((kind, place))
}

fn place(kind: Kind, addr: &mut Members) -> Result<Place, String> {
    let transport = addr.text("transport")?;
    if (kind, transport.as_str()) == (Kind::Main, "file") {
        let offset = addr.integer("offset")?.unwrap_or(0);
        return Ok(Place::File(file(&addr.text("filename")?, offset)?));
    }
    let bad = match kind {
        Kind::Cpr => "bad cpr channel socket type; must be unix or fd".to_owned(),
        Kind::Main => {
            format!("'{transport}' is not supported by this VMM; use a unix or an inet socket")
        }
    };
    if transport != "socket" {
        return Err(bad);
    }
    let address = match addr.text("type")?.as_str() {
        "unix" => unix(&addr.text("path")?)?,
        "inet" if kind == Kind::Main => inet(addr)?,
        "fd" => format!("fd:{}", addr.text("str")?)
            .parse()
            .map_err(|e: baton_ipc::AddressError| e.to_string())?,
        _ => return Err(bad),
    };
    Ok(Place::Socket(address))
}

fn inet(addr: &mut Members) -> Result<Address, String> {
    let (host, port) = (addr.text("host")?, addr.text("port")?);
    // Whatever it says, no name is looked up.
    addr.flag("numeric")?;
    let options = InetOptions {
        to: addr.integer("to")?.is_some(),
        ipv4: addr.flag("ipv4")?,
        ipv6: addr.flag("ipv6")?,
        keep_alive: addr.flag("keep-alive")? == Some(true),
        mptcp: addr.flag("mptcp")? == Some(true),
    };
    options.tcp(&host, &port).map_err(|e| e.to_string())
}

/// A state file by a path that means the same to the broker.
fn file(path: &str, offset: u64) -> Result<FileAddress, String> {
    if path.is_empty() {
        return Err("the path is empty".to_owned());
    }
    let path = std::path::absolute(Path::new(path)).map_err(|e| e.to_string())?;
    let path = path.to_str().ok_or("the path is no text")?;
    FileAddress::new(path, offset).map_err(|e| e.to_string())
}

/// An address that means the same to the broker.
fn unix(path: &str) -> Result<Address, String> {
    if path.is_empty() {
        return Err("the path is empty".to_owned());
    }
    let path = std::path::absolute(Path::new(path)).map_err(|e| e.to_string())?;
    let path = path.to_str().ok_or("the path is no text")?;
    Address::unix(path).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Result<Option<Incoming>, Refusal> {
        let texts: Vec<_> = texts.iter().map(ToString::to_string).collect();
        Incoming::parse(&texts)
    }

    const DOTTED: &str = "cpr,addr.transport=socket,addr.type=unix,addr.path=/run/c";
    const JSON: &str =
        r#"{"channel-type":"cpr","addr":{"transport":"socket","type":"unix","path":"/run/c"}}"#;

    #[test]
    fn qemus_forms_mean_the_same() {
        let expected = Incoming::Broker {
            cpr: Address::Unix("/run/c".into()),
            main: Some(Address::Unix("/run/m".into())),
        };
        for cpr in [DOTTED, JSON] {
            for main in [
                "unix:/run/m",
                "main,addr.transport=socket,addr.type=unix,addr.path=/run/m",
                r#"{"channel-type":"main","addr":{"transport":"socket","type":"unix","path":"/run/m"}}"#,
            ] {
                assert_eq!(parse(&[main, cpr]).unwrap().unwrap(), expected);
                assert_eq!(parse(&[cpr, "unix:/x", main]).unwrap().unwrap(), expected);
            }
        }
        let deferred = Incoming::Broker {
            cpr: Address::Unix("/run/c".into()),
            main: None,
        };
        assert_eq!(parse(&["defer", DOTTED]).unwrap().unwrap(), deferred);
        assert_eq!(parse(&[DOTTED]).unwrap().unwrap(), deferred);
        let reversed = "addr.path=/run/c,addr.type=unix,addr.transport=socket,channel-type=cpr";
        assert_eq!(parse(&[reversed]).unwrap().unwrap(), deferred);
        let comma = "cpr,addr.transport=socket,addr.type=unix,addr.path=/run/a,,b";
        let commas = Incoming::Broker {
            cpr: Address::Unix("/run/a,b".into()),
            main: None,
        };
        assert_eq!(parse(&[comma]).unwrap().unwrap(), commas);
        let fd = "cpr,addr.transport=socket,addr.type=fd,addr.str=5";
        let inherited = Incoming::Broker {
            cpr: Address::Fd(5),
            main: None,
        };
        assert_eq!(parse(&[fd]).unwrap().unwrap(), inherited);
        assert_eq!(parse(&[]).unwrap(), None);
    }

    #[test]
    fn the_main_channel_may_be_a_tcp_port_in_each_of_them() {
        let expected = Incoming::Broker {
            cpr: Address::Unix("/run/c".into()),
            main: Some("tcp:127.0.0.1:4444".parse().unwrap()),
        };
        for main in [
            "tcp:localhost:4444",
            "tcp:127.0.0.1:4444",
            "main,addr.transport=socket,addr.type=inet,addr.host=localhost,addr.port=4444",
            "main,addr.transport=socket,addr.type=inet,addr.host=localhost,addr.port=4444,addr.ipv4=on,addr.numeric=no,addr.mptcp=off",
            r#"{"channel-type":"main","addr":{"transport":"socket","type":"inet","host":"127.0.0.1","port":"4444"}}"#,
        ] {
            assert_eq!(parse(&[main, DOTTED]).unwrap().unwrap(), expected);
        }
    }

    #[test]
    fn a_guest_comes_out_of_a_file_in_qemus_forms() {
        let place = |offset| Incoming::File(Some(FileAddress::new("/var/s", offset).unwrap()));
        for (text, expected) in [
            ("defer", Incoming::File(None)),
            ("file:/var/s", place(0)),
            ("file:/var/s,offset=0x1000", place(4096)),
            (
                "main,addr.transport=file,addr.filename=/var/s,addr.offset=7",
                place(7),
            ),
            (
                r#"{"channel-type":"main","addr":{"transport":"file","filename":"/var/s","offset":9}}"#,
                place(9),
            ),
        ] {
            assert_eq!(parse(&[text]).unwrap().unwrap(), expected, "{text}");
        }
        let both = parse(&["file:/var/s", DOTTED]).unwrap_err();
        assert!(both.reason.contains("streamable transport"), "{both}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (texts, words) in [
            (&["unix:/run/m"][..], "cpr channel is missing"),
            (&["tcp:localhost:0"], "port 0"),
            (&["tcp:example.org:1"], "no name is looked up"),
            (&["rdma:h:1"], "'rdma' is not supported"),
            (&["fly:m"], "unknown migration protocol"),
            (&["/run/m"], "does not accept value '/run/m'"),
            (
                &["cpr,addr.transport=socket,addr.type=inet,addr.host=h,addr.port=1"],
                "bad cpr channel socket type; must be unix",
            ),
            (&["cpr"], "'addr' is missing"),
            (
                &["cpr,addr.transport=socket,addr.type=unix,addr.path=/c,x=1"],
                "Parameter 'x' is unexpected",
            ),
            (
                &["cpr,addr.transport=socket,addr.type=unix,addr.path=/c,addr.host=h"],
                "Parameter 'addr.host' is unexpected",
            ),
            (
                &[
                    r#"{"channel-type":"cpr","y":2,"addr":{"transport":"socket","type":"unix","path":"/c"}}"#,
                ],
                "Parameter 'y' is unexpected",
            ),
            (
                &[
                    r#"{"channel-type":"cpr","addr":{"transport":"socket","type":"unix","path":"/c","x":1}}"#,
                ],
                "Parameter 'addr.x' is unexpected",
            ),
            (
                &["main,addr.transport=socket,addr.type=inet,addr.host=::1,addr.port=1,addr.to=4"],
                "'to' is not supported",
            ),
            (
                &[
                    "main,addr.transport=socket,addr.type=inet,addr.host=::1,addr.port=1,addr.ipv6=off",
                ],
                "::1 is no IPv4 address",
            ),
            (
                &["main,addr.transport=file,addr.filename=/f,addr.offset=x"],
                "Parameter 'addr.offset' expects an integer",
            ),
            (&["{"], "EOF"),
            (
                &["channel-type=x,addr.transport=socket"],
                "does not accept value 'x'",
            ),
        ] {
            let refusal = parse(texts).unwrap_err();
            assert!(refusal.reason.contains(words), "{refusal}");
        }
    }
}
