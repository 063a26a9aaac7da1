//! Where a broker is to wait for a guest, in the words of QEMU's `-incoming`: an address, `defer`, a channel as JSON, or a
//! channel as dotted keys. The last one of each kind of channel wins, as in QEMU.

use std::path::Path;

use baton_ipc::Address;
use baton_ipc::FileAddress;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

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

fn channel(text: &str) -> Result<(Kind, Place), String> {
    if text == "defer" {
        return Ok((Kind::Main, Place::Defer));
    }
    let first = text.split([',', '=']).next().unwrap_or_default();
    if text.starts_with('{') {
        let value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        return of_json(&value);
    }
    if matches!(first, "main" | "cpr" | "channel-type") {
        return of_json(&dotted(text)?);
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

/// `main,addr.transport=socket,…`: keys with dots, the first of them `channel-type` also without its name.
fn dotted(text: &str) -> Result<Value, String> {
    let mut channel = json!({"addr": {}});
    for (index, pair) in text.split(',').enumerate() {
        let (key, value) = match pair.split_once('=') {
            Some(pair) => pair,
            None if index == 0 => ("channel-type", pair),
            None => return Err(format!("Expected '=' after parameter '{pair}'")),
        };
        let (object, key) = match key.strip_prefix("addr.") {
            Some(key) => (channel.get_mut("addr"), key),
            None => (Some(&mut channel), key),
        };
        if key.contains('.') {
            return Err(format!("Parameter '{key}' is unexpected"));
        }
        if let Some(object) = object.and_then(Value::as_object_mut) {
            object.insert(key.to_owned(), json!(value));
        }
    }
    Ok(channel)
}

fn of_json(channel: &Value) -> Result<(Kind, Place), String> {
    let text = |value: &Value, key: &str| {
        let found = value.get(key).and_then(Value::as_str);
        found
            .map(str::to_owned)
            .ok_or_else(|| format!("Parameter '{key}' is missing"))
    };
    let kind = match text(channel, "channel-type")?.as_str() {
        "main" => Kind::Main,
        "cpr" => Kind::Cpr,
        other => {
            return Err(format!(
                "Parameter 'channel-type' does not accept value '{other}'"
            ));
        }
    };
    let addr = channel.get("addr").ok_or("Parameter 'addr' is missing")?;
    let transport = text(addr, "transport")?;
    let bad = match kind {
        Kind::Cpr => "bad cpr channel socket type; must be unix or fd".to_owned(),
        Kind::Main => {
            format!("'{transport}' is not supported by this VMM; use a unix or an inet socket")
        }
    };
    if (kind, transport.as_str()) == (Kind::Main, "file") {
        let offset = match addr.get("offset") {
            None => Ok(0),
            Some(Value::String(text)) => text.parse().map_err(|_| ()),
            Some(number) => number.as_u64().ok_or(()),
        };
        let offset =
            offset.map_err(|()| "Invalid parameter type for 'offset', expected: integer")?;
        return Ok((kind, Place::File(file(&text(addr, "filename")?, offset)?)));
    }
    if transport != "socket" {
        return Err(bad);
    }
    let address = match text(addr, "type")?.as_str() {
        "unix" => unix(&text(addr, "path")?)?,
        "inet" if kind == Kind::Main => {
            Address::tcp(&text(addr, "host")?, &text(addr, "port")?).map_err(|e| e.to_string())?
        }
        "fd" => format!("fd:{}", text(addr, "str")?)
            .parse()
            .map_err(|e: baton_ipc::AddressError| e.to_string())?,
        _ => return Err(bad),
    };
    Ok((kind, Place::Socket(address)))
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
            (&["/run/m"], "unknown migration protocol"),
            (
                &["cpr,addr.transport=socket,addr.type=inet,addr.host=h,addr.port=1"],
                "bad cpr channel socket type; must be unix",
            ),
            (&["cpr"], "'transport' is missing"),
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
