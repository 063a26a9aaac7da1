//! What policy says, read anew for each worker, so that a new build or a new policy needs no restart of the broker.

use std::fs::File;
use std::path::PathBuf;

use baton_policy::Digest;
use baton_policy::Policy;
use baton_policy::WorkerAllowList;
use baton_policy::diff::Difference;
use baton_policy::diff::Direction;

use crate::binary::WorkerBinary;
use crate::broker::Options;
use crate::broker::Rules;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
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
    let beside = beside_broker("baton-worker")?;
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

/// Refuses a policy under which a worker may do more than the one before it could. Which binaries may run is not among that:
/// it is how a new build is permitted. Neither is a call that another thread of the worker had already, since its threads
/// share their memory.
pub(crate) fn refuse_widening(old: &Policy, new: &Policy) -> Result<()> {
    let widening: Vec<String> = Difference::between(old, new)
        .changes
        .into_iter()
        .filter(|change| change.direction == Direction::Widens)
        // Who may ask the broker is not a worker's privilege.
        .filter(|change| change.subject != "access")
        .filter(|change| change.subject != "workers" && change.elsewhere != Some(true))
        .map(|change| change.to_string())
        .collect();
    if widening.is_empty() {
        return Ok(());
    }
    Err(refused(
        format_args!(
            "the policy now permits a worker more than the running one: {}",
            widening.join("; ")
        ),
        "`baton policy diff` shows all of it; stop and start the VM to run it under the wider policy",
    ))
}

/// The path of a program that is installed with the broker.
pub(crate) fn beside_broker(program: &str) -> Result<PathBuf> {
    let mut path = std::env::current_exe().doing("cannot find the broker's own place")?;
    path.set_file_name(program);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wider_policy_is_refused_and_a_new_build_is_not() {
        let parse = |text: &str| Policy::parse(text, "test").unwrap();
        let old = parse(baton_policy::BUILTIN);
        let digest = Digest::of(b"another build");
        let new_build = baton_policy::BUILTIN
            .replace("digests = []", &format!("digests = [\"sha256:{digest}\"]"));
        refuse_widening(&old, &parse(&new_build)).unwrap();
        let wider = baton_policy::BUILTIN.replace("nofile = 1024", "nofile = 4096");
        let refusal = refuse_widening(&old, &parse(&wider)).unwrap_err();
        assert_eq!(refusal.exit, baton_ipc::control::Exit::Refused);
        assert!(refusal.reason.contains("nofile"), "{refusal}");
        refuse_widening(&parse(&wider), &old).unwrap();
    }
}
