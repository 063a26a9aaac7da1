//! Every vCPU counts on, without a turn lost or repeated, and sees when it was held or its words were changed.

mod machine;

use std::time::Duration;

use baton_guest::layout::{COMMAND_CLEAR, REPORT_ADDRESS, SEQUENCE_OFFSET, slot_offset};
use baton_guest::{CommandLine, TscSource};
use machine::Machine;
use vm_memory::{Bytes, GuestAddress};

fn counts_on(vcpus: usize) {
    let machine = Machine::boot(16 << 20, vcpus, CommandLine::new().cpus(vcpus));
    let first = machine.report_when("all vCPUs take turns", |report| {
        report.vcpus_running == vcpus && report.slots.iter().all(|slot| slot.sequence > 0)
    });
    assert_ne!(first.nonce, 0);
    assert_eq!(
        (first.boots, first.panic_line, first.tsc_source),
        (1, None, TscSource::CommandLine)
    );
    let later = |after: Vec<u64>| {
        machine.report_when("every vCPU takes 1000 more turns", |report| {
            let mut pairs = report.slots.iter().zip(&after);
            pairs.all(|(slot, after)| slot.sequence > after + 1000)
        });
        machine.stopped_report()
    };
    let second = later(first.slots.iter().map(|slot| slot.sequence).collect());
    let third = later(second.slots.iter().map(|slot| slot.sequence).collect());
    for report in [second, third] {
        assert_eq!(report.nonce, first.nonce);
        assert!(
            report
                .slots
                .iter()
                .all(|slot| slot.running && slot.unbroken()),
            "{report:#?}"
        );
        assert_eq!(report.faults(), 0, "{report:#?}");
    }
}

#[test]
fn one_vcpu_counts_on() {
    counts_on(1);
}

#[test]
fn four_vcpus_count_on() {
    counts_on(4);
}

#[test]
fn eight_vcpus_count_on() {
    counts_on(8);
}

#[test]
fn vcpus_that_do_not_exist_are_left_out() {
    let machine = Machine::boot(16 << 20, 2, CommandLine::new().cpus(3));
    let report = machine.report_when("the first vCPU gave up waiting", |report| {
        report.slots[0].sequence > 0
    });
    assert_eq!((report.vcpus, report.vcpus_running), (3, 2));
    assert_eq!(
        report
            .slots
            .iter()
            .map(|slot| slot.running)
            .collect::<Vec<_>>(),
        [true, true, false]
    );
}

#[test]
fn a_pause_is_a_gap_on_every_vcpu() {
    let machine = Machine::boot(16 << 20, 2, CommandLine::new().cpus(2));
    machine.report_when("both vCPUs take turns", |report| {
        report.slots.iter().all(|slot| slot.sequence > 1000)
    });
    machine.mail(COMMAND_CLEAR);
    machine.report_when("the statistics are cleared", |report| {
        report.clears == 1 && report.cleared()
    });
    let held = Duration::from_millis(400);
    let before = machine.paused(|| {
        std::thread::sleep(held);
        machine.report().unwrap()
    });
    let report = machine.report_when("both vCPUs go on", |report| {
        let mut pairs = report.slots.iter().zip(&before.slots);
        pairs.all(|(slot, before)| slot.sequence > before.sequence + 1)
    });
    for slot in &report.slots {
        assert!(
            u128::from(report.nanoseconds(slot.cleared_max_gap)) >= held.as_nanos(),
            "{slot:#?}"
        );
        assert!(
            slot.cleared_gaps >= 1 && slot.gaps >= slot.cleared_gaps,
            "{slot:#?}"
        );
        assert!(slot.last_gap_start >= report.boot_tsc, "{slot:#?}");
    }
    machine.mail(COMMAND_CLEAR);
    let report = machine.report_when("the statistics are cleared", |report| {
        report.clears == 2 && report.cleared()
    });
    assert!(
        report
            .slots
            .iter()
            .all(|slot| u128::from(report.nanoseconds(slot.max_gap)) >= held.as_nanos())
    );
}

#[test]
fn a_sequence_set_back_behind_the_vcpus_back_is_a_break() {
    let machine = Machine::boot(16 << 20, 1, CommandLine::new());
    machine.report_when("it takes turns", |report| report.slots[0].sequence > 1000);
    assert!(machine.stopped_report().slots[0].unbroken());
    // A vCPU that was held after it had looked at the word writes over the change, so try again.
    let broken = (0..100).find_map(|_| {
        let held_at = machine.paused(|| {
            let sequence = machine.report().unwrap().slots[0].sequence;
            let address = REPORT_ADDRESS + (slot_offset(0) + SEQUENCE_OFFSET) as u64;
            machine
                .memory
                .write_obj(sequence - 100, GuestAddress(address))
                .unwrap();
            sequence
        });
        let report = machine.report_when("it went on", |report| {
            report.slots[0].sequence > held_at + 1
        });
        (report.slots[0].breaks > 0).then_some(report)
    });
    let report = broken.expect("it saw none of the changes");
    assert_eq!(report.slots[0].breaks, 1);
    assert!(!machine.stopped_report().slots[0].unbroken());
    assert!(report.faults() > 0);
}
