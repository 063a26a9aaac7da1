//! The report in guest RAM, read from a copy of its bytes.

use thiserror::Error;

use crate::layout::*;

/// What the guest says about itself. Ticks are of its TSC, see [`Report::tsc_khz`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Chosen at this boot; never zero.
    pub nonce: u64,
    /// Boots since this RAM was blank; 1 after a cold boot.
    pub boots: u64,
    /// vCPUs that the command line asked for.
    pub vcpus: usize,
    /// vCPUs that run.
    pub vcpus_running: usize,
    /// The TSC's frequency in kHz, as the guest believes.
    pub tsc_khz: u64,
    /// Why it believes that.
    pub tsc_source: TscSource,
    /// What counts as a gap, in ticks.
    pub gap_ticks: u64,
    /// Bytes that the walker covers, over all vCPUs.
    pub walk_bytes: u64,
    /// Status lines printed.
    pub lines: u64,
    /// Line of the guest's source at which it panicked.
    pub panic_line: Option<u64>,
    /// TSC at boot.
    pub boot_tsc: u64,
    /// How often the statistics were cleared.
    pub clears: u64,
    /// One for each vCPU that the command line asked for.
    pub slots: Vec<Slot>,
}

/// Who told the guest how fast the TSC runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscSource {
    /// Nobody: it assumes [`TSC_ASSUMED_KHZ`].
    Assumed,
    /// `tsc_khz=` on the command line.
    CommandLine,
    /// CPUID leaf 0x4000_0010.
    Hypervisor,
    /// CPUID leaf 0x15.
    Crystal,
}

/// One vCPU's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Whether the vCPU was started.
    pub running: bool,
    /// Number of the turn that began last.
    pub sequence: u64,
    /// Number of the turn that ended last.
    pub sequence_done: u64,
    /// Checksum over all turns.
    pub chain: u64,
    /// Turns at which memory did not hold what the vCPU had left there.
    pub breaks: u64,
    /// TSC of the last turn.
    pub last_tsc: u64,
    /// Largest gap between two turns since boot, in ticks.
    pub max_gap: u64,
    /// Largest gap since the statistics were cleared, in ticks.
    pub cleared_max_gap: u64,
    /// TSC at which that one began.
    pub cleared_max_gap_start: u64,
    /// Gaps counted since boot.
    pub gaps: u64,
    /// Gaps counted since the statistics were cleared.
    pub cleared_gaps: u64,
    /// TSC at which the last counted gap began.
    pub last_gap_start: u64,
    /// Length of the last counted gap, in ticks.
    pub last_gap: u64,
    /// Steps of the TSC backwards.
    pub backwards: u64,
    /// The largest of them, in ticks.
    pub max_backwards: u64,
    /// How often this vCPU cleared its statistics; [`Report::clears`] when it has caught up.
    pub clears: u64,
    /// The walk over this vCPU's share of RAM.
    pub walk: Walk,
    /// The local timer, with `timer_us`.
    pub timer: Timer,
    /// Interrupts to the next vCPU, with `ipi_us`.
    pub ipis: Ipis,
}

/// A vCPU's local timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer {
    /// Interrupts taken.
    pub ticks: u64,
    /// TSC at which the vCPU saw the last one.
    pub last_tsc: u64,
    /// Largest time between two of them, as the vCPU saw them, in ticks of the TSC.
    pub max_gap: u64,
}

/// Interrupts from one vCPU to the next in a ring, or to itself when it is alone; each is sent when the one before has
/// arrived, so a lost one ends the counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipis {
    /// Those sent.
    pub sent: u64,
    /// Those of them that arrived.
    pub arrived: u64,
    /// Those that arrived though nobody sent them.
    pub extra: u64,
    /// Longest that one was under way, in ticks.
    pub max_ticks: u64,
}

/// The state of a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Pages in the share.
    pub pages: u64,
    /// Completed sweeps.
    pub sweeps: u64,
    /// Pages that did not hold what was written there.
    pub errors: u64,
    /// The last such page.
    pub last_error: Option<WalkError>,
    /// Ticks of the first sweep, over blank memory.
    pub first_sweep: u64,
    /// Ticks of the last sweep.
    pub last_sweep: u64,
    /// Ticks of the fastest sweep after the first; 0 before the second.
    pub min_sweep: u64,
    /// Median ticks of the last sweeps without a gap; 0 before there was one.
    pub median_sweep: u64,
    /// Rounds over all pages that began at the end of a gap.
    pub gap_rounds: u64,
    /// The last of them.
    pub last_gap_round: Option<GapRound>,
    /// Ticks of the slowest such round since the statistics were cleared.
    pub cleared_max_gap_round: u64,
}

/// A page that did not hold what was written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkError {
    /// Its guest-physical address.
    pub address: u64,
    /// The generation found.
    pub found: u64,
    /// The generation expected.
    pub expected: u64,
}

/// One visit of every page, from the end of a gap on: what the guest pays for cold mappings after an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GapRound {
    /// Ticks of the gap before it.
    pub gap: u64,
    /// Ticks of the round, without the gap.
    pub ticks: u64,
}

/// Where a vCPU is within its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnState {
    /// Between two turns.
    Complete,
    /// Within one; a stopped vCPU may well be.
    InFlight,
    /// The words are of different turns: read while the vCPU ran on. Read again, or stop it.
    Torn,
}

/// Why bytes are no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReportError {
    /// Fewer bytes than a report has.
    #[error("{found} bytes are too few for a report of {REPORT_SIZE}")]
    Short {
        /// Bytes given.
        found: usize,
    },
    /// The guest has not come to its report yet, or these are other bytes.
    #[error("the report begins with {found:#018x}, not with its magic: the guest has not booted")]
    NotBooted {
        /// The first word.
        found: u64,
    },
    /// Another program's layout.
    #[error("the report has layout version {found}, this library reads {VERSION}")]
    Version {
        /// The version found.
        found: u64,
    },
    /// A word that the guest never writes there.
    #[error("{word} is {found}, which no guest reports")]
    Impossible {
        /// Which word.
        word: &'static str,
        /// What it holds.
        found: u64,
    },
}

struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn at(&self, offset: usize) -> Result<u64, ReportError> {
        let short = ReportError::Short {
            found: self.0.len(),
        };
        let bytes = self
            .0
            .get(offset..)
            .and_then(<[u8]>::first_chunk::<8>)
            .ok_or(short)?;
        Ok(u64::from_le_bytes(*bytes))
    }

    fn vcpus(&self, offset: usize, word: &'static str, max: usize) -> Result<usize, ReportError> {
        let found = self.at(offset)?;
        usize::try_from(found)
            .ok()
            .filter(|count| (1..=max).contains(count))
            .ok_or(ReportError::Impossible { word, found })
    }
}

impl Report {
    /// Reads the report from a copy of the [`REPORT_SIZE`] bytes at guest-physical [`REPORT_ADDRESS`]. Words that change
    /// while the guest runs are as they were when each was copied; see [`Slot::turn`].
    ///
    /// # Errors
    ///
    /// [`ReportError`] when the bytes are no report, above all [`ReportError::NotBooted`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() < REPORT_SIZE {
            return Err(ReportError::Short { found: bytes.len() });
        }
        let words = Words(bytes);
        let (magic, version, nonce) = (
            words.at(MAGIC_OFFSET)?,
            words.at(VERSION_OFFSET)?,
            words.at(NONCE_OFFSET)?,
        );
        if magic != MAGIC {
            return Err(ReportError::NotBooted { found: magic });
        }
        if version != VERSION {
            return Err(ReportError::Version { found: version });
        }
        if nonce == 0 {
            return Err(ReportError::Impossible {
                word: "the nonce",
                found: 0,
            });
        }
        let vcpus = words.vcpus(VCPUS_OFFSET, "the number of vCPUs", MAX_VCPUS)?;
        let panic_line = words.at(PANIC_OFFSET)?;
        Ok(Self {
            nonce,
            boots: words.at(BOOTS_OFFSET)?,
            vcpus,
            vcpus_running: words.vcpus(
                VCPUS_RUNNING_OFFSET,
                "the number of running vCPUs",
                vcpus,
            )?,
            tsc_khz: words.at(TSC_KHZ_OFFSET)?,
            tsc_source: match words.at(TSC_SOURCE_OFFSET)? {
                TSC_ASSUMED => TscSource::Assumed,
                TSC_FROM_COMMAND_LINE => TscSource::CommandLine,
                TSC_FROM_HYPERVISOR => TscSource::Hypervisor,
                TSC_FROM_CRYSTAL => TscSource::Crystal,
                found => {
                    return Err(ReportError::Impossible {
                        word: "the source of the TSC's frequency",
                        found,
                    });
                }
            },
            gap_ticks: words.at(GAP_TICKS_OFFSET)?,
            walk_bytes: words.at(WALK_BYTES_OFFSET)?,
            lines: words.at(LINES_OFFSET)?,
            panic_line: (panic_line != 0).then_some(panic_line),
            boot_tsc: words.at(BOOT_TSC_OFFSET)?,
            clears: words.at(CLEARS_OFFSET)?,
            slots: (0..vcpus)
                .map(|vcpu| Slot::parse(&words, slot_offset(vcpu)))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Ticks in nanoseconds, by the guest's own idea of its TSC; saturating.
    #[must_use]
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        let nanoseconds = u128::from(ticks) * 1_000_000 / u128::from(self.tsc_khz.max(1));
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    /// The largest gap of any vCPU since the statistics were cleared, in ticks.
    #[must_use]
    pub fn cleared_max_gap(&self) -> u64 {
        self.slots
            .iter()
            .map(|slot| slot.cleared_max_gap)
            .max()
            .unwrap_or_default()
    }

    /// What no upgrade may cause, over all vCPUs: pages found wrong, broken sequences, steps of the TSC backwards,
    /// interrupts that nobody sent.
    #[must_use]
    pub fn faults(&self) -> u64 {
        let faults = |slot: &Slot| {
            [
                slot.walk.errors,
                slot.breaks,
                slot.backwards,
                slot.ipis.extra,
            ]
        };
        self.slots
            .iter()
            .flat_map(faults)
            .fold(0, u64::saturating_add)
    }

    /// Whether every vCPU has cleared its statistics as often as it was told to.
    #[must_use]
    pub fn cleared(&self) -> bool {
        self.slots
            .iter()
            .all(|slot| !slot.running || slot.clears == self.clears)
    }
}

impl Slot {
    fn parse(words: &Words<'_>, base: usize) -> Result<Self, ReportError> {
        let at = |offset| words.at(base + offset);
        let (errors, gap_rounds) = (at(ERRORS_OFFSET)?, at(GAP_ROUNDS_OFFSET)?);
        let last_error = WalkError {
            address: at(ERROR_ADDRESS_OFFSET)?,
            found: at(ERROR_FOUND_OFFSET)?,
            expected: at(ERROR_EXPECTED_OFFSET)?,
        };
        let last_gap_round = GapRound {
            gap: at(LAST_GAP_ROUND_GAP_OFFSET)?,
            ticks: at(LAST_GAP_ROUND_OFFSET)?,
        };
        Ok(Self {
            running: match at(STATE_OFFSET)? {
                STATE_ABSENT => false,
                STATE_RUNNING => true,
                found => {
                    return Err(ReportError::Impossible {
                        word: "a vCPU's state",
                        found,
                    });
                }
            },
            sequence: at(SEQUENCE_OFFSET)?,
            sequence_done: at(SEQUENCE_DONE_OFFSET)?,
            chain: at(CHAIN_OFFSET)?,
            breaks: at(BREAKS_OFFSET)?,
            last_tsc: at(LAST_TSC_OFFSET)?,
            max_gap: at(MAX_GAP_OFFSET)?,
            cleared_max_gap: at(CLEARED_MAX_GAP_OFFSET)?,
            cleared_max_gap_start: at(CLEARED_MAX_GAP_START_OFFSET)?,
            gaps: at(GAPS_OFFSET)?,
            cleared_gaps: at(CLEARED_GAPS_OFFSET)?,
            last_gap_start: at(LAST_GAP_START_OFFSET)?,
            last_gap: at(LAST_GAP_OFFSET)?,
            backwards: at(BACKWARDS_OFFSET)?,
            max_backwards: at(MAX_BACKWARDS_OFFSET)?,
            clears: at(SLOT_CLEARS_OFFSET)?,
            walk: Walk {
                pages: at(PAGES_OFFSET)?,
                sweeps: at(SWEEPS_OFFSET)?,
                errors,
                last_error: (errors != 0).then_some(last_error),
                first_sweep: at(FIRST_SWEEP_OFFSET)?,
                last_sweep: at(LAST_SWEEP_OFFSET)?,
                min_sweep: at(MIN_SWEEP_OFFSET)?,
                median_sweep: at(MEDIAN_SWEEP_OFFSET)?,
                gap_rounds,
                last_gap_round: (gap_rounds != 0).then_some(last_gap_round),
                cleared_max_gap_round: at(CLEARED_MAX_GAP_ROUND_OFFSET)?,
            },
            timer: Timer {
                ticks: at(TIMER_TICKS_OFFSET)?,
                last_tsc: at(TIMER_TSC_OFFSET)?,
                max_gap: at(TIMER_MAX_GAP_OFFSET)?,
            },
            ipis: Ipis {
                sent: at(IPIS_SENT_OFFSET)?,
                arrived: at(IPIS_ARRIVED_OFFSET)?,
                extra: at(IPIS_EXTRA_OFFSET)?,
                max_ticks: at(IPI_MAX_OFFSET)?,
            },
        })
    }

    /// Where the vCPU was within its turn when the words were copied.
    #[must_use]
    pub fn turn(&self) -> TurnState {
        match self.sequence.wrapping_sub(self.sequence_done) {
            0 => TurnState::Complete,
            1 => TurnState::InFlight,
            _ => TurnState::Torn,
        }
    }

    /// Whether every turn was taken exactly once, by the checksum and by what the vCPU itself saw. Meaningful of a
    /// stopped vCPU; while it runs, only if [`Slot::turn`] is not [`TurnState::Torn`], and even then a copy may be torn.
    #[must_use]
    pub fn unbroken(&self) -> bool {
        let chained = match self.turn() {
            TurnState::Complete => self.chain == chain(self.sequence),
            TurnState::InFlight => {
                self.chain == chain(self.sequence) || self.chain == chain(self.sequence_done)
            }
            TurnState::Torn => false,
        };
        self.breaks == 0 && chained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(bytes: &mut [u8], offset: usize, value: u64) {
        bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn booted() -> Vec<u8> {
        let mut bytes = vec![0; REPORT_SIZE];
        for (offset, value) in [
            (MAGIC_OFFSET, MAGIC),
            (VERSION_OFFSET, VERSION),
            (NONCE_OFFSET, 7),
            (BOOTS_OFFSET, 1),
            (VCPUS_OFFSET, 2),
            (VCPUS_RUNNING_OFFSET, 2),
        ] {
            set(&mut bytes, offset, value);
        }
        bytes
    }

    #[test]
    fn the_closed_form_is_the_sum_of_the_links() {
        let mut sum = 0_u64;
        for sequence in 0..1000 {
            assert_eq!(chain(sequence), sum);
            sum = sum.wrapping_add(chain_link(sequence + 1));
        }
    }

    #[test]
    fn a_booted_report_is_read() {
        let mut bytes = booted();
        set(&mut bytes, slot_offset(1) + SEQUENCE_OFFSET, 5);
        set(&mut bytes, slot_offset(1) + SEQUENCE_DONE_OFFSET, 5);
        set(&mut bytes, slot_offset(1) + CHAIN_OFFSET, chain(5));
        let report = Report::parse(&bytes).unwrap();
        assert_eq!((report.nonce, report.slots.len()), (7, 2));
        assert!(report.slots[1].unbroken());
    }

    #[test]
    fn a_lost_a_repeated_and_a_half_turn_are_told_apart() {
        let mut slot = Report::parse(&booted()).unwrap().slots[0].clone();
        (slot.sequence, slot.sequence_done) = (9, 9);
        for (chain_of, unbroken) in [(8, false), (9, true), (10, false)] {
            slot.chain = chain(chain_of);
            assert_eq!(slot.unbroken(), unbroken);
        }
        slot.sequence_done = 8;
        for (chain_of, unbroken) in [(7, false), (8, true), (9, true)] {
            slot.chain = chain(chain_of);
            assert_eq!(
                (slot.turn(), slot.unbroken()),
                (TurnState::InFlight, unbroken)
            );
        }
        slot.sequence_done = 5;
        assert_eq!((slot.turn(), slot.unbroken()), (TurnState::Torn, false));
    }

    #[test]
    fn bytes_that_are_no_report_are_refused() {
        assert_eq!(Report::parse(&[0; 8]), Err(ReportError::Short { found: 8 }));
        assert_eq!(
            Report::parse(&[0; REPORT_SIZE]),
            Err(ReportError::NotBooted { found: 0 })
        );
        for (offset, value) in [
            (VERSION_OFFSET, VERSION + 1),
            (NONCE_OFFSET, 0),
            (VCPUS_OFFSET, 0),
            (VCPUS_OFFSET, MAX_VCPUS as u64 + 1),
            (VCPUS_OFFSET, u64::MAX),
            (VCPUS_RUNNING_OFFSET, 3),
            (TSC_SOURCE_OFFSET, 9),
            (slot_offset(0) + STATE_OFFSET, 2),
        ] {
            let mut bytes = booted();
            set(&mut bytes, offset, value);
            assert!(Report::parse(&bytes).is_err(), "{offset:#x} = {value}");
        }
    }
}
