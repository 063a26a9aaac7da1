//! A worker that policy allows and that is hostile all the same: whatever it says, in whatever order, and whatever it
//! attempts, it is killed, the guest never notices, and the next upgrade succeeds (the matrix's last row; I1, I7, I8).
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::path::Path;

use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::hostility;

struct Attacked {
    vm: Vm,
    reason: String,
    step: String,
}

/// Upgrades a guest to a worker of this mode; it has to be turned away without the guest being paused.
fn attacked(mode: &str, slowness: u32) -> Attacked {
    let directory = tempfile::tempdir().unwrap();
    let hostile = Path::new(env!("CARGO_BIN_EXE_hostile-worker"));
    let worker = hostility::binary(hostile, mode, directory.path());
    let vm = Builder::release().allow(&worker).slowness(slowness).start();
    let (old, before) = (vm.worker(), vm.witness());

    let upgrade = vm.upgrade_to(&worker).upgrade();
    assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
    assert_eq!(
        (upgrade.generation, upgrade.worker_pid, upgrade.pause_us),
        (1, old, 0)
    );
    assert!(!upgrade.reason.chars().any(char::is_control), "{upgrade:?}");
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    assert_eq!(vm.state(), "running");
    assert_eq!(vm.audit_log().upgrades(), ["aborted"]);
    vm.assert_upgrades();
    Attacked {
        vm,
        reason: upgrade.reason,
        step: upgrade.failed_step.unwrap_or_default(),
    }
}

macro_rules! modes {
    ($($name:ident: $mode:literal in $step:literal says $words:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let attacked = attacked($mode, 10);
                assert_eq!(attacked.step, $step, "{}", attacked.reason);
                assert!(attacked.reason.contains($words), "{}", attacked.reason);
            }
        )*
    };
}

mod its_first_word {
    use super::*;

    modes! {
        is_its_exit: "raw.exit" in "spawn" says "exit status 7";
        is_its_abort: "raw.abort" in "spawn" says "signal";
        is_garbage: "raw.garbage" in "spawn" says "malformed";
        is_zeroes: "raw.zeroes" in "spawn" says "malformed";
        is_too_long: "raw.oversize" in "spawn" says "malformed";
        is_far_too_long: "raw.huge" in "spawn" says "malformed";
        claims_an_impossible_length: "raw.length" in "spawn" says "malformed";
        is_empty: "raw.empty" in "spawn" says "closed its control socket";
        is_its_hang_up: "raw.hang-up" in "spawn" says "closed its control socket";
        is_another_protocol: "first.protocol" in "spawn" says "from the future) speaks protocol";
        comes_with_a_descriptor_planted: "first.one-more" in "spawn" says "it holds descriptors 0, 1, 2, 3";
        brings_descriptors: "first.descriptors" in "spawn" says "1 descriptors";
        is_ready: "first.ready" in "spawn" says "`ready` in phase Spawned";
        is_agreed: "first.agreed" in "spawn" says "`agreed` in phase Spawned";
        is_loaded: "first.loaded" in "spawn" says "`loaded` in phase Spawned";
        is_running: "first.running" in "spawn" says "`running` in phase Spawned";
        is_parked: "first.parked" in "spawn" says "`parked` in phase Spawned";
        is_saved: "first.saved" in "spawn" says "`saved` in phase Spawned";
        is_that_the_guest_has_shut_down: "first.shutdown" in "spawn" says "`guest` in phase Spawned";
    }

    #[test]
    fn never_comes() {
        let attacked = attacked("raw.silent", 3);
        assert_eq!(attacked.step, "spawn");
        assert!(
            attacked.reason.contains("took longer"),
            "{}",
            attacked.reason
        );
    }

    #[test]
    fn is_said_a_hundred_thousand_times() {
        let attacked = attacked("first.flood", 10);
        assert!(
            attacked.reason.contains("`hello` in phase"),
            "{}",
            attacked.reason
        );
        // It did not fill the log.
        assert!(attacked.vm.audit_log().0.len() < 200);
    }
}

mod its_second_word {
    use super::*;

    fn out_of_turn(mode: &str, word: &str) {
        let attacked = attacked(mode, 10);
        assert!(
            attacked.reason.contains(&format!("`{word}` in phase")),
            "{}",
            attacked.reason
        );
    }

    macro_rules! words {
        ($($name:ident: $mode:literal is $word:literal;)*) => {
            $(
                #[test]
                fn $name() {
                    out_of_turn($mode, $word);
                }
            )*
        };
    }

    words! {
        is_hello_again: "later.hello" is "hello";
        claims_that_it_loaded: "later.loaded" is "loaded";
        claims_that_it_runs: "later.running" is "running";
        claims_that_it_began_to_run: "later.first-run" is "first-run";
        claims_to_be_the_old_one_parked: "later.parked" is "parked";
        claims_to_be_the_old_one_saved: "later.saved" is "saved";
        claims_to_be_the_old_one_resumed: "later.resumed" is "resumed";
        claims_that_the_guest_has_shut_down: "later.shutdown" is "guest";
    }
}

mod once_configured {
    use super::*;

    modes! {
        it_is_ready_without_its_filters: "built.ready" in "agree" says "not confined as policy says";
        it_hangs_up_without_a_word: "built.hang-up" in "agree" says "hung up before it was ready";
        it_writes_where_it_only_reads: "built.answer" in "agree" says "wrote to its cpr channel";
        it_closes_the_main_channel: "built.close-main" in "agree" says "closed the main channel";
        its_offer_is_garbage: "built.frame" in "agree" says "the old worker cannot";
        its_offer_has_no_end: "built.frame-flood" in "agree" says "the old worker cannot";
        it_reads_no_version_of_the_stream: "built.container" in "agree" says "container version 0";
        it_has_more_processors: "built.cpus" in "agree" says "2 vCPUs";
        it_has_other_memory: "built.ram" in "agree" says "RAM";
        it_hides_other_features: "built.hidden" in "agree" says "quantum";
        it_has_no_devices: "built.devices" in "agree" says "device 0";
    }
}

/// Each is really attempted, in the worker's own process under the filter that it starts with. The kernel ends it there by
/// SIGSYS, but for opening files: that is answered with an error, for the sake of Rust's own start-up.
mod it_attempts_to {
    use super::*;

    macro_rules! calls {
        ($($name:ident: $mode:literal ends in $words:literal;)*) => {
            $(
                #[test]
                fn $name() {
                    let attacked = attacked($mode, 10);
                    assert!(attacked.reason.contains($words), "{}", attacked.reason);
                }
            )*
        };
    }

    calls! {
        open_a_file: "call.open" ends in "Function not implemented";
        create_a_file: "call.create" ends in "Function not implemented";
        list_a_directory: "call.read-dir" ends in "Function not implemented";
        make_a_directory: "call.mkdir" ends in "signal 31";
        listen_on_tcp: "call.tcp" ends in "signal 31";
        make_a_udp_socket: "call.udp" ends in "signal 31";
        connect_to_a_socket: "call.unix" ends in "signal 31";
        make_a_socket_pair: "call.pair" ends in "signal 31";
        execute_a_program: "call.execute" ends in "signal 31";
        make_a_memfd: "call.memfd" ends in "signal 31";
        signal_a_process_group: "call.signal" ends in "signal 31";
        set_the_host_name: "call.hostname" ends in "signal 31";
        change_its_root: "call.chroot" ends in "signal 31";
        ask_who_started_it: "call.parent" ends in "signal 31";
    }
}
