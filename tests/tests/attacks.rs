//! A worker that was started by the real launcher, confirmed by the broker and granted everything attempts what policy does
//! not permit, from each of its threads' roles, and the kernel refuses exactly that.
//!
//! Each attack is made by a VM's first worker, whose guest never runs. What is attempted, and what the answers prove, is in
//! `baton_tests::attack`. In `hostile_worker.rs` are the attacks on the broker by a worker that has been granted less.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::ffi::OsStr;
use std::path::Path;

use baton_policy::Policy;
use baton_policy::Role;
use baton_tests::Answer;
use baton_tests::AuditLog;
use baton_tests::Binaries;
use baton_tests::Site;
use baton_tests::attack::EXEMPT;
use baton_tests::attack::Survey;
use baton_tests::hostility;
use baton_tests::until;
use serde_json::Value;

struct Attack {
    site: Site,
    started: Answer,
}

/// Starts a VM whose first worker is of this mode.
fn attack(mode: &str) -> Attack {
    let site = Site::new(Binaries::release(), 10);
    let hostile = Path::new(env!("CARGO_BIN_EXE_hostile-worker"));
    let worker = hostility::binary(hostile, mode, &site.path(""));
    let policy = site.write_policy(&[&worker]);
    let text = format!(
        "schema = 1\nname = \"{}\"\nworker = {worker:?}\npolicy = {policy:?}\n[cpus]\ncount = 2\n[memory]\nsize = \"16M\"\n\
         [boot]\nkernel = \"guest.elf\"\n[console]\nkind = \"file\"\npath = \"console.log\"\n",
        site.name
    );
    site.write("vm.toml", text);
    let started = site.run("vm.toml");
    Attack { site, started }
}

impl Attack {
    /// What the worker, or the broker of it, had to say: why the VM did not start.
    fn outcome(&self) -> String {
        assert_ne!(self.started.code, Some(0), "{:?}", self.started);
        self.site.assert_nothing_left();
        format!("{}{}", self.started.stdout, self.started.stderr)
    }

    /// The broker has killed the worker, says why, and still takes orders.
    fn is_lost(&self, words: &str) {
        until("the VM is lost", || {
            let status = self.site.baton(["status", &self.site.name]).expect(0);
            let is_lost = status.json().get("state")? == "lost";
            (is_lost && self.site.workers().is_empty()).then_some(())
        });
        let name = format!(".audit/{}.jsonl", self.site.name);
        let log = AuditLog::read(&self.site.run_dir().join(name));
        let lost = log.0.iter().find(|record| record.event == "lost").unwrap();
        let reason = lost.fields.get("reason").and_then(Value::as_str).unwrap();
        assert!(reason.contains(words), "{reason}");
        self.end();
    }

    fn end(&self) {
        let ended = self.site.baton(["stop", "--force", &self.site.name]);
        ended.expect(0);
        self.site.assert_nothing_left();
    }
}

#[track_caller]
fn exactly_what_policy_permits(role: Role) {
    let expected = Survey::expected(&Policy::builtin().unwrap(), role);
    // Enough to mean something: all numbers, and several thousand requests.
    assert!(
        expected.passed > 60 && expected.refused > 40_000,
        "{expected}"
    );
    let outcome = attack(&format!("granted.{role}")).outcome();
    assert!(
        outcome.contains(&expected.to_string()),
        "expected {expected}, found {outcome}"
    );
}

mod exactly_what_policy_permits_passes {
    use super::*;

    #[test]
    fn while_building() {
        exactly_what_policy_permits(Role::Build);
    }

    #[test]
    fn in_the_control_thread() {
        exactly_what_policy_permits(Role::Control);
    }

    #[test]
    fn in_a_vcpu_thread() {
        exactly_what_policy_permits(Role::Vcpu);
    }

    #[test]
    fn in_an_io_thread() {
        exactly_what_policy_permits(Role::Io);
    }
}

/// The broker hears of a death before or after it can ask how, or of the end of a channel first.
#[track_caller]
fn died_by(signal: &str, outcome: &str) {
    let ended = ["the worker died", "hung up before it was ready"];
    assert!(ended.iter().any(|end| outcome.contains(end)), "{outcome}");
    assert!(!outcome.contains("survived"), "{outcome}");
    assert!(
        !outcome.contains("signal ") || outcome.contains(signal),
        "{outcome}"
    );
}

#[test]
fn the_entry_of_32_bit_programs_ends_the_process() {
    // getpid, open and execve there; read, fork and others here.
    for (role, number) in [
        (Role::Build, 20),
        (Role::Control, 3),
        (Role::Vcpu, 5),
        (Role::Io, 11),
    ] {
        died_by(
            "signal 31",
            &attack(&format!("granted.{role}-{number}")).outcome(),
        );
    }
}

#[test]
fn what_the_kernel_exempts_from_filters_gains_nothing() {
    for number in EXEMPT {
        let outcome = attack(&format!("granted.vcpu+{number}")).outcome();
        // Where the kernel exempts nothing, a refusal; else a SIGILL, or ENXIO: no probe is there.
        let is_refused = outcome.contains("survived: Trap");
        let has_failed = outcome.contains("survived: Allow, No such device");
        let has_died = outcome.contains("the worker died") && !outcome.contains("survived");
        assert!(is_refused || has_failed || has_died, "{number}: {outcome}");
    }
}

mod a_running_worker_that {
    use super::*;

    fn lost_by(mode: &str, words: &str) {
        let attack = attack(mode);
        attack.started.clone().expect(0);
        attack.is_lost(words);
    }

    macro_rules! words {
        ($($name:ident: $mode:literal says $words:literal;)*) => {
            $(
                #[test]
                fn $name() {
                    lost_by($mode, $words);
                }
            )*
        };
    }

    // Each belongs to an upgrade that nobody has asked for, or to one that is over.
    words! {
        greets_again: "running.hello" says "`hello` in phase Running";
        is_ready_again: "running.ready" says "`ready` in phase Running";
        agrees_to_nothing: "running.agreed" says "`agreed` in phase Running";
        says_that_it_parked: "running.parked" says "`parked` in phase Running";
        says_that_it_saved: "running.saved" says "`saved` in phase Running";
        says_that_it_loaded: "running.loaded" says "`loaded` in phase Running";
        runs_twice: "running.running" says "`running` in phase Running";
    }

    #[test]
    fn says_again_what_it_said_of_an_earlier_generation() {
        let attack = attack("running.replay");
        attack.started.clone().expect(0);
        let honest = attack.site.binaries().worker();
        let words = ["upgrade", &attack.site.name, "--worker"].map(OsStr::new);
        // Its successor waits for its answer in vain.
        let upgrade = attack
            .site
            .baton(words.into_iter().chain([honest.as_os_str()]));
        assert_eq!(upgrade.upgrade().outcome, "aborted");
        attack.is_lost("`agreed` in phase Running");
    }

    #[test]
    fn floods_keeps_nobody_from_the_broker() {
        let attack = attack("running.flood");
        let started = attack.started.clone().expect(0).json();
        let broker = started["broker_pid"].as_i64().unwrap();
        let resident = || {
            let text = std::fs::read_to_string(format!("/proc/{broker}/statm")).unwrap();
            // Pages: proc_pid_statm(5).
            text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
        };
        let before = resident();
        for _ in 0..40 {
            let status = attack.site.baton(["status", &attack.site.name]).expect(0);
            assert_eq!(status.json()["worker_build"], "hostile");
        }
        let after = resident();
        assert!(after < before + (2 << 20), "{before} bytes, then {after}");
        attack.end();
    }
}
