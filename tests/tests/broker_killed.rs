//! Rule 4: the broker dies in the middle of an upgrade. Before `ceded` the old worker runs the guest on, after it the new
//! one does if it holds `commit`; never two, and never nobody while one of them could. The orphan is found, named and ended.
#![expect(
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use std::path::Path;

use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::Witness;
use baton_tests::is_alive;
use baton_tests::kill_process;
use baton_tests::until;

/// Everything that is promised of an orphan whose runner is this worker.
fn assert_orphaned(vm: &Vm, runner: i32, before: &Witness) {
    until("the broker is dead", || {
        (!is_alive(vm.broker)).then_some(())
    });
    vm.assert_only_runner(runner);
    vm.assert_goes_on(before);
    let status = vm.status();
    assert_eq!(status["state"], "orphaned");
    assert_eq!(status["worker_pid"], runner);

    // Nobody starts a second VM over it, and who tries is told what was found.
    let refused = vm.site.run("vm.toml").expect(3);
    assert!(refused.stderr.contains("orphaned"), "{refused:?}");
    assert!(refused.stderr.contains(&runner.to_string()), "{refused:?}");
    assert_eq!(vm.ask("upgrade").code, Some(3));
    vm.assert_goes_on(before);

    vm.end().expect(0);
    assert!(!is_alive(runner));
    assert!(!Path::new(&vm.cgroup).exists());
    vm.site.assert_nothing_left();
}

/// The broker kills itself at this step of an upgrade; then the old worker is the VM.
fn old_runs_on(fault: &str) {
    let vm = Builder::faulty(fault).start();
    let (old, before) = (vm.worker(), vm.witness());
    vm.ask("upgrade").expect(3);
    assert_orphaned(&vm, old, &before);
}

#[test]
fn in_s0_the_guest_runs_on() {
    let vm = Builder::release().start();
    let (worker, before) = (vm.worker(), vm.witness());
    kill_process(vm.broker);
    assert_orphaned(&vm, worker, &before);
}

#[test]
fn in_s0_of_a_later_generation_the_guest_runs_on() {
    let vm = Builder::release().start();
    vm.assert_upgrades();
    let (worker, before) = (vm.worker(), vm.witness());
    kill_process(vm.broker);
    assert_orphaned(&vm, worker, &before);
}

#[test]
fn in_s1_the_old_one_runs_on() {
    old_runs_on("S1:kill-broker");
}

#[test]
fn in_s2_the_old_one_runs_on() {
    old_runs_on("S2:kill-broker");
}

#[test]
fn in_s3_the_old_one_runs_on() {
    old_runs_on("S3:kill-broker");
}

#[test]
fn in_s4_the_old_one_runs_on() {
    old_runs_on("S4:kill-broker");
}

#[test]
fn in_s5_the_old_one_runs_on() {
    old_runs_on("S5:kill-broker");
}

#[test]
fn in_s6_the_old_one_runs_on() {
    old_runs_on("S6:kill-broker");
}

#[test]
fn in_s7_the_old_one_resumes() {
    old_runs_on("S7:kill-broker");
}

#[test]
fn in_s8_the_old_one_resumes_though_it_was_stopped() {
    old_runs_on("S8:kill-broker");
}

#[test]
fn in_s9_before_it_ceded_the_old_one_resumes() {
    old_runs_on("S9:kill-broker");
}

#[test]
fn in_s10_the_new_one_runs_with_the_commit_it_holds() {
    let vm = Builder::faulty("S10:kill-broker").start();
    let (old, before) = (vm.worker(), vm.witness());
    vm.ask("upgrade").expect(3);
    until("the old one is gone", || (!is_alive(old)).then_some(()));
    let workers = vm.site.workers();
    let [new] = workers.as_slice() else {
        panic!("one has to be left to run the guest: {workers:?}");
    };
    assert_orphaned(&vm, *new, &before);
}

#[test]
fn after_a_stale_directory_the_next_start_says_what_it_cleared() {
    let vm = Builder::release().start();
    let worker = vm.worker();
    kill_process(vm.broker);
    kill_process(worker);
    until("both are dead", || {
        (!is_alive(vm.broker) && !is_alive(worker)).then_some(())
    });
    assert_eq!(vm.ask("status").code, Some(3));
    let started = vm.site.run("vm.toml").expect(0);
    assert!(started.stderr.contains("cleared"), "{started:?}");
    let first = vm.audit_log();
    assert_eq!(first.count("vm-start"), 2, "the log goes on over the death");
    vm.end().expect(0);
}
