//! Where a broker is to wait for a guest, in the words of QEMU's `-incoming`: an address, `defer`, a channel as JSON, or a
//! channel as dotted keys. The last one of each kind of channel wins, as in QEMU.

use std::path::Path;

use baton_ipc::Address;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

use crate::failure::failure;

/// Both channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Incoming {
    pub(crate) cpr: Address,
    /// `None` waits for `migrate-incoming`.
    pub(crate) main: Option<Address>,
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
                (Kind::Cpr, address) => cpr = address,
                (Kind::Main, address) => main = address,
            }
        }
        match cpr {
            Some(cpr) => Ok(Some(Self { cpr, main })),
            None if texts.is_empty() => Ok(None),
            None => Err(usage(
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

fn channel(text: &str) -> Result<(Kind, Option<Address>), String> {
    if text == "defer" {
        return Ok((Kind::Main, None));
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
        Some(("unix", path)) => Ok((Kind::Main, Some(unix(path)?))),
        Some(("fd", _)) => text
            .parse()
            .map(|address| (Kind::Main, Some(address)))
            .map_err(|e: baton_ipc::AddressError| e.to_string()),
        Some((protocol @ ("tcp" | "vsock" | "exec" | "rdma" | "file"), _)) => {
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

fn of_json(channel: &Value) -> Result<(Kind, Option<Address>), String> {
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
        Kind::Main => format!("'{transport}' is not supported by this VMM; use a unix socket"),
    };
    if transport != "socket" {
        return Err(bad);
    }
    let address = match text(addr, "type")?.as_str() {
        "unix" => unix(&text(addr, "path")?)?,
        "fd" => format!("fd:{}", text(addr, "str")?)
            .parse()
            .map_err(|e: baton_ipc::AddressError| e.to_string())?,
        _ => return Err(bad),
    };
    Ok((kind, Some(address)))
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
        let expected = Incoming {
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
        assert_eq!(parse(&["defer", DOTTED]).unwrap().unwrap().main, None);
        assert_eq!(parse(&[DOTTED]).unwrap().unwrap().main, None);
        let fd = "cpr,addr.transport=socket,addr.type=fd,addr.str=5";
        assert_eq!(parse(&[fd]).unwrap().unwrap().cpr, Address::Fd(5));
        assert_eq!(parse(&[]).unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (texts, words) in [
            (&["unix:/run/m"][..], "cpr channel is missing"),
            (&["tcp:localhost:0"], "'tcp' is not supported"),
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
