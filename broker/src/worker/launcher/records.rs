//! What /proc shows of a process only to those who may trace it: read here, judged by the broker.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use baton_policy::Namespace;
use serde::Deserialize;
use serde::Serialize;

/// The most that a process's records take, in bytes. Those of a worker take some 20 KiB.
pub(super) const MAX: usize = 2 << 20;

/// The longest of one file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Device and inode.
pub(crate) type Identity = (u64, u64);

/// A process, apart from its threads. What could not be read says why.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Records {
    /// What it executes.
    pub(crate) executable: Option<Identity>,
    /// The names in its root directory.
    pub(crate) root: Result<Vec<String>, String>,
    /// `/proc/PID/maps`.
    pub(crate) maps: Result<String, String>,
    pub(crate) descriptors: Result<Vec<DescriptorRecord>, String>,
}

/// A descriptor of a process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DescriptorRecord {
    pub(crate) number: u32,
    /// What /proc calls it.
    pub(crate) target: String,
    /// Of the open file itself.
    pub(crate) identity: Option<Identity>,
    /// Its file in `/proc/PID/fdinfo`.
    pub(crate) info: String,
}

impl Records {
    /// Reads them.
    pub(super) fn read(pid: u32) -> Self {
        let proc = format!("/proc/{pid}");
        Self {
            executable: identity(Path::new(&format!("{proc}/exe"))),
            root: names(&format!("{proc}/root/")),
            maps: text(&format!("{proc}/maps")),
            descriptors: names(&format!("{proc}/fd")).map(|names| descriptors(&proc, &names)),
        }
    }
}

/// The namespaces that a process is in.
pub(crate) fn namespaces(process: &str) -> BTreeMap<Namespace, Identity> {
    let one = |namespace: &Namespace| {
        let path = format!("/proc/{process}/ns/{}", namespace.proc_name());
        Some((*namespace, identity(Path::new(&path))?))
    };
    Namespace::ALL.iter().filter_map(one).collect()
}

fn descriptors(proc: &str, names: &[String]) -> Vec<DescriptorRecord> {
    let read = |name: &String| {
        let link = format!("{proc}/fd/{name}");
        let target = fs::read_link(&link).unwrap_or_default();
        Some(DescriptorRecord {
            number: name.parse().ok()?,
            target: target.to_string_lossy().into_owned(),
            identity: identity(Path::new(&link)),
            info: text(&format!("{proc}/fdinfo/{name}")).unwrap_or_default(),
        })
    };
    names.iter().filter_map(read).collect()
}

/// Through a link: of what it leads to.
fn identity(path: &Path) -> Option<Identity> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn names(directory: &str) -> Result<Vec<String>, String> {
    let name = |entry: std::io::Result<fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    fs::read_dir(directory)
        .and_then(|entries| entries.map(name).collect())
        .map_err(|e| e.to_string())
}

fn text(path: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes))
        .map_err(|e| e.to_string())?;
    if bytes.len() as u64 == MAX_FILE {
        return Err(format!("longer than {MAX_FILE} bytes"));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_as_it_is() {
        let me = std::process::id();
        let file = File::open("/dev/null").unwrap();
        let records = Records::read(me);
        assert_eq!(
            records.executable,
            identity(&std::env::current_exe().unwrap())
        );
        assert!(records.maps.unwrap().contains("[stack]"));
        assert!(records.root.unwrap().contains(&"proc".to_owned()));
        let number = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
        let descriptors = records.descriptors.unwrap();
        let found = descriptors.iter().find(|one| one.number == number).unwrap();
        assert_eq!(found.target, "/dev/null");
        assert_eq!(found.identity, identity(Path::new("/dev/null")));
        assert!(found.info.contains("flags:"));
        assert_eq!(namespaces(&me.to_string()), namespaces("self"));
        assert_eq!(namespaces("self").len(), Namespace::ALL.len());

        let none = Records::read(u32::MAX);
        assert!(none.executable.is_none() && none.maps.is_err() && none.descriptors.is_err());
    }
}
