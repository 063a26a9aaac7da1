//! `baton policy explain`: what a policy lets workers do, and what one VM would be granted before it runs.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_policy::Declaration;
use baton_policy::Digest;
use baton_policy::Policy;
use baton_policy::Syscall;
use baton_policy::WorkerAllowList;
use baton_policy::diff::Difference;
use baton_policy::signature;
use baton_policy::vm_plan::Holder;
use baton_policy::vm_plan::Verdict;
use baton_policy::vm_plan::VmExplanation;
use baton_policy::vm_plan::VmPlan;
use serde_json::json;

use super::policy::BUILT_IN;
use super::policy::load;
use super::policy::value;
use crate::arguments::Explain;
use crate::broker_binary;
use crate::failure::failure;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::output::printable;

/// The longest plan that is read, in bytes: a VM of the most devices has one of some 20 KiB.
const MAX_PLAN: usize = 1 << 20;

pub(crate) fn execute(explain: &Explain, output: &Output) -> Result<Exit, Refusal> {
    let Explain { file, vm, syscall } = explain;
    if let Some(vm) = vm {
        return of_vm(vm, file.as_deref(), output);
    }
    let policy = load(file.as_deref().unwrap_or(Path::new(BUILT_IN)))?;
    match syscall {
        Some(name) => of_call(&policy, name, output),
        None => {
            let explanation = policy.explain();
            if output.json() {
                output.document(&value(&explanation)?)?;
            } else {
                output.text(printable(&explanation.to_string()).trim_end())?;
            }
            Ok(Exit::Done)
        }
    }
}

fn of_call(policy: &Policy, name: &str, output: &Output) -> Result<Exit, Refusal> {
    let call = Syscall::from_name(name).ok_or_else(|| {
        failure(
            Exit::Usage,
            format!("there is no system call {name:?}"),
            "use the names of the kernel's table for x86-64, as `baton policy explain` prints them",
        )
    })?;
    let explanation = policy.explain_call(call);
    if output.json() {
        output.document(&value(&explanation)?)?;
    } else {
        output.text(printable(&explanation.to_string()).trim_end())?;
    }
    Ok(Exit::Done)
}

/// What a VM would be granted by its own policy, or by this one.
fn of_vm(file: &Path, policy: Option<&Path>, output: &Output) -> Result<Exit, Refusal> {
    let plan = plan(file)?;
    let policy = load(policy.unwrap_or(&plan.policy))?;
    let explanation = policy.explain_vm(&plan);
    let worker = Worker::look(&plan, &policy);
    if output.json() {
        let mut document = value(&explanation)?;
        if let Some(object) = document.as_object_mut() {
            let judged =
                json!({"path": plan.worker, "allowed": worker.allowed, "says": worker.says});
            object.insert("worker".to_owned(), judged);
        }
        output.document(&document)?;
    } else {
        output.text(&text(&explanation, &worker, output))?;
    }
    Ok(
        if explanation.is_refused() || worker.allowed == Some(false) {
            Exit::Refused
        } else if explanation.is_unfit() || worker.allowed.is_none() {
            Exit::Unfit
        } else {
            Exit::Done
        },
    )
}

/// What the broker says that a VM file comes to.
fn plan(file: &Path) -> Result<VmPlan, Refusal> {
    let broker = broker_binary::find()?;
    let cannot = |error: &dyn std::fmt::Display| {
        let what = format!(
            "cannot ask {} what the VM comes to: {error}",
            broker.display()
        );
        unfit(what, "install the baton-broker of this build")
    };
    let answer = Command::new(&broker)
        .arg("plan")
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| cannot(&error))?;
    if answer.stdout.len() > MAX_PLAN {
        return Err(cannot(&"its answer is too long"));
    }
    serde_json::from_slice::<Result<VmPlan, Refusal>>(&answer.stdout)
        .map_err(|error| cannot(&error))?
}

/// The worker that would run first.
struct Worker {
    /// Whether it is on the allow-list; none when nobody can tell.
    allowed: Option<bool>,
    /// That, and what its build needs, in sentences.
    says: Vec<String>,
}

impl Worker {
    fn look(plan: &VmPlan, policy: &Policy) -> Self {
        let path = plan.worker.display();
        let unknown = |error: &dyn std::fmt::Display| Self {
            allowed: None,
            says: vec![format!("The worker {path} cannot be judged: {error}.")],
        };
        let digest = File::open(&plan.worker).and_then(|mut file| Digest::of_reader(&mut file));
        let digest = match digest {
            Ok(digest) => digest,
            Err(error) => return unknown(&error),
        };
        let beside = plan.worker_is_beside.then_some(digest);
        let list = match WorkerAllowList::load(policy, beside) {
            Ok(list) => list,
            Err(error) => return unknown(&error),
        };
        let (allowed, why) = match list.source(&digest) {
            Some(source) => (true, format!("may run: {source}")),
            None => match signed(&plan.worker, policy) {
                Ok(key) => (true, format!("may run: {key} has signed it")),
                Err(why) => (
                    false,
                    format!("may not run: it is not on the policy's allow-list{why}"),
                ),
            },
        };
        let mut says = vec![format!("The worker {path}, {digest}, {why}.")];
        says.extend(needs(&plan.worker, policy));
        Self {
            allowed: Some(allowed),
            says,
        }
    }
}

/// The key of the policy that has signed a worker; or what is to be said of its signature, if there is one.
fn signed(worker: &Path, policy: &Policy) -> Result<String, String> {
    let mut beside = worker.as_os_str().to_owned();
    beside.push(signature::SUFFIX);
    let files = File::open(beside).and_then(|signature| Ok((signature, File::open(worker)?)));
    match files {
        Ok((signature, mut binary)) if !policy.workers.keys.is_empty() => {
            signature::signer(&policy.workers.keys, signature, &mut binary)
                .map(ToString::to_string)
                .map_err(|error| format!(", and {error}"))
        }
        _ => Err(String::new()),
    }
}

/// What a build declares that it needs beyond the policy.
fn needs(worker: &Path, policy: &Policy) -> Option<String> {
    let declared = Declaration::read(&File::open(worker).ok()?).map(|one| one.policy);
    let declared = match declared {
        Ok(declared) => declared,
        Err(error) => return Some(format!("It does not declare what it needs: {error}.")),
    };
    let difference = Difference::between(policy, &declared);
    let more: Vec<String> = difference
        .widens_a_worker()
        .map(ToString::to_string)
        .collect();
    Some(match more.is_empty() {
        true => "It declares no need that the policy does not grant.".to_owned(),
        false => format!(
            "It declares needs that the policy does not grant: {}.",
            more.join("; ")
        ),
    })
}

fn text(explanation: &VmExplanation, worker: &Worker, output: &Output) -> String {
    let mut table = Table::new(&["DESCRIPTOR", "KIND", "ACCESS", "FROM", "FOR", "BECAUSE"]);
    for one in &explanation.descriptors {
        let planned = &one.planned;
        let from = planned.path.as_ref().map_or_else(
            || "made by the broker".to_owned(),
            |path| path.display().to_string(),
        );
        let purpose = match planned.holder {
            Holder::Worker => planned.purpose.clone(),
            Holder::Broker => format!("{}; no worker has it", planned.purpose),
        };
        let (style, because) = match &one.verdict {
            Verdict::Granted { why, line } => (None, format!("{why} (line {line})")),
            Verdict::Refused { because } => (Some(Style::Bad), format!("refused: {because}")),
            Verdict::Unfit => {
                let obstacle = planned.obstacle.as_deref().unwrap_or_default();
                (Some(Style::Warning), format!("not there: {obstacle}"))
            }
        };
        table.row(vec![
            (Some(Style::Strong), planned.to_string()),
            (None, planned.kind.to_string()),
            (None, planned.access.to_string()),
            (None, from),
            (None, purpose),
            (style, because),
        ]);
    }
    let sentences = explanation.process.iter().chain(&worker.says);
    let mut lines: Vec<String> = sentences.map(|one| printable(one)).collect();
    lines.push("\nDescriptors at its start:".to_owned());
    lines.push(table.draw(output));
    lines.push("\nWhat could come to a worker later:".to_owned());
    lines.extend(
        explanation
            .later
            .iter()
            .map(|one| format!("  {}", printable(one))),
    );
    lines.push(String::new());
    lines.push(printable(explanation.explanation.to_string().trim_end()));
    lines.join("\n")
}
