//! The walker visits all usable RAM, finds what was changed in it, and nothing else.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails so"
)]

mod machine;

use baton_guest::layout::{IMAGE_ADDRESS, PAGE_NONCE_OFFSET, WALK_ADDRESS, seal};
use baton_guest::{CommandLine, Report};
use machine::{Machine, blank_memory};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;

/// Waits until every vCPU completed so many sweeps more.
fn sweeps(machine: &Machine, more: u64) -> Report {
    let done = |report: &Report| report.slots.iter().map(|slot| slot.walk.sweeps).min();
    let seen = machine.report().as_ref().and_then(done);
    machine.report_when("every vCPU swept on", |report| {
        done(report) >= Some(seen.unwrap_or_default() + more)
    })
}

/// Changes a page behind the guest's back, and waits until it was found. A vCPU that was held just after it had looked
/// at that page writes over the change, so a change that two sweeps did not find is made again.
fn found(machine: &Machine, change: impl Fn()) -> Report {
    let errors = |report: &Report| report.slots[0].walk.errors;
    let before = errors(&machine.stopped_report());
    let found = (0..5).find_map(|_| {
        machine.paused(&change);
        Some(sweeps(machine, 2)).filter(|report| errors(report) > before)
    });
    let found = found.expect("a changed page was not found");
    assert_eq!(errors(&found), before + 1);
    assert_eq!(errors(&sweeps(machine, 2)), before + 1, "found again");
    found
}

#[test]
fn shares_of_four_vcpus_cover_the_ram() {
    let machine = Machine::boot(64 * MIB, 4, CommandLine::new().cpus(4).walk());
    sweeps(&machine, 3);
    let report = machine.stopped_report();
    assert_eq!(report.walk_bytes, 64 * MIB - WALK_ADDRESS);
    assert_eq!(
        report.slots.iter().map(|slot| slot.walk.pages).sum::<u64>() * 4096,
        report.walk_bytes
    );
    assert_eq!(report.faults(), 0, "{report:#?}");
    let nonce = |address: u64| {
        machine
            .memory
            .read_obj::<u64>(GuestAddress(address + PAGE_NONCE_OFFSET))
            .unwrap()
    };
    for page in (WALK_ADDRESS..64 * MIB).step_by(4096) {
        assert_eq!(nonce(page), report.nonce, "{page:#x}");
    }
    assert_ne!(nonce(IMAGE_ADDRESS), report.nonce);
}

#[test]
fn a_limit_is_kept() {
    let machine = Machine::boot(64 * MIB, 1, CommandLine::new().walk_bytes(8 * MIB + 5));
    sweeps(&machine, 2);
    assert_eq!(machine.report().unwrap().walk_bytes, 8 * MIB);
    let beyond = GuestAddress(WALK_ADDRESS + 8 * MIB);
    assert_eq!(machine.memory.read_obj::<[u64; 4]>(beyond).unwrap(), [0; 4]);
}

#[test]
fn ram_above_4_gib_is_walked() {
    let high = [4 << 30, (70 << 30) + MIB];
    let memory = blank_memory(&[(0, 8 * MIB), (high[0], 4 * MIB), (high[1], 4 * MIB)]);
    let machine = Machine::boot_on(memory, 1, CommandLine::new().walk());
    sweeps(&machine, 3);
    let report = machine.stopped_report();
    assert_eq!((report.walk_bytes, report.faults()), (12 * MIB, 0));
    for start in high {
        for page in [start, start + 4 * MIB - 4096] {
            let record: [u64; 4] = machine.memory.read_obj(GuestAddress(page)).unwrap();
            assert_eq!((record[0], record[2]), (page, report.nonce));
        }
    }
}

#[test]
fn a_changed_word_is_found_once_and_where_it_is() {
    let machine = Machine::boot(16 * MIB, 1, CommandLine::new().walk());
    sweeps(&machine, 2);
    let page = WALK_ADDRESS + 5 * MIB + 4096;
    for offset in [0, 8, 16, 24] {
        let at = GuestAddress(page + offset);
        let report = found(&machine, || {
            let word: u64 = machine.memory.read_obj(at).unwrap();
            machine.memory.write_obj(word ^ 1 << 40, at).unwrap();
        });
        assert_eq!(report.slots[0].walk.last_error.unwrap().address, page);
    }
}

#[test]
fn a_page_of_an_earlier_sweep_is_found() {
    let machine = Machine::boot(16 * MIB, 1, CommandLine::new().walk());
    sweeps(&machine, 2);
    let page = GuestAddress(WALK_ADDRESS + 2 * MIB);
    let read = || machine.memory.read_obj::<[u64; 4]>(page).unwrap();
    let [_, generation, nonce, _] = machine.paused(read);
    let old = [page.0, generation, nonce, seal(page.0, generation, nonce)];
    sweeps(&machine, 3);
    let report = found(&machine, || machine.memory.write_obj(old, page).unwrap());
    let error = report.slots[0].walk.last_error.unwrap();
    assert_eq!((error.address, error.found), (page.0, generation));
    assert!(error.found < error.expected);
}

#[test]
fn a_round_after_a_gap_is_timed() {
    let machine = Machine::boot(16 * MIB, 1, CommandLine::new().walk().gap_us(100_000));
    sweeps(&machine, 3);
    machine.paused(|| std::thread::sleep(std::time::Duration::from_millis(500)));
    let report = machine.report_when("it timed the round after the pause", |report| {
        report.slots[0]
            .walk
            .last_gap_round
            .is_some_and(|round| report.nanoseconds(round.gap) >= 500_000_000)
    });
    let walk = &report.slots[0].walk;
    assert!(walk.last_gap_round.unwrap().ticks > 0);
    assert!(walk.cleared_max_gap_round >= walk.last_gap_round.unwrap().ticks);
    assert!(
        walk.min_sweep > 0 && walk.median_sweep >= walk.min_sweep && walk.first_sweep > 0,
        "{walk:#?}"
    );
}
