//! Judges the console of a Linux guest that was upgraded, rebooted and powered off (see `scenario.sh`): every line that the
//! guest's ticker wrote has to be there once and in order, its clocks have to go on, and its kernel has to be content.
//!
//! ```text
//! console FILE CPUS BOOTS TICKS
//! ```
//!
//! FILE has to show BOOTS boots of a guest with CPUS processors, of which the first counts to TICKS at least. All but the last
//! end with `reboot`, the last with the power button. Prints `ok: ...` and exits with 0, or says what is wrong, by line, and
//! exits with 1.
//!
//! What a UART still holds when its machine is reset is lost on hardware, too: only the last line before the end of a boot may
//! be cut short.

use std::fmt::Display;
use std::process::ExitCode;

/// What a kernel says when something is wrong: with interrupts, timers, clocks, processors or itself.
const COMPLAINTS: [&str; 21] = [
    "Oops",
    "BUG:",
    "WARNING:",
    "Call Trace",
    "Kernel panic",
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "rcu_sched",
    "rcu_preempt",
    "blocked for more than",
    "clocksource: timekeeping watchdog",
    "unstable",
    "nobody cared",
    "spurious",
    "unchecked MSR access",
    "unexpected",
    "lost timer",
    "do_IRQ",
    "No irq handler",
    "firmware bug",
];

/// What a kernel says, and rightly, of an emulated host: that it is slow, and that its processor has no invariant TSC, without
/// which Linux takes those of several AMD processors for unsynchronised (`unsynchronized_tsc()`, arch/x86/kernel/tsc.c).
const EMULATED: [&str; 3] = [
    "hrtimer: interrupt took ",
    "perf: interrupt took too long",
    "tsc: Marking TSC unstable due to TSCs unsynchronized",
];

/// What a kernel says at the end. Anything else, once the ticker runs, is a complaint.
const FAREWELLS: [&str; 2] = ["reboot: Restarting system", "reboot: Power down"];

/// The first line of a kernel.
const BOOT: &str = "Linux version ";

/// How far the two clocks may drift apart during one boot, in nanoseconds: nobody sets either, but a guest that waits for a
/// processor between reading one and reading the other sees them apart.
const DRIFT: i128 = 1_000_000_000;

struct Expected {
    cpus: usize,
    boots: usize,
    ticks: u64,
}

#[derive(Debug, Default, Clone, PartialEq)]
enum End {
    #[default]
    None,
    Reboot,
    PowerButton,
}

#[derive(Debug, Default)]
struct Boot {
    up: bool,
    cpus: bool,
    tick: u64,
    /// The last tick's clocks, in nanoseconds.
    clocks: Option<(i128, i128)>,
    /// Realtime less monotonic, at the first tick.
    offset: Option<i128>,
    end: End,
    /// Its kernel has said that it restarts or powers down.
    farewell: bool,
}

fn nanoseconds(text: &str) -> Option<i128> {
    let (seconds, fraction) = text.split_once('.')?;
    if fraction.len() != 9 {
        return None;
    }
    Some(seconds.parse::<i128>().ok()? * 1_000_000_000 + fraction.parse::<i128>().ok()?)
}

/// `tick N monotonic SECONDS realtime SECONDS`
fn tick(line: &str) -> Option<(u64, i128, i128)> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["tick", n, "monotonic", monotonic, "realtime", realtime] => Some((
            n.parse().ok()?,
            nanoseconds(monotonic)?,
            nanoseconds(realtime)?,
        )),
        _ => None,
    }
}

/// The text of a kernel's message, which starts with `[seconds.microseconds] `.
fn kernel_message(line: &str) -> Option<&str> {
    let (stamp, text) = line.strip_prefix('[')?.split_once("] ")?;
    let (seconds, micros) = stamp.trim_start().split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(seconds) && digits(micros)).then_some(text)
}

fn complaint(text: &str) -> Option<&'static str> {
    let text = text.to_lowercase();
    COMPLAINTS
        .into_iter()
        .find(|word| text.contains(&word.to_lowercase()))
}

impl Boot {
    fn line(&mut self, line: &str, expected: &Expected) -> Result<(), String> {
        if self.end != End::None && tick(line).is_none() {
            return self.last_words(line);
        }
        if let Some(message) = kernel_message(line) {
            if EMULATED.iter().any(|words| message.starts_with(words)) {
                return Ok(());
            }
            if let Some(word) = complaint(message) {
                return Err(format!("the guest's kernel complains ({word})"));
            }
            return if self.up {
                Err("the guest's kernel has something to say".to_owned())
            } else {
                Ok(())
            };
        }
        if !self.up {
            // The ticker's first line; before it, programs of the initramfs may speak.
            self.up = line.starts_with("guest: up, linux ");
            if self.up && !line.ends_with(", clocksource kvm-clock") {
                return Err("the guest does not take the clock that KVM offers".to_owned());
            }
            return Ok(());
        }
        if let Some((number, monotonic, realtime)) = tick(line) {
            return self.tick(number, monotonic, realtime);
        }
        let range = match expected.cpus {
            1 => "0".to_owned(),
            n => format!("0-{}", n - 1),
        };
        if line == format!("cpus {} online {range}", expected.cpus) {
            self.cpus = true;
        } else if line == "guest: reboot" {
            self.end = End::Reboot;
        } else if line == "guest: power button" {
            self.end = End::PowerButton;
        } else {
            return Err("this line was not to be there".to_owned());
        }
        Ok(())
    }

    /// A kernel that goes down writes at once, also into the middle of what its programs still have to say.
    fn last_words(&mut self, line: &str) -> Result<(), String> {
        if let Some(word) = complaint(line) {
            return Err(format!("the guest's kernel complains ({word})"));
        }
        self.farewell |= FAREWELLS.iter().any(|words| line.contains(words));
        Ok(())
    }

    fn tick(&mut self, number: u64, monotonic: i128, realtime: i128) -> Result<(), String> {
        // A tick that the kernel's last words went through is none, see `last_words`.
        let torn = self.end != End::None && number > self.tick;
        if number != self.tick + 1 && !torn {
            return Err(format!("tick {number} after tick {}", self.tick));
        }
        self.tick = number;
        let offset = realtime - monotonic;
        let first = *self.offset.get_or_insert(offset);
        if let Some((last_monotonic, last_realtime)) = self.clocks.replace((monotonic, realtime)) {
            if monotonic <= last_monotonic || realtime <= last_realtime {
                return Err("a clock stepped back".to_owned());
            }
        }
        if (offset - first).abs() > DRIFT {
            return Err(format!(
                "the clocks are {} ms further apart than when it booted",
                (offset - first) / 1_000_000
            ));
        }
        Ok(())
    }

    fn ends(&self, last: bool) -> Result<(), String> {
        let end = if last { End::PowerButton } else { End::Reboot };
        if !self.up || !self.cpus || self.tick == 0 {
            return Err("a boot did not reach its user space".to_owned());
        }
        if self.end != end {
            return Err(format!("a boot ended with {:?}, not {end:?}", self.end));
        }
        if !self.farewell {
            return Err("the kernel did not say farewell".to_owned());
        }
        Ok(())
    }
}

/// What the whole console says, as a sentence.
fn judge(console: &str, expected: &Expected) -> Result<String, String> {
    let at = |number: usize, line: &str, fault: &dyn Display| {
        format!("line {}: {fault}: {line:?}", number + 1)
    };
    let mut boots: Vec<Boot> = Vec::new();
    for (number, line) in console.lines().enumerate() {
        let line = line.trim_end_matches('\r');
        if line.contains(BOOT) && !line.starts_with("guest: ") {
            if let Some(boot) = boots.last() {
                boot.ends(false).map_err(|fault| at(number, line, &fault))?;
            }
            boots.push(Boot::default());
            continue;
        }
        let Some(boot) = boots.last_mut() else {
            // What comes before a kernel has a console.
            continue;
        };
        boot.line(line, expected)
            .map_err(|fault| at(number, line, &fault))?;
    }
    let (Some(first), Some(last)) = (boots.first(), boots.last()) else {
        return Err("no kernel spoke".to_owned());
    };
    last.ends(true)?;
    if boots.len() != expected.boots {
        return Err(format!("{} boots, not {}", boots.len(), expected.boots));
    }
    if first.tick < expected.ticks {
        return Err(format!(
            "the first boot counted to {}, not to {}",
            first.tick, expected.ticks
        ));
    }
    let ticks: u64 = boots.iter().map(|boot| boot.tick).sum();
    Ok(format!(
        "{ticks} ticks in {} boots, each once and in order",
        boots.len()
    ))
}

/// The text without what Linux says, once a boot, when the host is too busy to run a processor of its for a while
/// (`hrtimer_interrupt`, kernel/time/hrtimer.c), in the middle of a line or not.
fn without_late_timers(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("] hrtimer: interrupt took ") {
        let stamp = before.rfind('[');
        let end = after.split_once(" ns\r\n");
        match (stamp, end) {
            (Some(stamp), Some((_, after))) => {
                kept.push_str(&before[..stamp]);
                rest = after;
            }
            _ => break,
        }
    }
    kept + rest
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match &arguments[..] {
        [file, cpus, boots, ticks] => (|| {
            Some((
                std::fs::read(file).ok()?,
                Expected {
                    cpus: cpus.parse().ok()?,
                    boots: boots.parse().ok()?,
                    ticks: ticks.parse().ok()?,
                },
            ))
        })(),
        _ => None,
    };
    let Some((console, expected)) = parsed else {
        eprintln!("usage: console FILE CPUS BOOTS TICKS");
        return ExitCode::from(2);
    };
    // A byte that is no text is a line that was not to be there.
    let console = without_late_timers(&String::from_utf8_lossy(&console));
    match judge(&console, &expected) {
        Ok(summary) => {
            println!("ok: {summary}");
            ExitCode::SUCCESS
        }
        Err(fault) => {
            println!("{fault}");
            ExitCode::from(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: Expected = Expected {
        cpus: 4,
        boots: 2,
        ticks: 2,
    };
    const GOOD: &str = "\
[    0.000000] Linux version 6.12 (debian)\r
[    1.000000] Run /init as init process\r
guest: up, linux 6.12, clocksource kvm-clock\r
cpus 4 online 0-3\r
tick 1 monotonic 0.100000000 realtime 1795396937.100000000\r
tick 2 monotonic 0.200000000 realtime 1795396937.200000000\r
guest: reboot\r
[    2.000000] reboot: Restarting system\r
tick 3 mon[    0.000000] Linux version 6.12 (debian)\r
guest: up, linux 6.12, clocksource kvm-clock\r
cpus 4 online 0-3\r
tick 1 monotonic 0.100000000 realtime 1795396947.100000000\r
guest: power button\r
[    2.000000] reboot: Power down\r
";

    #[test]
    fn a_good_console_is_good() {
        assert_eq!(
            judge(GOOD, &EXPECTED).unwrap(),
            "3 ticks in 2 boots, each once and in order"
        );
    }

    #[test]
    fn what_a_busy_host_has_the_kernel_say_is_no_fault_and_hides_none() {
        let late = "[   57.223581] hrtimer: interrupt took 17959641 ns\r\n";
        let within = GOOD.replace("tick 2 monot", &format!("tick 2 {late}monot"));
        let between = GOOD.replace("tick 2 monot", &format!("{late}tick 2 monot"));
        for text in [within, between] {
            assert_ne!(text, GOOD);
            assert_eq!(without_late_timers(&text), GOOD);
        }
        for other in [
            "[    1.0] hrtimer: interrupt took long\r\n",
            "hrtimer: interrupt took 5 ns\r\n",
            "[    1.0] BUG: soft lockup\r\n",
        ] {
            assert_eq!(without_late_timers(other), other);
        }
    }

    #[test]
    fn each_fault_is_found() {
        for (from, to, fault) in [
            ("tick 2 ", "tick 3 ", "tick 3 after tick 1"),
            ("tick 2 ", "tick 1 ", "tick 1 after tick 1"),
            ("tick 2 ", "tick2 ", "not to be there"),
            ("monotonic 0.2", "monotonic 0.0", "stepped back"),
            ("937.2", "936.2", "stepped back"),
            ("937.2", "939.2", "further apart"),
            ("guest: power button\r\n", "", "something to say"),
            (
                "guest: reboot",
                "guest: power button",
                "ended with PowerButton",
            ),
            ("[    2.000000] reboot: Power down\r\n", "", "farewell"),
            ("cpus 4 online 0-3", "cpus 3 online 0-2", "not to be there"),
            (
                "clocksource kvm-clock",
                "clocksource tsc",
                "the clock that KVM offers",
            ),
            ("Run /init", "WARNING: CPU: 0", "complains"),
            (
                "Run /init",
                "tsc: Marking TSC unstable due to check_tsc_sync_source failed",
                "complains",
            ),
            (
                "guest: reboot",
                "[    2.000000] clocksource: jiffies\r\nguest: reboot",
                "something to say",
            ),
            (
                "guest: reboot",
                "CLOCK-ERROR realtime jumped by 2s\r\nguest: reboot",
                "not to be there",
            ),
            ("guest: reboot", "gu\u{0}est: reboot", "not to be there"),
            (
                "[    2.000000] reboot: R",
                "tick 2 monotonic 0.300000000 realtime 1795396937.300000000\r\n[    2.000000] reboot: R",
                "tick 2 after tick 2",
            ),
        ] {
            let console = GOOD.replacen(from, to, 1);
            assert_ne!(console, GOOD, "{from}");
            let said = judge(&console, &EXPECTED).unwrap_err();
            assert!(said.contains(fault), "{from} -> {to}: {said}");
        }
    }

    #[test]
    fn a_tick_torn_by_the_kernels_last_words_is_not_missed() {
        let torn = "ti[    1.900000] sd: Synchronizing\r\nck 3 monotonic 0.3\r\n\
                    tick 4 monotonic 0.400000000 realtime 1795396937.400000000\r\n[    2.000000] reboot: R";
        let console = GOOD.replacen("[    2.000000] reboot: R", torn, 1);
        assert!(judge(&console, &EXPECTED).is_ok());
    }

    #[test]
    fn too_few_boots_or_ticks_are_found() {
        for expected in [
            Expected {
                boots: 3,
                ..EXPECTED
            },
            Expected {
                ticks: 3,
                ..EXPECTED
            },
        ] {
            assert!(judge(GOOD, &expected).is_err());
        }
    }
}
