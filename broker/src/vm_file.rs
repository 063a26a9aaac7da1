//! The VM file: one TOML document that describes one VM. It names paths, never descriptor numbers.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use baton_ipc::CpuFeature;
use baton_ipc::worker::MAX_CMDLINE;
use baton_ipc::worker::MAX_CPUS;
use baton_ipc::worker::Pages;
use baton_ipc::worker::PanicAction;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::RamRegion;
use baton_policy::CgroupLimits;
use baton_policy::Policy;
use serde::Deserialize;

pub(crate) mod disk;
pub(crate) mod net;
pub(crate) mod slots;
pub(crate) mod vfio;
pub(crate) mod vhost_user;
pub(crate) mod vsock;

use self::disk::Disks;
use self::net::Nets;
use self::vfio::Vfios;
use self::vhost_user::VhostUsers;
use crate::refusal::Result;
use crate::refusal::unfit;

/// The longest VM file, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The longest name: it is a directory's name and part of a socket path (sun_path has 108 bytes, unix(7)).
const MAX_NAME: usize = 48;
/// The least RAM, in bytes: what a kernel loaded at 1 MiB, its boot structures and the ACPI tables need.
const MIN_RAM: u64 = 16 << 20;
/// The most RAM, in bytes.
const MAX_RAM: u64 = 16 << 30;
/// Where RAM stops below 4 GiB: the last GiB holds the PCI windows, the interrupt controllers and the reset vector.
const LOW_RAM_END: u64 = 0xc000_0000;
/// Where the rest of RAM goes on.
const HIGH_RAM_START: u64 = 1 << 32;

/// A VM's description.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmFile {
    #[serde(rename = "schema")]
    _schema: Schema,
    /// The VM's name, and its directory's under the run directory.
    pub(crate) name: Name,
    /// The worker binary; without it, the one beside the broker.
    pub(crate) worker: Option<PathBuf>,
    /// `default`, or a policy file's path.
    #[serde(default = "default_policy")]
    pub(crate) policy: PathBuf,
    /// Processors.
    #[serde(default)]
    pub(crate) cpus: Cpus,
    /// Guest RAM.
    pub(crate) memory: Memory,
    /// What the guest boots.
    pub(crate) boot: Boot,
    /// Where the console on its serial port goes.
    #[serde(default)]
    pub(crate) console: Console,
    /// Where the one on its virtio console goes, if it has one.
    pub(crate) virtio_console: Option<Console>,
    /// Its disks.
    #[serde(default)]
    pub(crate) disk: Disks,
    /// Its network interfaces.
    #[serde(default)]
    pub(crate) net: Nets,
    /// Its devices that other processes implement.
    #[serde(default)]
    pub(crate) vhost_user: VhostUsers,
    /// Its devices that are PCI devices of the host.
    #[serde(default)]
    pub(crate) vfio: Vfios,
    /// Its socket device.
    pub(crate) vsock: Option<vsock::Vsock>,
    /// What follows when its kernel says that it has panicked.
    #[serde(default)]
    pub(crate) on_panic: PanicAction,
}

fn default_policy() -> PathBuf {
    PathBuf::from("default")
}

/// The version of the file's schema.
#[derive(Debug, Deserialize)]
#[serde(try_from = "u32")]
struct Schema;

impl TryFrom<u32> for Schema {
    type Error = String;

    fn try_from(version: u32) -> std::result::Result<Self, String> {
        match version {
            1 => Ok(Self),
            other => Err(format!(
                "schema {other} is not known; this broker reads schema 1"
            )),
        }
    }
}

/// A VM's name.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Name(String);

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        let plain = name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-'));
        let first = name
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
        if plain && first && name.len() <= MAX_NAME {
            Ok(Self(name))
        } else {
            Err(format!(
                "a name has 1 to {MAX_NAME} of A-Z a-z 0-9 . _ - and starts with a letter or a digit"
            ))
        }
    }
}

/// `[cpus]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cpus {
    /// How many.
    #[serde(default)]
    pub(crate) count: CpuCount,
    /// CPUID features that the guest does not see.
    #[serde(default)]
    pub(crate) hide: Vec<CpuFeature>,
}

/// 1 to [`MAX_CPUS`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "u32")]
pub(crate) struct CpuCount(pub(crate) u8);

impl Default for CpuCount {
    fn default() -> Self {
        Self(1)
    }
}

impl TryFrom<u32> for CpuCount {
    type Error = String;

    fn try_from(count: u32) -> std::result::Result<Self, String> {
        match u8::try_from(count) {
            Ok(n @ 1..=MAX_CPUS) => Ok(Self(n)),
            _ => Err(format!("{count} vCPUs; a VM has 1 to {MAX_CPUS}")),
        }
    }
}

/// `[memory]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memory {
    /// How much.
    pub(crate) size: Size,
    /// How it is backed.
    #[serde(default = "small_pages")]
    pub(crate) pages: Pages,
    /// Whether the guest has a balloon.
    #[serde(default)]
    pub(crate) balloon: bool,
    /// The file that it is in, which outlives the VM; without it, memfds.
    pub(crate) path: Option<PathBuf>,
    /// Whether every worker of the VM has the same.
    #[serde(default = "yes")]
    pub(crate) share: bool,
    #[serde(rename = "kind", default)]
    _kind: MemoryKind,
}

impl Memory {
    /// Where it is.
    pub(crate) fn backing(&self) -> RamBacking {
        match (&self.path, self.share) {
            (_, false) => RamBacking::Private,
            (Some(_), true) => RamBacking::File,
            (None, true) => RamBacking::Shared,
        }
    }

    /// What does not go together.
    fn check(&self) -> std::result::Result<(), &'static str> {
        match self.share {
            false if self.path.is_some() => Err(
                "memory.path with share = false: what the guest writes would not be in its file",
            ),
            false if self.balloon => Err(
                "memory.balloon with share = false: memory that is the worker's own cannot be given back",
            ),
            false if self.pages != Pages::Small => Err(
                "memory.pages with share = false: memory that is the worker's own is in small pages",
            ),
            _ => Ok(()),
        }
    }
}

fn yes() -> bool {
    true
}

/// What kind of memory it is. There is one; others are known by name, and refused.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "String")]
struct MemoryKind;

impl TryFrom<String> for MemoryKind {
    type Error = String;

    fn try_from(kind: String) -> std::result::Result<Self, String> {
        match kind.as_str() {
            "ram" => Ok(Self),
            "confidential" => Err(
                "confidential memory (guest_memfd) is not supported: no other worker could have it, and the guest could not be upgraded"
                    .to_owned(),
            ),
            "epc" => Err(
                "epc memory (SGX) is not supported: no other worker could have it, and the guest could not be upgraded"
                    .to_owned(),
            ),
            other => Err(format!("{other:?} is no kind of memory; there is \"ram\"")),
        }
    }
}

fn small_pages() -> Pages {
    Pages::Small
}

/// A size with a binary unit, in bytes.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Size(pub(crate) u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let expected =
            || format!("{text:?} is no size; write a whole number and K, M or G, as in \"512M\"");
        let bytes = binary_size(&text).ok_or_else(expected)?;
        if (MIN_RAM..=MAX_RAM).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(format!("{text} of guest RAM; a VM has 16M to 16G"))
        }
    }
}

/// The bytes of a whole number with the unit K, M or G.
fn binary_size(text: &str) -> Option<u64> {
    let unit = text.chars().next_back()?;
    let shift = match unit {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        _ => return None,
    };
    let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
    number.checked_mul(1 << shift)
}

/// `[boot]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Boot {
    /// ELF or bzImage.
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk.
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub(crate) cmdline: Cmdline,
}

/// A command line that a kernel can take.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Cmdline(pub(crate) String);

impl TryFrom<String> for Cmdline {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        if text.len() > MAX_CMDLINE {
            Err(format!(
                "{} bytes of command line; at most {MAX_CMDLINE}",
                text.len()
            ))
        } else if text.bytes().any(|b| !(b' '..=b'~').contains(&b)) {
            Err("a command line has printable ASCII characters only".to_owned())
        } else {
            Ok(Self(text))
        }
    }
}

/// `[console]` and `[virtio_console]`.
#[derive(Debug, Default, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Console {
    /// Only those who attach see it.
    #[default]
    Socket,
    /// Attached to whoever runs `baton run`.
    Stdio,
    /// A pseudo-terminal, to which a link in the VM's directory leads.
    Pty,
    /// Appended to a file.
    File {
        /// The file.
        path: PathBuf,
    },
}

impl VmFile {
    /// Reads and checks a VM file. Relative paths in it are relative to its directory.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let unreadable =
            |e: std::io::Error| unfit(format_args!("cannot read the VM file {shown}: {e}"), "");
        let file = crate::devices::resources::open_image(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            return Err(unfit(
                format_args!("{shown} is no VM file: not a regular file of at most 1 MiB"),
                "",
            ));
        }
        // What it names is opened with this process's rights.
        let me = rustix::process::geteuid().as_raw();
        if ![0, me].contains(&metadata.uid()) || metadata.mode() & 0o022 != 0 {
            return Err(unfit(
                format_args!(
                    "{shown} is not to be trusted: it belongs to user {} with mode {:o}",
                    metadata.uid(),
                    metadata.mode() & 0o7777
                ),
                format_args!("it has to belong to root or user {me}, and nobody else may write it"),
            ));
        }
        let mut text = String::new();
        file.take(MAX_FILE)
            .read_to_string(&mut text)
            .map_err(unreadable)?;
        let wrong = |e: &dyn std::fmt::Display| {
            unfit(
                format_args!("{shown}: {e}"),
                "docs/vm-file.md describes every field",
            )
        };
        let mut file = Self::parse(&text).map_err(|e| wrong(&e))?;
        file.check().map_err(|e| wrong(&e))?;
        let directory = std::path::absolute(path)
            .ok()
            .and_then(|path| path.parent().map(Path::to_owned))
            .unwrap_or_default();
        file.resolve(&directory);
        Ok(file)
    }

    pub(crate) fn parse(text: &str) -> std::result::Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// What does not go together.
    fn check(&self) -> std::result::Result<(), &'static str> {
        if !self.memory.share && !self.vhost_user.0.is_empty() {
            return Err(
                "vhost_user with memory.share = false: the process behind the device maps the guest's memory",
            );
        }
        if let Some(Console::Stdio) = self.virtio_console {
            return Err("virtio_console.kind = \"stdio\": that is for the serial console alone");
        }
        if self.overfull() {
            return Err("more devices than there are PCI device numbers");
        }
        if !self.vfio.0.is_empty() {
            self.check_vfio()?;
        }
        self.memory.check()
    }

    /// Bytes of guest RAM that a worker has pinned, for devices of the host.
    pub(crate) fn pinned(&self) -> u64 {
        if self.vfio.0.is_empty() {
            0
        } else {
            self.memory.size.0
        }
    }

    fn resolve(&mut self, directory: &Path) {
        let below = |path: &mut PathBuf| *path = directory.join(&path);
        below(&mut self.boot.kernel);
        self.boot.initrd.as_mut().map(below);
        self.worker.as_mut().map(below);
        self.memory.path.as_mut().map(below);
        self.disk
            .0
            .iter_mut()
            .for_each(|disk| below(&mut disk.path));
        self.vhost_user
            .0
            .iter_mut()
            .for_each(|device| below(&mut device.socket));
        self.vsock
            .iter_mut()
            .for_each(|vsock| below(&mut vsock.socket));
        if self.policy.as_os_str() != "default" {
            below(&mut self.policy);
        }
        let consoles = std::iter::once(&mut self.console).chain(self.virtio_console.as_mut());
        for console in consoles {
            if let Console::File { path } = console {
                below(path);
            }
        }
    }

    /// What a policy limits its cgroup to, in which two workers are during an upgrade.
    pub(crate) fn cgroup_limits(&self, policy: &Policy) -> CgroupLimits {
        policy.cgroup_limits(2, self.cpus.count.0.into(), self.memory.size.0)
    }

    /// Guest RAM, split around the 32-bit hole.
    pub(crate) fn ram(&self) -> Vec<RamRegion> {
        let total = self.memory.size.0;
        let low = RamRegion {
            address: 0,
            size: total.min(LOW_RAM_END),
        };
        let high = RamRegion {
            address: HIGH_RAM_START,
            size: total - low.size,
        };
        [low, high]
            .into_iter()
            .filter(|region| region.size > 0)
            .collect()
    }
}

/// The page size that a region has to be a multiple of, in bytes.
pub(crate) fn page_size(pages: Pages) -> u64 {
    match pages {
        Pages::Small => 4 << 10,
        Pages::Huge | Pages::Transparent => 2 << 20,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
schema = 1
name = "web1"
[memory]
size = "512M"
[boot]
kernel = "vmlinux"
"#;

    #[test]
    fn a_small_file_has_defaults() {
        let mut file = VmFile::parse(GOOD).unwrap();
        file.resolve(Path::new("/srv/vm"));
        assert_eq!(file.boot.kernel, Path::new("/srv/vm/vmlinux"));
        assert_eq!(file.on_panic, PanicAction::Pause);
        assert_eq!((file.cpus.count.0, file.memory.pages), (1, Pages::Small));
        assert_eq!(
            file.ram(),
            [RamRegion {
                address: 0,
                size: 512 << 20
            }]
        );
    }

    #[test]
    fn memory_is_shared_unless_it_is_said_not_to_be() {
        let memory = |lines: &str| {
            let text = GOOD.replace("size = \"512M\"", &format!("size = \"512M\"\n{lines}"));
            VmFile::parse(&text).map(|file| file.memory)
        };
        for (lines, backing) in [
            ("", RamBacking::Shared),
            ("kind = \"ram\"\nshare = true", RamBacking::Shared),
            ("path = \"/dev/shm/a\"", RamBacking::File),
            ("share = false", RamBacking::Private),
        ] {
            let memory = memory(lines).unwrap();
            assert_eq!((memory.backing(), memory.check()), (backing, Ok(())));
        }
        for other in ["path = \"/dev/shm/a\"", "balloon = true", "pages = \"thp\""] {
            let memory = memory(&format!("share = false\n{other}")).unwrap();
            let name = other.split(' ').next().unwrap();
            assert!(memory.check().unwrap_err().contains(name), "{other}");
        }
    }

    #[test]
    fn memory_that_no_other_worker_could_have_is_refused_by_name() {
        for kind in ["confidential", "epc", "other"] {
            let text = GOOD.replace("size =", &format!("kind = \"{kind}\"\nsize ="));
            let error = VmFile::parse(&text).unwrap_err().to_string();
            assert!(error.contains(kind), "{error}");
        }
    }

    #[test]
    fn disks_have_defaults_and_limits_that_last_a_second() {
        let disks = r#"
[[disk]]
id = "root"
path = "root.img"
[[disk]]
id = "data"
path = "/dev/vg/data"
readonly = true
limit = { bytes = "10M", operations = 100, operations_burst = 500 }
"#;
        let mut file = VmFile::parse(&format!("{GOOD}{disks}")).unwrap();
        file.resolve(Path::new("/srv/vm"));
        let [root, data] = &file.disk.0[..] else {
            panic!("{:?}", file.disk)
        };
        assert_eq!(root.path, Path::new("/srv/vm/root.img"));
        assert_eq!(
            (root.queues.0, root.readonly, root.direct),
            (1, false, false)
        );
        assert_eq!(
            root.limit.limits(),
            baton_ipc::worker::DeviceLimits::default()
        );
        assert_eq!(data.path, Path::new("/dev/vg/data"));
        let limits = data.limit.limits();
        let (bytes, operations) = (limits.bytes.unwrap(), limits.operations.unwrap());
        assert_eq!((bytes.per_second, bytes.burst), (10 << 20, 10 << 20));
        assert_eq!((operations.per_second, operations.burst), (100, 500));
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        let file = VmFile::parse(&GOOD.replace("512M", "4G")).unwrap();
        assert_eq!(
            file.ram(),
            [
                RamRegion {
                    address: 0,
                    size: 3 << 30
                },
                RamRegion {
                    address: 4 << 30,
                    size: 1 << 30
                }
            ]
        );
    }

    #[test]
    fn every_mistake_names_its_line_and_what_was_expected() {
        for (from, to, line, expected) in [
            ("name", "nane", 3, "unknown field `nane`"),
            ("web1", "../web1", 3, "a name has"),
            ("512M", "512", 5, "is no size"),
            ("512M", "1M", 5, "16M to 16G"),
            ("512M", "99999999999999999999G", 5, "is no size"),
            ("schema = 1", "schema = 2", 2, "reads schema 1"),
            (
                "schema = 1",
                "schema = 1\non_panic = \"debug\"",
                3,
                "unknown variant `debug`, expected one of `run`, `pause`, `poweroff`",
            ),
            ("[boot]", "[cpus]\ncount = 9\n[boot]", 7, "1 to 8"),
            (
                "[boot]",
                "[cpus]\nhide = [\"quantum\"]\n[boot]",
                7,
                "known are: ",
            ),
            (
                "[boot]",
                "[console]\nkind = \"radio\"\n[boot]",
                7,
                "unknown variant `radio`",
            ),
            (
                "[boot]",
                "[[disk]]\nid = \"a b\"\npath = \"x\"\n[boot]",
                7,
                "no id or serial number",
            ),
            (
                "[boot]",
                "[[disk]]\nid = \"a\"\npath = \"x\"\nqueues = 9\n[boot]",
                9,
                "1 to 8",
            ),
            (
                "[boot]",
                "[[disk]]\nid = \"a\"\npath = \"x\"\nlimit = { bytes = \"9\" }\n[boot]",
                9,
                "no number of bytes",
            ),
            (
                "[boot]",
                "[[disk]]\nid = \"a\"\npath = \"x\"\n[[disk]]\nid = \"a\"\npath = \"y\"\n[boot]",
                6,
                "two disks have the id",
            ),
            (
                "[boot]",
                "[[disk]]\nid = \"a\"\npath = \"x\"\nlimit = { operations_burst = 1 }\n[boot]",
                6,
                "a burst without",
            ),
            (
                "size = \"512M\"",
                "size = \"512M\"\npages = \"1G\"",
                6,
                "unknown variant `1G`",
            ),
        ] {
            let error = VmFile::parse(&GOOD.replace(from, to))
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("line {line}")), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_json_schema_has_the_fields_that_the_parser_takes() {
        let schema: serde_json::Value =
            serde_json::from_str(include_str!("../../docs/vm.schema.json")).unwrap();
        let names = |object: &serde_json::Value| -> Vec<String> {
            object["properties"]
                .as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect()
        };
        for (table, header) in [
            (None, ""),
            (Some("cpus"), "[cpus]\n"),
            (Some("memory"), ""),
            (Some("boot"), ""),
        ] {
            let known = match table {
                None => names(&schema),
                Some(table) => names(&schema["properties"][table]),
            };
            // serde's complaint about an unknown field lists the ones that it knows.
            let text = match table {
                None => format!("zzz = 1\n{GOOD}"),
                Some("cpus") => format!("{GOOD}{header}zzz = 1\n"),
                Some(table) => GOOD.replace(&format!("[{table}]"), &format!("[{table}]\nzzz = 1")),
            };
            let error = VmFile::parse(&text).unwrap_err().to_string();
            for name in &known {
                assert!(error.contains(&format!("`{name}`")), "{name}: {error}");
            }
            assert_eq!(error.matches('`').count(), 2 * (known.len() + 1), "{error}");
        }
    }
}
