//! A broker of an ordinary user who may open `/dev/kvm` runs a VM, upgrades it and audits it; the audit lists what is weaker
//! than under root, and a line of policy forbids it.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use baton_tests::Answer;
use baton_tests::is_alive;
use baton_tests::until;
use serde_json::Value;

/// No distribution gives it to anybody (`nobody` is 65534).
const USER: u32 = 1_899_999_999;

/// A directory of that user's, with programs and a VM file.
struct Place(tempfile::TempDir);

impl Place {
    fn new(policy: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self(directory);
        fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        let programs = baton_tests::Binaries::release().broker();
        for name in ["baton", "baton-broker", "baton-worker", "baton-qmp"] {
            fs::copy(programs.with_file_name(name), place.path(name)).unwrap();
        }
        fs::write(place.path("guest.elf"), baton_guest::ELF).unwrap();
        fs::write(place.path("policy.toml"), policy).unwrap();
        let file = "schema = 1\nname = \"mine\"\npolicy = \"policy.toml\"\n[cpus]\ncount = 1\n[memory]\nsize = \"64M\"\n\
                    [boot]\nkernel = \"guest.elf\"\n[console]\nkind = \"file\"\npath = \"console.log\"\n";
        fs::write(place.path("vm.toml"), file).unwrap();
        for entry in fs::read_dir(place.path("")).unwrap().flatten() {
            std::os::unix::fs::chown(entry.path(), Some(USER), Some(USER)).unwrap();
        }
        std::os::unix::fs::chown(place.path(""), Some(USER), Some(USER)).unwrap();
        place
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// Runs `baton` as that user, whom a `/dev/kvm` of a mount namespace of its own lets in.
    fn baton(&self, words: &[&str]) -> Answer {
        // The node, the user, then the command.
        let script = "mount --bind \"$0\" /dev/kvm && user=$1 && shift && \
                      exec setpriv --reuid \"$user\" --regid \"$user\" --clear-groups -- \"$@\"";
        let kvm = self.path("kvm");
        if !kvm.exists() {
            // 10, 232: /dev/kvm (Documentation/admin-guide/devices.txt).
            let made = Command::new("mknod")
                .arg("-m666")
                .arg(&kvm)
                .args(["c", "10", "232"])
                .status();
            assert!(made.unwrap().success());
        }
        let (program, run_dir) = (self.path("baton"), self.path("run"));
        let output = Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .arg(&kvm)
            .arg(USER.to_string())
            .args([
                program.as_os_str(),
                OsStr::new("--run-dir"),
                run_dir.as_os_str(),
                OsStr::new("--json"),
            ])
            .args(words)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .output()
            .unwrap();
        Answer::of(&output)
    }
}

#[test]
fn an_ordinary_user_runs_upgrades_and_audits_a_vm_and_is_told_what_is_weaker() {
    let place = Place::new(baton_policy::BUILTIN);
    let file = place.path("vm.toml").display().to_string();
    let started = place.baton(&["run", "--detach", &file]).expect(0).json();
    let broker = started.get("broker_pid").and_then(Value::as_i64).unwrap();
    let owner = fs::read_to_string(format!("/proc/{broker}/status")).unwrap();
    assert!(owner.contains(&format!("\nUid:\t{USER}\t{USER}\t{USER}\t{USER}\n")));
    assert_eq!(
        place.baton(&["upgrade", "mine"]).upgrade().outcome,
        "committed"
    );

    let audit = place.baton(&["audit", "mine"]).expect(0).json();
    assert_eq!(audit.get("verdict").unwrap(), "proven");
    let weaker = audit.get("weaker").unwrap().to_string();
    assert!(weaker.contains("cannot be read back"), "{weaker}");
    assert!(weaker.contains("in no cgroup of its own"), "{weaker}");
    place.baton(&["log", "verify", "mine"]).expect(0);
    place.baton(&["stop", "--force", "mine"]).expect(0);
    let broker = i32::try_from(broker).unwrap();
    until("the broker is gone", || (!is_alive(broker)).then_some(()));
    assert!(!Path::new(&place.path("run").join("mine")).exists());
}

#[test]
fn a_line_of_policy_forbids_it() {
    let policy =
        baton_policy::BUILTIN.replace("unprivileged_broker = true", "unprivileged_broker = false");
    let place = Place::new(&policy);
    let file = place.path("vm.toml").display().to_string();
    let refused = place.baton(&["run", "--detach", &file]).expect(30);
    assert!(
        refused.stdout.contains("unprivileged_broker"),
        "{refused:?}"
    );
}
