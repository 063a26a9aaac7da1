//! The lines that the guest prints.
//!
//! ```text
//! baton-guest start version=1 nonce=0123456789abcdef boot=1 cpus=1/1 walk=0 tsc_khz=2600000
//! baton-guest nonce=0123456789abcdef boot=1 line=1 seq=123 sweeps=0 errors=0 back=0 maxgap_ticks=9 tsc_khz=2600000
//! baton-guest command=clear
//! ```

use std::str::FromStr;

use thiserror::Error;

/// How each line begins.
const PREFIX: &str = "baton-guest ";
/// The longest line that is looked at, in bytes.
const LINE_MAX: usize = 512;

/// One line of the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleLine {
    /// The first line after a boot.
    Start(StartLine),
    /// The line of each period.
    Status(StatusLine),
    /// A command was read, and is obeyed now: its word, or `unknown`.
    Command(String),
}

/// What the guest says when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartLine {
    /// Version of the report's layout.
    pub version: u64,
    /// Chosen at this boot.
    pub nonce: u64,
    /// Boots since the RAM was blank.
    pub boots: u64,
    /// vCPUs that run.
    pub vcpus_running: u64,
    /// vCPUs that the command line asked for.
    pub vcpus: u64,
    /// Bytes that the walker covers.
    pub walk_bytes: u64,
    /// The TSC's frequency in kHz.
    pub tsc_khz: u64,
}

/// How the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusLine {
    /// Chosen at this boot.
    pub nonce: u64,
    /// Boots since the RAM was blank.
    pub boots: u64,
    /// Number of this line since boot, from 1 on.
    pub line: u64,
    /// Turn of the first vCPU.
    pub sequence: u64,
    /// Sweeps that every vCPU has completed.
    pub sweeps: u64,
    /// Pages found wrong and broken sequences, over all vCPUs.
    pub errors: u64,
    /// Steps of the TSC backwards, over all vCPUs.
    pub backwards: u64,
    /// The largest gap of any vCPU since the statistics were cleared, in ticks.
    pub max_gap_ticks: u64,
    /// The TSC's frequency in kHz.
    pub tsc_khz: u64,
}

/// Why a console's lines are not those of one undisturbed guest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConsoleError {
    /// A line of the guest's that it does not print so.
    #[error("no line of the guest's: {line:?}")]
    Malformed {
        /// The line, shortened.
        line: String,
    },
    /// A line is missing, doubled or of another boot.
    #[error("after boot {boots}, line {line}, turn {sequence} of {nonce:016x} came {next:?}")]
    Broken {
        /// The boot nonce before.
        nonce: u64,
        /// The boot count before.
        boots: u64,
        /// The line before.
        line: u64,
        /// The turn before.
        sequence: u64,
        /// The line that came instead of the next.
        next: StatusLine,
    },
}

struct Fields<'a>(std::str::SplitAsciiWhitespace<'a>);

impl<'a> Fields<'a> {
    fn text(&mut self, key: &str) -> Option<&'a str> {
        self.0.next()?.strip_prefix(key)?.strip_prefix('=')
    }

    fn number<T: FromStr>(&mut self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }

    fn nonce(&mut self) -> Option<u64> {
        let text = self.text("nonce")?;
        (text.len() == 16)
            .then(|| u64::from_str_radix(text, 16).ok())
            .flatten()
    }

    fn end(mut self) -> Option<()> {
        self.0.next().is_none().then_some(())
    }
}

impl ConsoleLine {
    /// Reads one line, with or without its line end. `Ok(None)` when it is none of the guest's.
    ///
    /// # Errors
    ///
    /// [`ConsoleError::Malformed`] when it begins like one of the guest's and goes on otherwise.
    pub fn parse(line: &str) -> Result<Option<Self>, ConsoleError> {
        let Some(rest) = line.strip_prefix(PREFIX) else {
            return Ok(None);
        };
        let parsed = if line.len() > LINE_MAX {
            None
        } else if let Some(rest) = rest.strip_prefix("start ") {
            start(rest).map(Self::Start)
        } else if let Some(word) = rest.strip_prefix("command=") {
            Some(Self::Command(word.trim_end().to_owned()))
        } else {
            status(rest).map(Self::Status)
        };
        match parsed {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(ConsoleError::Malformed {
                line: line.chars().take(LINE_MAX).collect(),
            }),
        }
    }

    /// Reads what a console printed so far, lines of others left out. A last line without its line end is still being
    /// printed, and left out too.
    ///
    /// # Errors
    ///
    /// [`ConsoleError::Malformed`] at the first line that begins like one of the guest's and goes on otherwise.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, ConsoleError> {
        let whole = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        whole
            .filter_map(|line| Self::parse(line).transpose())
            .collect()
    }
}

fn start(rest: &str) -> Option<StartLine> {
    let mut fields = Fields(rest.split_ascii_whitespace());
    let (version, nonce, boots) = (
        fields.number("version")?,
        fields.nonce()?,
        fields.number("boot")?,
    );
    let (running, vcpus) = fields.text("cpus")?.split_once('/')?;
    let line = StartLine {
        version,
        nonce,
        boots,
        vcpus_running: running.parse().ok()?,
        vcpus: vcpus.parse().ok()?,
        walk_bytes: fields.number("walk")?,
        tsc_khz: fields.number("tsc_khz")?,
    };
    fields.end()?;
    Some(line)
}

fn status(rest: &str) -> Option<StatusLine> {
    let mut fields = Fields(rest.split_ascii_whitespace());
    let line = StatusLine {
        nonce: fields.nonce()?,
        boots: fields.number("boot")?,
        line: fields.number("line")?,
        sequence: fields.number("seq")?,
        sweeps: fields.number("sweeps")?,
        errors: fields.number("errors")?,
        backwards: fields.number("back")?,
        max_gap_ticks: fields.number("maxgap_ticks")?,
        tsc_khz: fields.number("tsc_khz")?,
    };
    fields.end()?;
    Some(line)
}

/// The status lines of a console, which must number on without a break within a boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusLog {
    /// The lines, in order.
    pub lines: Vec<StatusLine>,
}

impl StatusLog {
    /// Takes the status lines of what a console printed so far.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`] at the first line that is malformed, or that does not follow from the one before: the next line
    /// of the same boot with a later turn, or line 1 of the next boot with another nonce.
    pub fn parse(text: &str) -> Result<Self, ConsoleError> {
        let mut log = Self::default();
        for line in ConsoleLine::parse_all(text)? {
            if let ConsoleLine::Status(status) = line {
                log.push(status)?;
            }
        }
        Ok(log)
    }

    /// Appends the next line.
    ///
    /// # Errors
    ///
    /// [`ConsoleError::Broken`] when it does not follow from the last one.
    pub fn push(&mut self, next: StatusLine) -> Result<(), ConsoleError> {
        if let Some(last) = self.lines.last() {
            let goes_on = next.nonce == last.nonce
                && next.boots == last.boots
                && Some(next.line) == last.line.checked_add(1)
                && next.sequence > last.sequence;
            let booted = next.nonce != last.nonce
                && Some(next.boots) == last.boots.checked_add(1)
                && next.line == 1;
            if !goes_on && !booted {
                let StatusLine {
                    nonce,
                    boots,
                    line,
                    sequence,
                    ..
                } = *last;
                return Err(ConsoleError::Broken {
                    nonce,
                    boots,
                    line,
                    sequence,
                    next,
                });
            }
        }
        self.lines.push(next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "baton-guest nonce=00000000000000ab boot=1 line=4 seq=123 sweeps=2 errors=0 back=0 maxgap_ticks=9 tsc_khz=2600000\n";

    fn line(nonce: u64, boots: u64, line: u64, sequence: u64) -> StatusLine {
        StatusLine {
            nonce,
            boots,
            line,
            sequence,
            sweeps: 0,
            errors: 0,
            backwards: 0,
            max_gap_ticks: 0,
            tsc_khz: 1,
        }
    }

    #[test]
    fn each_kind_of_line_is_read() {
        let status = StatusLine {
            sweeps: 2,
            max_gap_ticks: 9,
            tsc_khz: 2_600_000,
            ..line(0xab, 1, 4, 123)
        };
        assert_eq!(
            ConsoleLine::parse(STATUS),
            Ok(Some(ConsoleLine::Status(status)))
        );
        let start = StartLine {
            version: 1,
            nonce: 0xab,
            boots: 2,
            vcpus_running: 3,
            vcpus: 4,
            walk_bytes: 4096,
            tsc_khz: 7,
        };
        let text = "baton-guest start version=1 nonce=00000000000000ab boot=2 cpus=3/4 walk=4096 tsc_khz=7";
        assert_eq!(
            ConsoleLine::parse(text),
            Ok(Some(ConsoleLine::Start(start)))
        );
        assert_eq!(
            ConsoleLine::parse("baton-guest command=clear\r\n"),
            Ok(Some(ConsoleLine::Command("clear".into())))
        );
        assert_eq!(ConsoleLine::parse("SeaBIOS"), Ok(None));
    }

    #[test]
    fn every_cut_or_lengthened_line_is_refused() {
        let whole = STATUS.trim_end();
        for end in PREFIX.len()..whole.rfind('=').unwrap() + 1 {
            assert!(
                ConsoleLine::parse(&whole[..end]).is_err(),
                "{}",
                &whole[..end]
            );
        }
        assert!(ConsoleLine::parse(&format!("{whole} more=1")).is_err());
        assert!(ConsoleLine::parse(&format!("{whole}{}", " ".repeat(LINE_MAX))).is_err());
    }

    #[test]
    fn a_log_is_unbroken_or_refused() {
        let next_after = |next| {
            let mut log = StatusLog::default();
            log.push(line(1, 1, 5, 100)).unwrap();
            log.push(next).is_ok()
        };
        assert!(next_after(line(1, 1, 6, 101)));
        assert!(next_after(line(2, 2, 1, 3)), "a reboot");
        for (what, next) in [
            ("doubled", line(1, 1, 5, 100)),
            ("missing", line(1, 1, 7, 200)),
            ("back in time", line(1, 1, 6, 100)),
            ("another guest", line(2, 1, 6, 101)),
            ("a cold boot", line(2, 1, 1, 3)),
            ("a boot with the old nonce", line(1, 2, 1, 3)),
            ("a boot too many", line(2, 3, 1, 3)),
        ] {
            assert!(!next_after(next), "{what}");
        }
    }

    #[test]
    fn a_line_that_is_being_printed_is_left_out() {
        let log = StatusLog::parse(&format!("boot noise\n{STATUS}baton-guest nonce=00")).unwrap();
        assert_eq!(log.lines.len(), 1);
    }
}
