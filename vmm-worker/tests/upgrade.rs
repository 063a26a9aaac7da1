//! One worker replaces another under a running guest, which does not notice but for the time that it takes.

mod harness;

use std::io::Write as _;

use baton_guest::CommandLine;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use harness::Upgrade;
use harness::Vm;

fn busy_guest(cpus: u8) -> Vm {
    Vm::new(
        cpus,
        64,
        CommandLine::new()
            .timer_us(1000)
            .ipi_us(200)
            .walk_bytes(8 << 20)
            .console()
            .period_ms(20),
    )
}

#[test]
fn the_guest_goes_on_where_it_was() {
    let vm = busy_guest(2);
    let mut worker = vm.start();
    let mut before = vm.wait_for_turns();
    for generation in 2..6 {
        let (next, blackout) = Upgrade::complete(&vm, worker, generation);
        worker = next;
        let after = vm.wait_for("turns, interrupts and pages go on", |report| {
            report.slots.iter().zip(&before.slots).all(|(now, then)| {
                now.sequence > then.sequence + 1000
                    && now.timer.ticks > then.timer.ticks + 5
                    && now.ipis.arrived > then.ipis.arrived + 5
                    && now.walk.sweeps > then.walk.sweeps + 1
            })
        });
        assert_eq!((after.nonce, after.boots), (before.nonce, 1));
        assert_eq!(after.faults(), 0, "{after:?}");
        println!("generation {generation}: blackout {} us", blackout / 1000);
        before = after;
    }
}

#[test]
fn nobody_writes_ram_from_parked_to_commit() {
    let vm = busy_guest(2);
    let mut old = vm.start();
    vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    let saved = Upgrade::park(&mut old);
    let parked = vm.ram_bytes();
    assert_eq!(upgrade.expect_loaded(), saved.digest);
    assert!(
        vm.ram_bytes() == parked,
        "RAM changed while the guest stood still"
    );
    for slot in vm.report().unwrap().slots {
        assert!(slot.unbroken(), "{slot:?}");
    }
    upgrade.new.order(&Order::Commit);
    upgrade.new.expect_running();
    vm.wait_for_turns();
}

#[test]
fn building_and_rehearsing_leave_ram_as_it_is() {
    let vm = Vm::new(2, 16, CommandLine::new());
    let mut old = vm.start();
    vm.wait_for_turns();
    old.order(&Order::Pause);
    old.expect("paused", |report| {
        if report == Report::Paused {
            Ok(())
        } else {
            Err(report)
        }
    });
    let before = vm.ram_bytes();
    // The guest is paused, so there is nothing to agree on; the rest of a build is the same.
    let mut cold = harness::Worker::spawn();
    cold.expect_hello();
    cold.build_cold(&vm);
    assert!(vm.ram_bytes() == before);
    old.order(&Order::Resume);
    old.expect_resumed();
    vm.wait_for_turns();
}

#[test]
fn the_console_goes_over_whole() {
    let vm = Vm::new(1, 16, CommandLine::new().console().period_ms(100));
    let mut worker = vm.start();
    let mut text = String::new();
    let mut report = vm.wait_for("lines", |report| report.lines > 5);
    for generation in 2..5 {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        let lines = report.lines;
        report = vm.wait_for("more lines", |report| report.lines > lines + 5);
        text.push_str(&vm.read_console());
    }
    (&vm.console).write_all(b"clear\n").unwrap();
    vm.wait_for("a command from the console", |report| report.clears == 1);
    drop(worker);
    text.push_str(&vm.read_console());
    // The last line may have been cut off by the end of the worker.
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let log = baton_guest::StatusLog::parse(whole).unwrap();
    assert!(log.lines.len() > 15, "{text}");
}

#[test]
fn the_console_is_untouched_until_the_commit() {
    let vm = Vm::new(1, 16, CommandLine::new().console().period_ms(100));
    let mut old = vm.start();
    vm.wait_for("lines", |report| report.lines > 2);
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    Upgrade::park(&mut old);
    vm.read_console();
    (&vm.console).write_all(b"clear\n").unwrap();
    upgrade.expect_loaded();
    assert_eq!(vm.unread_console_input(), b"clear\n");
    assert_eq!(vm.read_console(), "");
    upgrade.new.order(&Order::Commit);
    upgrade.new.expect_running();
    vm.wait_for("the command", |report| report.clears == 1);
    assert_eq!(vm.unread_console_input(), b"");
    let lines = vm.report().unwrap().lines;
    vm.wait_for("lines again", |report| report.lines > lines + 2);
    assert_ne!(vm.read_console(), "");
}

#[test]
fn a_port_access_that_is_under_way_is_made_once() {
    // mov dx, 0x3f8; again: out dx, al; inc al; jmp again: hardly a moment without an exit.
    let kernel = harness::kernel_of(&[0x66, 0xba, 0xf8, 0x03, 0xee, 0xfe, 0xc0, 0xeb, 0xfb]);
    let vm = Vm::with_kernel(&kernel, 1, 8, CommandLine::new());
    let mut worker = vm.start();
    let mut bytes = Vec::new();
    for generation in 2..22 {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        bytes.extend(vm.read_console_bytes());
    }
    drop(worker);
    bytes.extend(vm.read_console_bytes());
    assert!(bytes.len() > 256, "{}", bytes.len());
    for pair in bytes.windows(2) {
        assert_eq!(pair[1], pair[0].wrapping_add(1));
    }
}

#[test]
fn a_vcpu_that_the_guest_has_not_started_goes_over_too() {
    let mut vm = Vm::new(2, 16, CommandLine::new());
    vm.config.cmdline = CommandLine::new().timer_us(1000).to_string();
    let mut worker = vm.start();
    let before = vm.wait_for("turns", |report| report.slots[0].sequence > 1000);
    for generation in 2..4 {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        let then = vm.report().unwrap().slots[0].timer.ticks;
        vm.wait_for("ticks", |report| report.slots[0].timer.ticks > then + 5);
    }
    let after = vm.report().unwrap();
    assert_eq!(
        (after.nonce, after.vcpus_running, after.faults()),
        (before.nonce, 1, 0)
    );
    drop(worker);
}

#[test]
fn memory_above_the_hole_goes_over_too() {
    let mut vm = Vm::new(1, 16, CommandLine::new());
    vm.add_high_ram(8);
    let mut worker = vm.start();
    vm.wait_for_turns();
    for generation in 2..4 {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        assert_eq!(vm.wait_for_turns().faults(), 0);
    }
    drop(worker);
}

#[test]
fn many_upgrades_leave_nothing_behind() {
    let vm = Vm::new(2, 16, CommandLine::new().timer_us(1000));
    let mut worker = vm.start();
    vm.wait_for_turns();
    let mut blackouts = Vec::new();
    let mut sizes = Vec::new();
    for generation in 2..32 {
        let (next, blackout) = Upgrade::complete(&vm, worker, generation);
        worker = next;
        blackouts.push(blackout / 1000);
        sizes.push((worker.descriptors(), worker.status_field("Threads")));
    }
    assert_eq!(vm.wait_for_turns().faults(), 0);
    assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
    blackouts.sort_unstable();
    println!(
        "blackout in us: median {}, max {}",
        blackouts[blackouts.len() / 2],
        blackouts[blackouts.len() - 1]
    );
}
