//! What the places of `broker.toml` are for one VM.

use std::path::Path;
use std::path::PathBuf;

use baton_ipc::Address;
use baton_ipc::descriptor;
use baton_policy::PathPattern;
use baton_policy::Policy;
use baton_policy::own::Place;
use baton_policy::own::Places;

use crate::broker::Options;
use crate::refusal::Result;
use crate::run_dir::VmDirectory;
use crate::vm_file::VmFile;

/// The policy's descriptor whose patterns say where state files may be.
const STATE: &str = "state";

/// Every place with its paths, those that do not exist among them.
pub(crate) fn of(
    vm: &VmFile,
    options: &Options,
    policy: &Policy,
    directory: &VmDirectory,
) -> Result<Places> {
    let worker = options.worker.as_ref().or(vm.worker.as_ref());
    let mut programs = around(&crate::rules::beside_broker("baton-worker")?);
    programs.extend(worker.into_iter().flat_map(|path| around(path)));
    let directories = |name: &str| {
        let patterns = policy.grant(name).map(|grant| grant.paths.as_slice());
        let patterns = patterns.unwrap_or_default().iter();
        patterns.map(PathPattern::directory)
    };
    // A device's directory is full of others'.
    let images = vm.disk.0.iter().map(|disk| &disk.path);
    let images = images
        .filter(|path| path.is_file())
        .flat_map(|path| around(path));
    let mut disks: Vec<PathBuf> = directories(descriptor::DISK)
        .filter(|directory| directory != Path::new("/"))
        .chain(images)
        .collect();
    disks.sort();
    disks.dedup();
    let channels = options.incoming.iter().flat_map(|channels| {
        let all = std::iter::once(&channels.cpr).chain(&channels.main);
        all.filter_map(|address| match address {
            Address::Unix(path) => parent(Path::new(path)),
            Address::Fd(_) | Address::Tcp(_) => None,
        })
    });
    let mut records = vec!["/proc".into()];
    records.extend(crate::worker::cgroup::controllers());
    let is_file = vm.policy.as_os_str() != "default";
    Ok(Places::from([
        (Place::Records, records),
        (Place::Null, vec!["/dev/null".into()]),
        (Place::RunDirectory, vec![directory.run_dir().to_owned()]),
        (Place::VmDirectory, directory.places()),
        (
            Place::AuditDirectory,
            parent(directory.audit_log()).into_iter().collect(),
        ),
        (Place::Cgroups, crate::worker::cgroup::parents()),
        (Place::IdLocks, vec![crate::worker::ids::LOCKS.into()]),
        (
            Place::Policy,
            is_file
                .then(|| around(&vm.policy))
                .into_iter()
                .flatten()
                .collect(),
        ),
        (
            Place::AllowList,
            policy.workers.directory.iter().cloned().collect(),
        ),
        (Place::Programs, programs),
        (Place::Disks, disks),
        (Place::StateFiles, directories(STATE).collect()),
        (
            Place::Vsock,
            vm.vsock
                .iter()
                .filter_map(|vsock| parent(&vsock.socket))
                .collect(),
        ),
        (Place::Channels, channels.collect()),
    ]))
}

/// The directory that a file is named in, and the one that it lies in if a link leads there.
fn around(path: &Path) -> Vec<PathBuf> {
    let resolved = path.canonicalize().ok();
    let mut all: Vec<PathBuf> = [Some(path), resolved.as_deref()]
        .into_iter()
        .flatten()
        .filter_map(parent)
        .collect();
    all.dedup();
    all
}

fn parent(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.parent().map(Path::to_owned)
}
