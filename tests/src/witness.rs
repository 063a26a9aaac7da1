//! The guest's word on whether it was disturbed.

use baton_guest::Report;

/// A guest at one moment.
#[derive(Clone, Debug)]
pub struct Witness {
    report: Report,
}

impl Witness {
    /// What the guest reports, with every one of its vCPUs stopped.
    ///
    /// # Panics
    ///
    /// When the guest has seen a turn, a page, its clock or an interrupt go wrong.
    #[must_use]
    pub fn new(report: Report) -> Self {
        assert_eq!(report.panic_line, None, "the guest panicked");
        assert_eq!(report.faults(), 0, "the guest was disturbed: {report:#?}");
        for (vcpu, slot) in report.slots.iter().enumerate() {
            assert!(
                slot.running && slot.unbroken(),
                "the turns of vCPU {vcpu} are broken: {slot:#?}"
            );
        }
        Self { report }
    }

    /// The report.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Whether every vCPU has gone on since an earlier moment of the same boot.
    ///
    /// # Panics
    ///
    /// When this is another boot, or a vCPU has gone backwards.
    #[must_use]
    pub fn goes_on_from(&self, earlier: &Self) -> bool {
        let (now, then) = (&self.report, &earlier.report);
        assert_eq!(
            (now.nonce, now.boots),
            (then.nonce, then.boots),
            "the guest booted anew"
        );
        now.slots.iter().zip(&then.slots).all(|(now, then)| {
            assert!(
                now.sequence >= then.sequence,
                "the guest went backwards: {now:?} after {then:?}"
            );
            now.sequence > then.sequence
        })
    }
}
