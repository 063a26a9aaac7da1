//! Who may ask a broker for what: root and its own user for everything, others for what policy gives them, and whoever is
//! refused is in the log.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use baton_ipc::Address;
use baton_ipc::FileAddress;
use baton_ipc::control::Exit;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_tests::Answer;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::petitioner;
use baton_tests::until;

/// A user and a group that nobody else in these tests is.
const OPERATOR: u32 = 65_001;
const STRANGER: u32 = 65_002;
const GROUP: u32 = 65_010;

const RULES: &str = "
[[access]]
to = [\"view\"]
groups = [65010]
why = \"monitoring\"
[[access]]
to = [\"power\"]
users = [65001]
why = \"operators\"
";

fn vm(rules: &str) -> Vm {
    let text = format!(
        "{}\n{rules}",
        fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../policy/default.toml"
        ))
        .unwrap()
    );
    Builder::release().policy(&text).start_in(|site| {
        // The test's own directory is closed to others, which is not what this is about.
        fs::set_permissions(site.path(""), fs::Permissions::from_mode(0o711)).unwrap();
    })
}

fn ask_as(vm: &Vm, user: u32, group: u32, words: &[&str]) -> Answer {
    // A copy that everybody may execute, wherever the build lies.
    let program = vm.site.path("baton-for-all");
    fs::copy(vm.site.binaries().baton(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let output = std::process::Command::new(program)
        .arg("--run-dir")
        .arg(vm.site.run_dir())
        .arg("--json")
        .args(words)
        .uid(user)
        .gid(group)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Answer::of(&output)
}

#[test]
fn policy_says_who_may_see_and_who_may_pause() {
    let vm = vm(RULES);
    let name = vm.site.name.as_str();
    let viewer = |words: &[&str]| ask_as(&vm, STRANGER, GROUP, words);
    let operator = |words: &[&str]| ask_as(&vm, OPERATOR, OPERATOR, words);
    viewer(&["status", name]).expect(0);
    viewer(&["audit", name]).expect(0);
    let refused = viewer(&["pause", name]).expect(30);
    assert!(
        refused.stderr.contains("does not let user 65002"),
        "{refused:?}"
    );
    viewer(&["stop", "--force", name]).expect(30);
    operator(&["pause", name]).expect(0);
    operator(&["resume", name]).expect(0);
    operator(&["status", name]).expect(30);
    operator(&["upgrade", name]).expect(30);
    // Who has no right at all is not even greeted.
    assert_ne!(
        ask_as(&vm, STRANGER, STRANGER, &["status", name]).code,
        Some(0)
    );
    // Nobody sees more of the directory than the socket.
    for file in ["state.json", "lock"] {
        let path = vm.site.run_dir().join(name).join(file);
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file}");
    }
    vm.assert_upgrades();
    let log = vm.audit_log();
    let refused: Vec<String> = log
        .of("request-refused")
        .map(|record| {
            let text = |pointer| record.record.pointer(pointer).unwrap().as_str().unwrap();
            format!("{} {}", text("/actor/user/uid"), text("/unmapped/request"))
        })
        .collect();
    assert_eq!(
        refused,
        ["65002 pause", "65002 stop", "65001 status", "65001 upgrade"]
    );
}

#[test]
fn who_may_upgrade_may_not_approve_of_what_an_upgrade_widens() {
    let may = |rights: &str| {
        vm(&format!(
            "[[access]]\nto = [{rights}]\nusers = [{OPERATOR}]\nwhy = \"operators\"\n"
        ))
    };
    let approving = |vm: &Vm| {
        let words = ["upgrade", &vm.site.name, "--approve", "a test"];
        ask_as(vm, OPERATOR, OPERATOR, &words)
    };
    let upgrades_only = may("\"upgrade\"");
    let refused = approving(&upgrades_only).expect(30);
    assert!(
        refused.stderr.contains("the right `approve`"),
        "{refused:?}"
    );
    drop(upgrades_only);
    let both = may("\"upgrade\", \"approve\"");
    assert_eq!(approving(&both).upgrade().outcome, "committed");
}

/// Asks as the operator, and says of which right the broker's refusal speaks; none: it is none of policy's.
fn lacks(vm: &Vm, request: Request) -> Option<String> {
    let socket = vm.site.run_dir().join(&vm.site.name).join("control.sock");
    match ask_as_operator(&socket, request) {
        Reply::Refused(refusal) if refusal.exit == Exit::Refused => {
            let (_, rest) = refusal.remedy.split_once("the right `")?;
            rest.split_once('`').map(|(right, _)| right.to_owned())
        }
        _ => None,
    }
}

fn ask_as_operator(socket: &Path, request: Request) -> Reply {
    petitioner::ask_as(OPERATOR, socket, request)
}

/// What takes a guest from this broker, or to it.
fn transfers(vm: &Vm) -> [Request; 4] {
    let address = |name: &str| -> Address {
        let path = vm.site.path(name);
        format!("unix:{}", path.display()).parse().unwrap()
    };
    let file: FileAddress = vm.site.path("state").display().to_string().parse().unwrap();
    [
        Request::Transfer {
            main: address("main"),
            cpr: address("cpr"),
            hold: false,
            follow: false,
        },
        Request::Incoming {
            main: address("main"),
        },
        Request::Save {
            file: file.clone(),
            hold: false,
        },
        Request::Restore { file },
    ]
}

#[test]
fn who_may_upgrade_may_not_give_the_guest_away_and_the_other_way_round() {
    let upgrades = vm(&format!(
        "[[access]]\nto = [\"view\", \"power\", \"upgrade\", \"devices\", \"approve\"]\nusers = [{OPERATOR}]\nwhy = \"operators\"\n"
    ));
    for request in transfers(&upgrades) {
        let words = format!("{request:?}");
        assert_eq!(
            lacks(&upgrades, request).as_deref(),
            Some("transfer"),
            "{words}"
        );
    }
    assert_eq!(upgrades.state(), "running");
    let log = upgrades.audit_log();
    let request = |record: &baton_tests::Record| {
        let name = record.record.pointer("/unmapped/request").unwrap();
        name.as_str().unwrap().to_owned()
    };
    let refused: Vec<String> = log.of("request-refused").map(request).collect();
    assert_eq!(refused, ["transfer", "incoming", "save", "restore"]);
    drop(upgrades);

    let transfers_only = vm(&format!(
        "[[access]]\nto = [\"transfer\"]\nusers = [{OPERATOR}]\nwhy = \"operators\"\n"
    ));
    for request in [
        Request::Upgrade { dry_run: false },
        Request::BeginUpgrade { hold: false },
    ] {
        assert_eq!(lacks(&transfers_only, request).as_deref(), Some("upgrade"));
    }
    assert_eq!(
        lacks(&transfers_only, Request::Status).as_deref(),
        Some("view")
    );
    // Nobody listens where it would go: past policy, it fails by that.
    for request in transfers(&transfers_only) {
        let words = format!("{request:?}");
        assert_eq!(lacks(&transfers_only, request), None, "{words}");
        // A transfer that has begun has to be over before the next one.
        until("the guest runs on", || {
            (transfers_only.state() == "running").then_some(())
        });
    }
    transfers_only.assert_upgrades();
}

#[test]
fn who_may_transfer_hands_the_guest_to_a_broker_that_waits() {
    let mut vm = vm(&format!(
        "[[access]]\nto = [\"transfer\"]\nusers = [{OPERATOR}]\nwhy = \"operators\"\n"
    ));
    let first = vm.witness();
    let waiting = vm.wait_for_guest();
    let address = |path: &Path| -> Address { format!("unix:{}", path.display()).parse().unwrap() };
    let request = Request::Transfer {
        main: address(&waiting.main),
        cpr: address(&waiting.cpr),
        hold: false,
        follow: false,
    };
    assert_eq!(lacks(&vm, request), None);
    vm.assert_taken_over(&waiting);
    let _on = vm.assert_goes_on(&first);
}

#[test]
fn without_rules_nobody_else_gets_in() {
    let vm = vm("");
    let name = vm.site.name.as_str();
    assert_ne!(
        ask_as(&vm, OPERATOR, GROUP, &["status", name]).code,
        Some(0)
    );
    let mode = fs::metadata(vm.site.run_dir().join(name))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0);
}
