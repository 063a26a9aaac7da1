//! `[[vhost_user]]` of the VM file.

use std::path::PathBuf;

use baton_ipc::worker::VhostUserKind;
use serde::Deserialize;

use super::disk::Label;
use super::disk::Queues;

/// The most such devices of a VM: with as many disks and network interfaces as it may have, there are slots for these.
pub(crate) const MAX_VHOST_USERS: usize = 4;
/// Bytes of a file system's tag (virtio 1.2, 5.11.4).
pub(crate) const MAX_TAG: usize = 36;

/// One device that another process implements.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VhostUser {
    /// Its name, of no other such device.
    pub(crate) id: Label,
    /// What it is to the guest.
    pub(crate) kind: VhostUserKind,
    /// Where that process listens.
    pub(crate) socket: PathBuf,
    /// How many queues; of a file system, for requests.
    #[serde(default)]
    pub(crate) queues: Queues,
    /// What the guest mounts a file system by; without it, the id.
    pub(crate) tag: Option<Tag>,
    /// The user that the process has to run as; without it, root or the broker's own.
    pub(crate) user: Option<u32>,
}

impl VhostUser {
    /// All of its virtqueues: a file system has one more, for what may not wait behind requests (virtio 1.2, 5.11.2).
    pub(crate) fn virtqueues(&self) -> u8 {
        match self.kind {
            VhostUserKind::Blk => self.queues.0,
            VhostUserKind::Fs => self.queues.0 + 1,
        }
    }

    /// What the guest mounts it by.
    pub(crate) fn tag(&self) -> &str {
        self.tag.as_ref().map_or(&self.id.0, |tag| &tag.0)
    }
}

/// A file system's tag.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Tag(String);

impl TryFrom<String> for Tag {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let plain = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if plain && (1..=MAX_TAG).contains(&text.len()) {
            Ok(Self(text))
        } else {
            Err(format!(
                "{text:?} is no tag: 1 to {MAX_TAG} of A-Z a-z 0-9 . _ -"
            ))
        }
    }
}

/// The devices of a VM, checked together.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "Vec<VhostUser>")]
pub(crate) struct VhostUsers(pub(crate) Vec<VhostUser>);

impl TryFrom<Vec<VhostUser>> for VhostUsers {
    type Error = String;

    fn try_from(devices: Vec<VhostUser>) -> Result<Self, String> {
        if devices.len() > MAX_VHOST_USERS {
            return Err(format!(
                "{} vhost_user devices; a VM has at most {MAX_VHOST_USERS}",
                devices.len()
            ));
        }
        for (index, device) in devices.iter().enumerate() {
            let before = devices.iter().take(index);
            if before.clone().any(|other| other.id == device.id) {
                return Err(format!(
                    "two vhost_user devices have the id {:?}",
                    device.id.0
                ));
            }
            if device.kind != VhostUserKind::Fs {
                if device.tag.is_some() {
                    return Err(format!(
                        "vhost_user {:?} has a tag, and is no file system",
                        device.id.0
                    ));
                }
                continue;
            }
            let mut others = before.filter(|other| other.kind == VhostUserKind::Fs);
            if others.any(|other| other.tag() == device.tag()) {
                return Err(format!("two file systems have the tag {:?}", device.tag()));
            }
        }
        Ok(Self(devices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        vhost_user: VhostUsers,
    }

    fn parse(tables: &[&str]) -> Result<Vec<VhostUser>, String> {
        let text: String = tables
            .iter()
            .map(|table| format!("[[vhost_user]]\nsocket = \"s\"\n{table}\n"))
            .collect();
        let file: Result<File, _> = toml::from_str(&text);
        file.map(|file| file.vhost_user.0)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_system_has_a_queue_more_and_a_tag() {
        let devices = parse(&[
            "id = \"disk\"\nkind = \"blk\"\nqueues = 2",
            "id = \"share\"\nkind = \"fs\"\nqueues = 2",
            "id = \"other\"\nkind = \"fs\"\ntag = \"home\"",
        ]);
        let seen: Vec<_> = devices
            .unwrap()
            .iter()
            .map(|one| (one.virtqueues(), one.tag().to_owned()))
            .collect();
        let seen: Vec<_> = seen.iter().map(|(n, tag)| (*n, tag.as_str())).collect();
        assert_eq!(seen, [(2, "disk"), (3, "share"), (2, "home")]);
    }

    #[test]
    fn what_cannot_be_is_refused_and_said_why() {
        for (tables, expected) in [
            (&["id = \"a\"\nkind = \"net\""][..], "unknown variant `net`"),
            (
                &["id = \"a\"\nkind = \"blk\"\ntag = \"t\""],
                "is no file system",
            ),
            (&["id = \"a\"\nkind = \"fs\"\ntag = \"\""], "is no tag"),
            (&["id = \"a\"\nkind = \"fs\"\ntag = \"a b\""], "is no tag"),
            (&["id = \"a\"\nkind = \"blk\"\nqueues = 9"], "1 to 8"),
            (
                &["id = \"a\"\nkind = \"blk\""; 2],
                "two vhost_user devices have the id",
            ),
            (
                &[
                    "id = \"a\"\nkind = \"fs\"",
                    "id = \"b\"\nkind = \"fs\"\ntag = \"a\"",
                ],
                "two file systems have the tag",
            ),
            (&["id = \"a\"\nkind = \"blk\""; 5], "at most 4"),
        ] {
            let error = parse(tables).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
