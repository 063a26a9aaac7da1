//! Who asked for something: a user, a process, and the systemd unit that the process belongs to.

use std::fs;

use serde_json::Value;
use serde_json::json;

/// The most of /proc/PID/cgroup that is read, in bytes: a line a hierarchy, a path at most PATH_MAX long.
const MAX_CGROUP: usize = 64 << 10;

/// Suffixes of unit names that hold processes (systemd.unit(5)).
const UNITS: [&str; 2] = [".service", ".scope"];

/// Who asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// The user, as the kernel says (SO_PEERCRED, unix(7)).
    pub uid: u32,
    /// The process, likewise.
    pub pid: i32,
    /// The systemd unit of that process, from its cgroup; `None` where there is none, or the process was gone.
    pub unit: Option<String>,
}

impl Actor {
    /// The actor of OCSF 1.5.0 (object `actor`): the unit is its `app_name`.
    #[must_use]
    pub fn document(&self) -> Value {
        let mut actor =
            json!({"user": {"uid": self.uid.to_string()}, "process": {"pid": self.pid}});
        if let (Some(unit), Some(actor)) = (&self.unit, actor.as_object_mut()) {
            actor.insert("app_name".to_owned(), json!(unit));
        }
        actor
    }
}

/// The systemd unit that a process belongs to. The caller has to hold the process (a pidfd) for the answer to be about it.
#[must_use]
pub fn unit_of(pid: i32) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/cgroup")).ok()?;
    let text = text.get(..text.len().min(MAX_CGROUP))?;
    unit_in(&String::from_utf8_lossy(text))
}

/// The unit in the text of /proc/PID/cgroup (cgroups(7)): the innermost part of the path in the unified hierarchy, or in
/// systemd's own of version 1, that is named like a unit.
fn unit_in(text: &str) -> Option<String> {
    let path = |prefix: &str| {
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            rest.strip_prefix(prefix)
        })
    };
    let path = path("name=systemd:").or_else(|| path(":"))?;
    let unit = path
        .split('/')
        .rfind(|part| UNITS.iter().any(|suffix| part.ends_with(suffix)))?;
    Some(crate::quoted(unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_the_innermost_one_of_either_version() {
        let of = |text| unit_in(text).unwrap_or_default();
        assert_eq!(of("0::/system.slice/nightly.service\n"), "nightly.service");
        assert_eq!(
            of("0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope/sub\n"),
            "x.scope"
        );
        assert_eq!(
            of("4:pids:/system.slice/a.service\n1:name=systemd:/system.slice/b.service\n0::/\n"),
            "b.service"
        );
        assert_eq!(of("0::/\n"), "");
        assert_eq!(of("no cgroup file\n"), "");
    }

    #[test]
    fn a_hostile_name_is_text() {
        let unit = unit_in("0::/a\u{1b}[2Jb.service").unwrap();
        assert!(!unit.contains('\u{1b}'), "{unit}");
    }
}
