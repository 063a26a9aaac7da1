//! `baton audit`: whether a running VM is confined as its policy says, from the kernel's own records.

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

use crate::arguments::Audit;
use crate::arguments::Globals;
use crate::failure::severity;
use crate::output::Output;
use crate::report;
use crate::report::Audited;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::run_dir::VmDirectory;

pub(crate) fn execute(globals: &Globals, asked: &Audit, output: &Output) -> Result<Exit, Refusal> {
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    let audits = match &asked.vm {
        Some(vm) => vec![audited(&run_dir, &run_dir.vm(vm)?)?],
        None => return execute_all(&run_dir, asked, output),
    };
    files(asked, &audits)?;
    for audited in &audits {
        let report = &audited.report;
        if output.json() {
            output.document(&report::document(report)?)?;
        } else {
            output.text(&report::table(&audited.vm, report, output))?;
        }
    }
    Ok(worst(&audits))
}

/// Every VM here. One that cannot be audited hides none of the others, and is no success.
fn execute_all(run_dir: &RunDir, asked: &Audit, output: &Output) -> Result<Exit, Refusal> {
    let mut audits = Vec::new();
    let mut documents = Vec::new();
    let mut exit = Exit::Done;
    for directory in run_dir.all()? {
        if matches!(directory.look(), Ok(Found::Stale | Found::Absent)) {
            continue;
        }
        match audited(run_dir, &directory) {
            Ok(audited) => {
                let mut document = report::document(&audited.report)?;
                if let Some(document) = document.as_object_mut() {
                    document.insert("name".to_owned(), json!(audited.vm));
                }
                documents.push(document);
                audits.push(audited);
            }
            Err(refusal) => {
                output.complain(&refusal);
                documents.push(
                    json!({"name": directory.name(), "error": crate::output::error(&refusal)}),
                );
                exit = refusal.exit;
            }
        }
    }
    files(asked, &audits)?;
    if output.json() {
        output.document(&Value::Array(documents))?;
    } else if audits.is_empty() {
        output.hint(&format!("no VM runs in {}", run_dir.path().display()));
    } else {
        let sections = audits
            .iter()
            .map(|audited| report::table(&audited.vm, &audited.report, output));
        let between = if output.terminal() { "\n\n" } else { "\n" };
        output.text(&sections.collect::<Vec<_>>().join(between))?;
    }
    let found = worst(&audits);
    Ok(if severity(found) > severity(exit) {
        found
    } else {
        exit
    })
}

fn audited(run_dir: &RunDir, directory: &VmDirectory) -> Result<Audited, Refusal> {
    let report = directory.broker()?.audit()?;
    Ok(Audited::new(run_dir, directory.name(), report))
}

fn worst(audits: &[Audited]) -> Exit {
    if audits.iter().all(Audited::is_proven) {
        Exit::Done
    } else {
        Exit::Findings
    }
}

fn files(asked: &Audit, audits: &[Audited]) -> Result<(), Refusal> {
    if let Some(path) = &asked.sarif {
        report::write(path, &format!("{:#}\n", report::log(audits)))?;
    }
    if let Some(path) = &asked.html {
        report::write(path, &report::page(audits))?;
    }
    Ok(())
}
