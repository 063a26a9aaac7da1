//! One cgroup per VM, for all generations of its worker: guest RAM stays charged to it, and the number of tasks is bounded.
//!
//! Version 2 with a delegated `pids` controller is taken where there is one, else version 1's `pids` hierarchy
//! (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/pids.rst).

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

const V2: &str = "/sys/fs/cgroup";
const V1: &str = "/sys/fs/cgroup/pids";

/// A VM's cgroup; removed when dropped, if nobody is left in it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the VM's cgroup with room for this many tasks.
    ///
    /// It is called `VM-PROCESS`, after the broker. What brokers of the same VM that are dead have left is removed.
    pub(crate) fn create(vm: &str, process: i32, tasks: u64) -> Result<Self> {
        let parent = parent()?;
        sweep(&parent, vm);
        let path = parent.join(format!("{vm}-{process}"));
        fs::create_dir_all(&path)
            .doing(format_args!("cannot make the cgroup {}", path.display()))?;
        let cgroup = Self { path };
        fs::write(cgroup.path.join("pids.max"), tasks.to_string()).doing(format_args!(
            "cannot limit the tasks of {}",
            cgroup.path.display()
        ))?;
        Ok(cgroup)
    }

    /// Where a process writes itself in: the right to it goes with the descriptor.
    pub(crate) fn door(&self) -> Result<fs::File> {
        let path = self.path.join("cgroup.procs");
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .doing(format_args!("cannot open {}", path.display()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// How many tasks it has room for, as the kernel says.
    pub(crate) fn task_limit(&self) -> String {
        fs::read_to_string(self.path.join("pids.max"))
            .map_or_else(|e| e.to_string(), |text| text.trim().to_owned())
    }

    /// Whether /proc/PID/cgroup says that the process is in here.
    pub(crate) fn holds(&self, pid: i32) -> bool {
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
            return false;
        };
        text.lines().any(|line| {
            line.splitn(3, ':').nth(2).is_some_and(|relative| {
                let relative = relative.trim_start_matches('/');
                Path::new(V2).join(relative) == self.path
                    || Path::new(V1).join(relative) == self.path
            })
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What was killed a moment ago may still be on its way out.
        for _ in 0..500 {
            match fs::remove_dir(&self.path) {
                Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                _ => return,
            }
        }
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
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            // Fails when somebody is in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn parent() -> Result<PathBuf> {
    let lists_pids = |file: &str| {
        fs::read_to_string(Path::new(V2).join(file))
            .is_ok_and(|words| words.split_whitespace().any(|word| word == "pids"))
    };
    if lists_pids("cgroup.controllers") {
        let parent = Path::new(V2).join("baton");
        if !lists_pids("cgroup.subtree_control") {
            fs::write(Path::new(V2).join("cgroup.subtree_control"), "+pids")
                .doing("cannot delegate the pids controller")?;
        }
        fs::create_dir_all(&parent).doing("cannot make the cgroup baton")?;
        fs::write(parent.join("cgroup.subtree_control"), "+pids")
            .doing("cannot delegate the pids controller to the cgroup baton")?;
        return Ok(parent);
    }
    if Path::new(V1).join("cgroup.procs").exists() {
        return Ok(Path::new(V1).join("baton"));
    }
    Err(unfit(
        "no cgroup hierarchy has the pids controller",
        "mount cgroup2 at /sys/fs/cgroup, or cgroup version 1's pids at /sys/fs/cgroup/pids",
    ))
}
