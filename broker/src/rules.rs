//! What policy says, read anew for each worker, so that a new build or a new policy needs no restart of the broker.

use std::fs::File;
use std::path::PathBuf;

use baton_policy::Digest;
use baton_policy::Policy;
use baton_policy::WorkerAllowList;

use crate::binary::WorkerBinary;
use crate::broker::Options;
use crate::broker::Rules;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::vm_file::VmFile;

/// Reads and compiles the VM's policy. A file has to belong to root or this user, and nobody else may write it.
pub(crate) fn load(vm: &VmFile) -> Result<Rules> {
    let remedy = "`baton policy check` explains what is wrong";
    let policy = if vm.policy.as_os_str() == "default" {
        Policy::builtin()
    } else {
        Policy::load(&vm.policy)
    }
    .map_err(|e| unfit(e, remedy))?;
    let compiled = policy.compile().map_err(|e| unfit(e, remedy))?;
    Ok(Rules { policy, compiled })
}

/// Opens, checks and seals the worker that is to run: the one given, else the one that the VM names, else the one beside the
/// broker.
pub(crate) fn worker_binary(
    vm: &VmFile,
    options: &Options,
    policy: &Policy,
    given: Option<File>,
) -> Result<WorkerBinary> {
    let beside = beside_broker()?;
    let named = options
        .worker
        .as_ref()
        .or(vm.worker.as_ref())
        .unwrap_or(&beside);
    let is_beside = given.is_none() && *named == beside;
    let file = given.map_or_else(|| WorkerBinary::open(named), Ok)?;
    WorkerBinary::admit(file, |digest| {
        // The one beside the broker is read only once, when it is the one to run.
        let beside = if is_beside {
            Some(*digest)
        } else {
            File::open(&beside)
                .ok()
                .and_then(|mut file| Digest::of_reader(&mut file).ok())
        };
        WorkerAllowList::load(policy, beside)
            .map(|allowed| allowed.permits(digest))
            .doing("cannot read the allow-list of workers")
    })
}

fn beside_broker() -> Result<PathBuf> {
    let mut path = std::env::current_exe().doing("cannot find the broker's own place")?;
    path.set_file_name("baton-worker");
    Ok(path)
}
