//! The tables of the file, as TOML has them.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use crate::access::Right;
use crate::descriptors::{Access, Kind, Seal};
use crate::policy::{Namespace, Role, Violation};
use crate::rlimits::Resource;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(rename = "schema")]
    pub(super) _schema: u32,
    pub(super) name: Spanned<String>,
    pub(super) workers: FileWorkers,
    #[serde(default)]
    pub(super) approve: Vec<FileApproval>,
    pub(super) ids: Spanned<FileIds>,
    #[serde(default)]
    pub(super) access: Vec<FileAccess>,
    pub(super) namespaces: FileNamespaces,
    pub(super) threads: FileThreads,
    pub(super) cgroup: Option<FileCgroup>,
    pub(super) io: Option<FileIo>,
    pub(super) rlimits: BTreeMap<Resource, Spanned<FileLimit>>,
    pub(super) capabilities: FileCapabilities,
    pub(super) landlock: FileLandlock,
    pub(super) descriptor: Vec<FileGrant>,
    pub(super) roles: BTreeMap<Role, FileRole>,
    #[serde(default)]
    pub(super) refuse: Vec<FileRefusal>,
    pub(super) allow: Vec<FileTopic>,
    pub(super) learn: Option<FileLearn>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileLearn {
    pub(super) why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileWorkers {
    pub(super) digests: Vec<Spanned<String>>,
    pub(super) directory: Option<PathBuf>,
    pub(super) beside_broker: bool,
    #[serde(default)]
    pub(super) key: Vec<FileKey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileKey {
    pub(super) minisign: Spanned<String>,
    pub(super) why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileApproval {
    pub(super) worker: Spanned<String>,
    pub(super) why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileIds {
    pub(super) first: u32,
    pub(super) count: u32,
    pub(super) unprivileged_broker: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileAccess {
    pub(super) to: Spanned<BTreeSet<Right>>,
    #[serde(default)]
    pub(super) users: BTreeSet<u32>,
    #[serde(default)]
    pub(super) groups: BTreeSet<u32>,
    pub(super) why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileNamespaces {
    pub(super) required: Vec<Namespace>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileThreads {
    pub(super) headroom: NonZeroU32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileCgroup {
    pub(super) memory_headroom: Spanned<FileLimit>,
    pub(super) cpu_headroom: Spanned<FileLimit>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileIo {
    pub(super) console_file: Spanned<FileLimit>,
    pub(super) disk_bytes: Spanned<FileLimit>,
    pub(super) disk_operations: Spanned<FileLimit>,
    pub(super) net_bytes: Spanned<FileLimit>,
    pub(super) net_operations: Spanned<FileLimit>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum FileLimit {
    At(i64),
    Word(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileCapabilities {
    pub(super) keep: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileLandlock {
    pub(super) floor_abi: Spanned<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileGrant {
    pub(super) name: Spanned<String>,
    pub(super) kinds: Spanned<Vec<Kind>>,
    pub(super) access: Access,
    #[serde(default)]
    pub(super) seals: BTreeSet<Seal>,
    #[serde(default = "one")]
    pub(super) count: NonZeroU32,
    #[serde(default)]
    pub(super) paths: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) addresses: Vec<Spanned<String>>,
    pub(super) why: Spanned<String>,
}

fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRole {
    pub(super) violation: Violation,
    pub(super) why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRefusal {
    pub(super) call: Spanned<String>,
    pub(super) errno: Spanned<String>,
    pub(super) why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileTopic {
    pub(super) topic: Spanned<String>,
    pub(super) to: Spanned<Vec<Role>>,
    pub(super) calls: Vec<FileRule>,
}

/// A topic of the broker's own file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OwnTopic {
    pub(super) topic: Spanned<String>,
    pub(super) calls: Vec<FileRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRule {
    pub(super) call: Spanned<String>,
    pub(super) when: Option<Spanned<String>>,
    pub(super) why: Spanned<String>,
}
