//! `baton policy`: reads policies, without a VM and without privilege.

use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::path::Path;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_policy::Compiled;
use baton_policy::Declaration;
use baton_policy::Policy;
use baton_policy::check;
use baton_policy::diff::Difference;
use baton_policy::diff::Direction;
use baton_policy::exercise::Exercise;
use serde::Serialize;
use serde_json::Value;
use serde_json::json;

use crate::arguments::DumpFormat;
use crate::arguments::Globals;
use crate::arguments::Lint;
use crate::arguments::PolicyCommand;
use crate::failure::failure;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;
use crate::output::printable;

/// What stands for the built-in policy, as in a VM's description.
pub(super) const BUILT_IN: &str = "default";

pub(crate) fn execute(
    globals: &Globals,
    command: &PolicyCommand,
    output: &Output,
) -> Result<Exit, Refusal> {
    match command {
        PolicyCommand::Check { file } => check(file, output),
        PolicyCommand::Explain(explain) => super::explain::execute(explain, output),
        PolicyCommand::Diff { old, new } => diff(old, new, output),
        PolicyCommand::Learn(learn) => super::learn::execute(globals, learn, output),
        PolicyCommand::Lint(command) => lint(command, output),
        PolicyCommand::Dump {
            file,
            format,
            role,
            index,
        } => dump(file, *format, role.as_deref(), *index, output),
    }
}

/// A policy for a comparison: that of a file, or the one that a worker's build declares.
fn load_either(file: &Path) -> Result<Policy, Refusal> {
    let is_elf = |mut file: File| {
        let mut magic = [0; 4];
        file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF"
    };
    if file.as_os_str() == BUILT_IN || !File::open(file).is_ok_and(is_elf) {
        return load(file);
    }
    let binary = File::open(file).map_err(|error| crate::failure::file("open", file, &error))?;
    Declaration::read(&binary)
        .map(|declaration| declaration.policy)
        .map_err(|error| {
            unfit(
                format!("{}: {error}", file.display()),
                "name a worker's binary, or a policy file",
            )
        })
}

pub(super) fn load(file: &Path) -> Result<Policy, Refusal> {
    let policy = if file.as_os_str() == BUILT_IN {
        Policy::builtin()
    } else {
        Policy::load(file)
    };
    // The error's text has the line, a caret and what to do.
    policy.map_err(|error| {
        let remedy = match is_vm_file(file) {
            true => {
                "this is a VM file: `baton policy explain --vm` says what that VM would be granted"
            }
            false => "",
        };
        unfit(error.to_string(), remedy)
    })
}

/// Whether it describes a VM: it has tables that no policy has.
fn is_vm_file(file: &Path) -> bool {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let document: Result<toml::Table, _> = text.parse();
    document.is_ok_and(|one| one.contains_key("boot") && one.contains_key("memory"))
}

fn compile(policy: &Policy) -> Result<Compiled, Refusal> {
    policy
        .compile()
        .map_err(|error| unfit(error.to_string(), ""))
}

pub(super) fn value(serializable: &impl Serialize) -> Result<Value, Refusal> {
    serde_json::to_value(serializable)
        .map_err(|error| unfit(format!("cannot print this as JSON: {error}"), ""))
}

fn check(file: &Path, output: &Output) -> Result<Exit, Refusal> {
    let fitness = check::policy(&load(file)?).map_err(|error| unfit(error.to_string(), ""))?;
    if output.json() {
        output.document(&value(&fitness)?)?;
        return Ok(Exit::Done);
    }
    let instructions: Vec<String> = fitness
        .instructions
        .iter()
        .map(|(role, count)| format!("{role} {count}"))
        .collect();
    let mut lines = vec![
        format!(
            "{}: {}; sha256 {}",
            file.display(),
            output.paint(Style::Good, "fit for use"),
            fitness.digest
        ),
        format!(
            "filters: sha256 {}; instructions: {}",
            fitness.filters_digest,
            instructions.join(", ")
        ),
    ];
    lines.extend(
        fitness
            .advice
            .iter()
            .map(|advice| printable(&advice.to_string()))
            .map(|advice| format!("{} {advice}", output.paint(Style::Warning, "consider"))),
    );
    output.text(&lines.join("\n"))?;
    Ok(Exit::Done)
}

fn diff(old: &Path, new: &Path, output: &Output) -> Result<Exit, Refusal> {
    let difference = Difference::between(&load_either(old)?, &load_either(new)?);
    let widens = difference.widens();
    if output.json() {
        output.document(&json!({
            "widens": widens,
            "changes": value(&difference.changes)?,
        }))?;
    } else {
        let lines = difference.changes.iter().map(|change| {
            let style = match change.direction {
                Direction::Widens => Style::Bad,
                Direction::Narrows => Style::Good,
                Direction::Alters => Style::Warning,
            };
            output.paint(style, &printable(&change.to_string()))
        });
        let lines: Vec<String> = lines.collect();
        if lines.is_empty() {
            output.hint("they permit the same");
        } else {
            output.text(&lines.join("\n"))?;
            if !widens {
                output.hint("a worker may not do more than before: its privilege is the union over its threads");
            }
        }
    }
    Ok(if widens { Exit::Findings } else { Exit::Done })
}

fn lint(lint: &Lint, output: &Output) -> Result<Exit, Refusal> {
    let policy = load(&lint.file)?;
    let found = policy.lint();
    let exercise = match &lint.exercised {
        None => Exercise::builtin(),
        Some(file) => {
            let text = std::fs::read_to_string(file);
            Exercise::recorded(&text.map_err(|error| crate::failure::file("read", file, &error))?)
        }
    };
    let exercise = exercise.map_err(|error| {
        unfit(
            error.to_string(),
            "name a recording of `baton policy learn --record`",
        )
    })?;
    let (kept, unexercised): (Vec<_>, Vec<_>) = exercise
        .unexercised(&policy)
        .into_iter()
        .partition(|one| one.kept.is_some());
    let clean = found.is_empty() && unexercised.is_empty();
    if output.json() {
        output.document(&json!({
            "lints": value(&found)?,
            "unexercised": value(&unexercised)?,
            "kept": value(&kept)?,
        }))?;
    } else {
        let mut lines: Vec<String> = found.iter().map(ToString::to_string).collect();
        let shown = if lint.kept { kept.as_slice() } else { &[] };
        lines.extend(unexercised.iter().chain(shown).map(ToString::to_string));
        if !lines.is_empty() {
            output.text(&lines.join("\n"))?;
        }
        if clean {
            output.hint("nothing could be left out");
        }
        if !lint.kept && !kept.is_empty() {
            let count = kept.len();
            output.hint(&format!(
                "{count} that no test exercises stay for a reason: --kept"
            ));
        }
    }
    Ok(if clean { Exit::Done } else { Exit::Findings })
}

fn dump(
    file: &Path,
    format: DumpFormat,
    role: Option<&str>,
    index: usize,
    output: &Output,
) -> Result<Exit, Refusal> {
    let policy = load(file)?;
    let compiled = compile(&policy)?;
    match format {
        // --json is the format, too: one document either way.
        _ if output.json() => output.document(&value(&policy.document(&compiled))?)?,
        DumpFormat::Json => output.document(&value(&policy.document(&compiled))?)?,
        DumpFormat::Text => output.text(compiled.disassemble().trim_end())?,
        DumpFormat::Disasm => output.text(listings(&compiled).trim_end())?,
        DumpFormat::Bpf => bpf(&compiled, role, index)?,
    }
    Ok(Exit::Done)
}

/// Every filter as seccomp-tools writes it, each under a heading.
fn listings(compiled: &Compiled) -> String {
    compiled
        .filters()
        .map(|filter| {
            let listing = baton_policy::disasm::listing(filter.program);
            format!("{}, filter {}\n{listing}\n", filter.role, filter.index)
        })
        .collect()
}

/// One filter as the kernel takes it, `struct sock_filter` by `struct sock_filter`.
fn bpf(compiled: &Compiled, role: Option<&str>, index: usize) -> Result<(), Refusal> {
    let known: Vec<String> = compiled
        .filters()
        .map(|filter| format!("--role {} --index {}", filter.role, filter.index))
        .collect();
    let choose = |reason: String| {
        failure(
            Exit::Usage,
            reason,
            format!("choose one of: {}", known.join(", ")),
        )
    };
    let role = role.ok_or_else(|| choose("--format bpf writes one filter".to_owned()))?;
    let filter = compiled
        .filters()
        .find(|filter| filter.role.to_string() == role && filter.index == index)
        .ok_or_else(|| choose(format!("there is no filter {index} of role {role:?}")))?;
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(filter.program.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| unfit(format!("cannot write the filter: {error}"), ""))
}
