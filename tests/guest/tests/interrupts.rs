//! Timers tick on, and each interrupt that a vCPU sends arrives once.

mod machine;

use baton_guest::{CommandLine, Report, Slot};
use machine::Machine;

/// Waits until `count` went up by `more` on every vCPU.
fn go_on(machine: &Machine, more: u64, count: impl Fn(&Slot) -> u64) -> Report {
    let seen: Vec<u64> = machine.stopped_report().slots.iter().map(&count).collect();
    machine.report_when("interrupts come on every vCPU", |report| {
        let mut pairs = report.slots.iter().zip(&seen);
        pairs.all(|(slot, seen)| count(slot) >= seen + more)
    })
}

fn boot(vcpus: usize, line: CommandLine) -> Machine {
    let machine = Machine::boot(16 << 20, vcpus, line.cpus(vcpus));
    machine.report_when("all vCPUs take turns", |report| {
        report.slots.iter().all(|slot| slot.sequence > 0)
    });
    machine
}

#[test]
fn timers_tick_on_every_vcpu() {
    let machine = boot(4, CommandLine::new().timer_us(2000));
    for _ in 0..3 {
        let report = go_on(&machine, 20, |slot| slot.timer.ticks);
        assert!(
            report
                .slots
                .iter()
                .all(|slot| slot.timer.last_tsc > report.boot_tsc)
        );
        assert_eq!((report.faults(), report.slots[0].ipis.sent), (0, 0));
    }
    let slots = machine.stopped_report().slots;
    assert!(slots.iter().all(Slot::unbroken));
}

#[test]
fn without_the_words_no_interrupt_comes() {
    let machine = boot(2, CommandLine::new());
    let report = go_on(&machine, 100_000, |slot| slot.sequence);
    for slot in &report.slots {
        assert_eq!(
            (slot.timer.ticks, slot.ipis.sent, slot.ipis.arrived),
            (0, 0, 0)
        );
    }
}

#[test]
fn a_ring_of_vcpus_interrupts_itself() {
    for vcpus in [1, 2, 4] {
        let machine = boot(vcpus, CommandLine::new().ipi_us(500).timer_us(5000).walk());
        let report = go_on(&machine, 50, |slot| slot.ipis.arrived);
        for slot in &report.slots {
            assert!(slot.ipis.sent - slot.ipis.arrived <= 1, "{slot:#?}");
            assert!(slot.ipis.max_ticks > 0);
        }
        assert_eq!(report.faults(), 0, "{report:#?}");
    }
}

#[test]
fn an_interrupt_that_nobody_sent_is_seen() {
    let machine = boot(2, CommandLine::new().ipi_us(500));
    go_on(&machine, 5, |slot| slot.ipis.arrived);
    // The vector of interrupts between vCPUs, to the second one: the first counts them. One that comes while the first's
    // own is pending there becomes one with it, so try again.
    let seen = (0..100).find_map(|_| {
        machine.paused(|| machine.interrupt(1, 0x41));
        Some(go_on(&machine, 2, |slot| slot.ipis.arrived)).filter(|report| report.faults() > 0)
    });
    let slots = seen.expect("it saw none of the interrupts").slots;
    let extra: Vec<u64> = slots.iter().map(|slot| slot.ipis.extra).collect();
    assert_eq!(extra, [1, 0]);
}
