//! Clients that know nothing of Baton drive an upgrade: PyPI's `qemu.qmp`, its `qmp-shell`, and the Rust crate `qapi`.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::until;
use qapi::Qmp;
use qapi::qmp;

/// A program of the Python environment that `tests/run` makes.
fn client(program: &str) -> PathBuf {
    let named = std::env::var_os("BATON_QMP_CLIENTS").map(PathBuf::from);
    let me = std::env::current_exe().unwrap();
    // TARGET_DIR/TRIPLE/PROFILE/deps/this
    let directory = named.unwrap_or_else(|| me.ancestors().nth(4).unwrap().join("qmp-clients/bin"));
    let path = directory.join(program);
    assert!(
        path.exists(),
        "there is no {}; make it with\n  python3 -m venv {0} && {0}/bin/pip install qemu.qmp==0.0.6\nor name its bin in BATON_QMP_CLIENTS",
        directory.parent().unwrap().display(),
    );
    path
}

fn socket(vm: &Vm) -> PathBuf {
    vm.site.run_dir().join(&vm.site.name).join("qmp.sock")
}

#[test]
fn qemus_python_library_drives_an_upgrade() {
    let python = client("python");
    let vm = Builder::release().start();
    let guest = vm.witness();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/upgrade.py");
    let output = Command::new(python)
        .arg(script)
        .arg(socket(&vm))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(vm.generation(), 2);
    vm.assert_goes_on(&guest);
}

#[test]
fn qemus_python_library_goes_the_whole_way_to_another_broker() {
    let python = client("python");
    let mut vm = Builder::release().start();
    let guest = vm.witness();
    let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
    let directory = format!("{}.incoming", vm.site.name);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/transfer.py");
    let output = Command::new(python)
        .arg(script)
        .arg(socket(&vm))
        .arg(vm.site.run_dir().join(directory).join("qmp.sock"))
        .args([&waiting.main, &waiting.cpr])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    vm.assert_taken_over(&waiting);
    assert_eq!(vm.generation(), 2);
    vm.assert_goes_on(&guest);
}

#[test]
fn qmp_shell_drives_an_upgrade() {
    let shell = client("qmp-shell");
    let vm = Builder::release().start();
    let guest = vm.witness();
    let mut shell = Command::new(shell)
        .arg(socket(&vm))
        .env("HOME", vm.site.run_dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = shell.stdin.take().unwrap();
    input
        .write_all(b"query-status\nmigrate-set-parameters mode=cpr-transfer\nmigrate\n")
        .unwrap();
    until("the worker is replaced", || {
        (vm.generation() == 2).then_some(())
    });
    drop(input);
    let output = shell.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("\"status\": \"running\""), "{text}");
    assert!(!text.contains("\"error\""), "{text}");
    let _ = std::fs::remove_file(vm.site.run_dir().join(".qmp-shell_history"));
    vm.assert_goes_on(&guest);
}

#[test]
fn the_rust_client_drives_an_upgrade_and_understands_every_answer() {
    let vm = Builder::release().start();
    let guest = vm.witness();
    let stream = UnixStream::connect(socket(&vm)).unwrap();
    let mut client = Qmp::from_stream(&stream);
    client.handshake().unwrap();
    assert!(client.execute(&qmp::query_status {}).unwrap().running);
    assert_eq!(client.execute(&qmp::query_cpus_fast {}).unwrap().len(), 1);
    client.execute(&qmp::query_version {}).unwrap();
    client.execute(&qmp::query_commands {}).unwrap();
    client.execute(&qmp::query_block {}).unwrap();
    client.execute(&qmp::query_memory_size_summary {}).unwrap();
    // Its own types are older than the mode.
    let set = qmp::human_monitor_command {
        command_line: "migrate_set_parameter mode cpr-transfer".into(),
        cpu_index: None,
    };
    assert_eq!(client.execute(&set).unwrap(), "");
    let migrate = qmp::migrate {
        uri: None,
        channels: None,
        detach: Some(true),
        resume: None,
    };
    client.execute(&migrate).unwrap();
    until("the migration is completed", || {
        let info = client.execute(&qmp::query_migrate {}).unwrap();
        (info.status == Some(qmp::MigrationStatus::completed)).then_some(())
    });
    assert_eq!(vm.generation(), 2);
    let events: Vec<_> = client.events().collect();
    assert!(
        events
            .iter()
            .any(|event| matches!(event, qmp::Event::RESUME { .. })),
        "{events:?}"
    );
    vm.assert_goes_on(&guest);
}
