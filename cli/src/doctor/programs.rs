//! The broker and the worker: where they are, and whether they can run as they have to.

use std::path::Path;

use crate::broker_binary;
use crate::doctor::Check;
use crate::doctor::elf;
use crate::doctor::elf::Program;

pub(super) fn examine(worker: Option<&Path>) -> Vec<Check> {
    let broker = match broker_binary::find() {
        Ok(broker) => broker,
        Err(refusal) => return vec![Check::missing("broker", refusal.reason, refusal.remedy)],
    };
    let beside = broker.with_file_name("baton-worker");
    vec![
        program("broker", &broker),
        program("worker", worker.unwrap_or(&beside)),
    ]
}

fn program(id: &'static str, path: &Path) -> Check {
    let shown = path.display();
    let build = format!("install it, or build it: cargo build --release -p baton-{id}");
    match elf::classify(path) {
        Err(error) => Check::missing(id, format!("{shown}: {error}"), build),
        Ok(Program::Static) => Check::ok(id, format!("{shown}, static")),
        // It runs all the same; a script around it is somebody's choice.
        Ok(Program::Dynamic | Program::Other) if id == "broker" => Check::warn(
            id,
            format!("{shown} is no static program: more than this file has to be trusted"),
            build,
        ),
        Ok(Program::Dynamic) => Check::missing(
            id,
            format!("{shown} is linked with shared libraries, and its root is empty"),
            "build it with -C target-feature=+crt-static",
        ),
        Ok(Program::Other) => Check::missing(id, format!("{shown} is no x86-64 program"), build),
    }
}

#[cfg(test)]
mod tests {
    use crate::doctor::Level;

    use super::*;

    #[test]
    fn a_worker_has_to_be_static() {
        let me = std::env::current_exe().unwrap();
        assert_eq!(program("worker", &me).level, Level::Ok);
        assert_eq!(
            program("worker", Path::new("/bin/sh")).level,
            Level::Missing
        );
        assert_eq!(program("broker", Path::new("/bin/sh")).level, Level::Warn);
        assert_eq!(
            program("worker", Path::new("/etc/passwd")).level,
            Level::Missing
        );
        assert_eq!(
            program("worker", Path::new("/nonexistent")).level,
            Level::Missing
        );
    }
}
