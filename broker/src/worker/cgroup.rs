//! One cgroup per VM, for all generations of its worker: guest RAM stays charged to it, and its tasks, memory and processor time
//! are bounded as policy says.
//!
//! Version 2 with the controllers that policy needs is taken where there is one, else version 1's hierarchies of them
//! (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1). A controller that is missing is an error: no limit is dropped in
//! silence.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use baton_policy::CgroupLimits;
use baton_policy::CgroupSetting;
use baton_policy::CgroupVersion;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

/// Where version 2 is mounted, and below which version 1's hierarchies are, each under its controller's name.
const MOUNT: &str = "/sys/fs/cgroup";

/// A VM's cgroup; removed when dropped, if nobody is left in it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    version: CgroupVersion,
    /// `baton/VM-PROCESS`.
    name: PathBuf,
    limits: CgroupLimits,
}

impl Cgroup {
    /// Makes the VM's cgroup with these limits.
    ///
    /// It is called `VM-PROCESS`, after the broker. What brokers of the same VM that are dead have left is removed.
    pub(crate) fn create(vm: &str, process: i32, limits: CgroupLimits) -> Result<Self> {
        let cgroup = Self {
            version: version(&limits)?,
            name: Path::new("baton").join(format!("{vm}-{process}")),
            limits,
        };
        make_parents();
        for path in cgroup.paths() {
            if let Some(parent) = path.parent() {
                sweep(parent, vm);
            }
            fs::create_dir_all(&path)
                .doing(format_args!("cannot make the cgroup {}", path.display()))?;
        }
        cgroup.write()?;
        Ok(cgroup)
    }

    fn write(&self) -> Result<()> {
        for (setting, file) in self.settings() {
            fs::write(&file, &setting.value)
                .doing(format_args!("cannot limit {}", file.display()))?;
        }
        Ok(())
    }

    /// Whether the limits of another policy are of what this cgroup limits. Which controllers a cgroup has is as it was made.
    pub(crate) fn check(&self, limits: CgroupLimits) -> Result<()> {
        let controllers = |limits: CgroupLimits| -> Vec<&str> {
            let settings = limits.settings(self.version).into_iter();
            settings.map(|setting| setting.controller).collect()
        };
        let (now, then) = (controllers(self.limits), controllers(limits));
        if now == then {
            return Ok(());
        }
        Err(unfit(
            format_args!(
                "the VM's cgroup limits {}, the policy now {}",
                now.join(" and "),
                then.join(" and ")
            ),
            "end the VM and run it again under this policy, or let it limit the same",
        ))
    }

    /// Limits it as another policy says. What the kernel does not take is found by the next audit.
    pub(crate) fn limit(&mut self, limits: CgroupLimits) -> Result<()> {
        self.limits = limits;
        self.write()
    }

    /// Its directories, the one that counts tasks first: one in version 2, one for each controller in version 1.
    fn paths(&self) -> Vec<PathBuf> {
        match self.version {
            CgroupVersion::V2 => vec![Path::new(MOUNT).join(&self.name)],
            CgroupVersion::V1 => {
                let settings = self.limits.settings(self.version);
                let hierarchy = |one: CgroupSetting| Path::new(MOUNT).join(one.controller);
                settings
                    .into_iter()
                    .map(|one| hierarchy(one).join(&self.name))
                    .collect()
            }
        }
    }

    fn settings(&self) -> impl Iterator<Item = (CgroupSetting, PathBuf)> + use<'_> {
        let settings = self.limits.settings(self.version).into_iter();
        settings.map(|setting| {
            let hierarchy = match self.version {
                CgroupVersion::V1 => Path::new(MOUNT).join(setting.controller),
                CgroupVersion::V2 => PathBuf::from(MOUNT),
            };
            let file = hierarchy.join(&self.name).join(setting.file);
            (setting, file)
        })
    }

    /// Where a process writes itself in: the right to it goes with the descriptors.
    pub(crate) fn doors(&self) -> Result<Vec<fs::File>> {
        let open = |path: PathBuf| {
            let path = path.join("cgroup.procs");
            fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .doing(format_args!("cannot open {}", path.display()))
        };
        self.paths().into_iter().map(open).collect()
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.paths().into_iter().next().unwrap_or_default()
    }

    /// The limits that the kernel has, in words; or what is wrong with them, and with where the process is.
    pub(crate) fn confines(&self, pid: i32) -> std::result::Result<String, Vec<String>> {
        let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let mut wrong: Vec<String> = self
            .paths()
            .into_iter()
            .filter(|path| !holds(&membership, path))
            .map(|path| format!("it is not in {}", path.display()))
            .collect();
        let mut found = vec![self.path().display().to_string()];
        for (setting, file) in self.settings() {
            match fs::read_to_string(&file) {
                Ok(text) if setting.covers(&text) => {
                    found.push(format!("{} {}", setting.file, text.trim()));
                }
                Ok(text) => wrong.push(format!(
                    "{} says {:?}, policy {}",
                    file.display(),
                    text.trim(),
                    setting.value
                )),
                Err(e) => wrong.push(format!("{} cannot be read: {e}", file.display())),
            }
        }
        if wrong.is_empty() {
            Ok(found.join(", "))
        } else {
            Err(wrong)
        }
    }
}

/// Whether /proc/PID/cgroup, whose lines are `NUMBER:CONTROLLERS:PATH`, says that the process is in this directory.
fn holds(membership: &str, path: &Path) -> bool {
    membership.lines().any(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(relative)) = (fields.next(), fields.next()) else {
            return false;
        };
        let relative = relative.trim_start_matches('/');
        // Version 2's line names no controller.
        controllers
            .split(',')
            .any(|controller| Path::new(MOUNT).join(controller).join(relative) == path)
    })
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What was killed a moment ago may still be on its way out.
        let mut left = self.paths();
        for _ in 0..500 {
            remove(&mut left);
            if left.is_empty() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// Where version 2 says which controllers there are, and which are handed down.
pub(crate) fn controllers() -> [PathBuf; 2] {
    ["cgroup.controllers", "cgroup.subtree_control"].map(|file| Path::new(MOUNT).join(file))
}

/// Where VMs have their cgroups, in either version.
pub(crate) fn parents() -> Vec<PathBuf> {
    ["", "pids", "memory", "cpu"]
        .map(|controller| Path::new(MOUNT).join(controller).join("baton"))
        .into()
}

/// Makes those of version 1 that are not there yet, also in hierarchies that this cgroup does not need: the broker is about to
/// confine itself to what is there, and the front's cgroup, which is made later, has limits of its own. What goes wrong is said
/// by whoever needs one.
fn make_parents() {
    for parent in parents().into_iter().skip(1) {
        let mounted = parent.with_file_name("cgroup.procs").exists();
        if mounted {
            let _ = fs::create_dir_all(parent);
        }
    }
}

/// The directories of the cgroup whose first is this, whatever it was limited to.
pub(crate) fn everywhere(path: &Path) -> Vec<PathBuf> {
    let mut all = vec![path.to_owned()];
    if let Ok(name) = path.strip_prefix(Path::new(MOUNT).join("pids")) {
        all.extend(["memory", "cpu"].map(|one| Path::new(MOUNT).join(one).join(name)));
    }
    all
}

/// Removes these directories, as far as nobody is in them; what is left is to be tried again.
pub(crate) fn remove(left: &mut Vec<PathBuf>) {
    left.retain(|path| {
        fs::remove_dir(path).is_err_and(|e| e.kind() == std::io::ErrorKind::ResourceBusy)
    });
}

/// Removes these directories of a dead VM, waiting a second at most. A worker that was killed just now is in its cgroup until
/// its memory is torn down, about 30 ms a GiB; a cgroup that somebody else uses stays.
pub(crate) fn remove_when_empty(mut left: Vec<PathBuf>) {
    for _ in 0..100 {
        remove(&mut left);
        if left.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Removes the empty cgroups of this VM's dead brokers: one that was killed before it had published anything left no other
/// trace.
fn sweep(parent: &Path, vm: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name
            .to_str()
            .and_then(|name| name.strip_prefix(vm)?.strip_prefix('-'))
            .filter(|process| process.bytes().all(|byte| byte.is_ascii_digit()));
        // A process of that number that is no broker spares the cgroup until the next start.
        // One that nobody has reaped yet is dead, too.
        let process = process.and_then(|process| process.parse().ok());
        if process.is_some_and(crate::worker::process::is_exiting) {
            // Fails when somebody is in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Which version this host has the controllers in that these limits need. In version 2 they are handed down to `baton`.
fn version(limits: &CgroupLimits) -> Result<CgroupVersion> {
    let lists = |file: &Path, controller: &str| {
        fs::read_to_string(file)
            .is_ok_and(|words| words.split_whitespace().any(|word| word == controller))
    };
    let root = Path::new(MOUNT);
    let needed = limits.settings(CgroupVersion::V2);
    let controllers = root.join("cgroup.controllers");
    if needed.iter().all(|one| lists(&controllers, one.controller)) {
        let baton = root.join("baton");
        fs::create_dir_all(&baton).doing("cannot make the cgroup baton")?;
        for one in needed {
            for file in [root, &baton].map(|parent| parent.join("cgroup.subtree_control")) {
                if !lists(&file, one.controller) {
                    fs::write(&file, format!("+{}", one.controller)).doing(format_args!(
                        "cannot hand the controller {} down in {}",
                        one.controller,
                        file.display()
                    ))?;
                }
            }
        }
        return Ok(CgroupVersion::V2);
    }
    let missing = needed
        .iter()
        .find(|one| !root.join(one.controller).join("cgroup.procs").exists());
    match missing {
        None => Ok(CgroupVersion::V1),
        Some(one) => Err(unfit(
            format_args!("no cgroup hierarchy has the controller {}", one.controller),
            "mount cgroup2 at /sys/fs/cgroup, or cgroup version 1's hierarchies below it",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_where_the_kernel_says_in_either_version() {
        let v1 = "7:memory:/baton/vm-1\n5:cpu,cpuacct:/\n3:pids:/baton/vm-1\n0::/\n";
        assert!(holds(v1, Path::new("/sys/fs/cgroup/pids/baton/vm-1")));
        assert!(holds(v1, Path::new("/sys/fs/cgroup/memory/baton/vm-1")));
        assert!(!holds(v1, Path::new("/sys/fs/cgroup/cpu/baton/vm-1")));
        assert!(!holds(v1, Path::new("/sys/fs/cgroup/baton/vm-1")));
        let v2 = "0::/baton/vm-1\n";
        assert!(holds(v2, Path::new("/sys/fs/cgroup/baton/vm-1")));
        assert!(!holds(v2, Path::new("/sys/fs/cgroup/baton/vm-10")));
        assert!(!holds("", Path::new("/sys/fs/cgroup/baton/vm-1")));
    }
}
