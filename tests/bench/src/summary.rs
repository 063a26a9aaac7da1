//! Percentiles of a handful of samples.

use serde::Serialize;

/// Of one quantity, in its own unit.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    /// How many samples.
    pub(crate) count: usize,
    /// The least.
    pub(crate) min: f64,
    /// Half of them are no greater.
    pub(crate) p50: f64,
    /// 99 of 100 are no greater; of fewer than 100 samples, all.
    pub(crate) p99: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Summary {
    /// None of no samples.
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        // The nearest rank: the least sample that is no less than `percent` of all.
        let rank = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(index).copied()
        };
        Some(Self {
            count: sorted.len(),
            min: *sorted.first()?,
            p50: rank(50)?,
            p99: rank(99)?,
            max: *sorted.last()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let summary = Summary::of((1..=200).rev().map(f64::from)).unwrap();
        assert_eq!(
            (summary.min, summary.p50, summary.p99, summary.max),
            (1.0, 100.0, 198.0, 200.0)
        );
        let few = Summary::of([3.0, 1.0]).unwrap();
        assert_eq!((few.p50, few.p99), (1.0, 3.0));
        assert!(Summary::of([]).is_none());
    }
}
