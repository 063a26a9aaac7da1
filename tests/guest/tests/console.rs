//! The console prints unbroken lines, takes commands, and ends the machine when told to.

mod machine;

use baton_guest::layout::{COMMAND_ACPI_RESET, COMMAND_CRASH};
use baton_guest::{CommandLine, ConsoleLine};
use machine::{End, Machine, blank_memory};

fn start() -> Machine {
    Machine::boot(16 << 20, 1, CommandLine::new().console().period_ms(20))
}

fn answers(machine: &Machine) -> Vec<String> {
    let lines = machine.lines().into_iter();
    lines
        .filter_map(|line| match line {
            ConsoleLine::Command(word) => Some(word),
            _ => None,
        })
        .collect()
}

#[test]
fn lines_are_unbroken_and_of_one_boot() {
    let machine = Machine::boot(
        16 << 20,
        2,
        CommandLine::new().cpus(2).walk().console().period_ms(20),
    );
    let log = machine.until("it printed ten lines", |machine| {
        Some(machine.status_lines()).filter(|log| log.lines.len() >= 10)
    });
    let report = machine.report().unwrap();
    let Some(ConsoleLine::Start(start)) = machine.lines().into_iter().next() else {
        panic!("no start line: {}", machine.console());
    };
    assert_eq!(
        (start.nonce, start.boots, start.vcpus_running, start.vcpus),
        (report.nonce, 1, 2, 2)
    );
    assert_eq!(start.walk_bytes, report.walk_bytes);
    for line in &log.lines {
        assert_eq!(
            (line.nonce, line.boots, line.errors, line.backwards),
            (report.nonce, 1, 0, 0)
        );
        assert_eq!(line.tsc_khz, report.tsc_khz);
        assert!(line.max_gap_ticks > 0);
    }
}

#[test]
fn without_the_word_it_is_silent() {
    let machine = Machine::boot(16 << 20, 1, CommandLine::new().period_ms(1));
    machine.report_when("it takes turns", |report| {
        report.slots[0].sequence > 1_000_000
    });
    assert_eq!(machine.console(), "");
}

#[test]
fn clear_is_obeyed_and_answered_and_nonsense_is_not() {
    let machine = start();
    machine.type_in(
        "clearly\r\nclear\n\n\ncrash-but-much-too-long-a-line-to-be-a-command-of-this-guest\n",
    );
    machine.until("it answered all", |machine| {
        (answers(machine).len() >= 3).then_some(())
    });
    machine.report_when("it cleared", |report| report.clears == 1);
    assert_eq!(answers(&machine), ["unknown", "clear", "unknown"]);
}

#[test]
fn each_typed_end_comes_true() {
    for (command, end) in [
        ("reset\n", End::KeyboardReset),
        ("acpi-reset\n", End::AcpiReset),
        ("acpi-off\n", End::AcpiOff),
        ("crash\n", End::TripleFault),
    ] {
        let machine = start();
        machine.type_in(command);
        assert_eq!(machine.end(), end);
    }
}

#[test]
fn each_mailed_end_comes_true() {
    for (command, end) in [
        (COMMAND_ACPI_RESET, End::AcpiReset),
        (COMMAND_CRASH, End::TripleFault),
    ] {
        let machine = Machine::boot(16 << 20, 1, CommandLine::new());
        machine.report_when("it booted", |report| report.slots[0].sequence > 0);
        machine.mail(command);
        assert_eq!(machine.end(), end);
    }
}

#[test]
fn it_ends_after_so_many_whole_lines() {
    let line = CommandLine::new().console().period_ms(10);
    for (line, end) in [
        (line.clone().reset_after_lines(3), End::KeyboardReset),
        (line.off_after_lines(3), End::AcpiOff),
    ] {
        let machine = Machine::boot(16 << 20, 1, line);
        assert_eq!(machine.end(), end);
        assert!(machine.console().ends_with('\n'));
        assert_eq!(machine.status_lines().lines.len(), 3);
    }
}

#[test]
fn a_warm_boot_counts_and_draws_a_new_nonce() {
    let memory = blank_memory(&[(0, 16 << 20)]);
    let line = || {
        CommandLine::new()
            .walk()
            .console()
            .period_ms(10)
            .reset_after_lines(2)
    };
    let mut text = String::new();
    let mut nonces = Vec::new();
    for boots in 1..=3 {
        let machine = Machine::boot_on(memory.clone(), 1, line());
        assert_eq!(machine.end(), End::KeyboardReset);
        let report = machine.report().unwrap();
        assert_eq!((report.boots, report.faults()), (boots, 0));
        assert!(!nonces.contains(&report.nonce));
        nonces.push(report.nonce);
        text.push_str(&machine.console());
    }
    let log = baton_guest::StatusLog::parse(&text).unwrap();
    assert_eq!(
        log.lines
            .iter()
            .map(|line| (line.boots, line.line))
            .collect::<Vec<_>>(),
        [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    );
}
