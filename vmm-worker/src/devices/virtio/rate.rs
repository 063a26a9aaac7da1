//! Rate limits: token buckets for bytes and for operations.
//!
//! A request goes when its buckets are not empty, and takes what it costs, also if that is more than there is: large
//! requests are never stuck, and on average the rate holds. Times are CLOCK_MONOTONIC nanoseconds, which both workers of
//! an upgrade read alike, so a bucket goes on filling through the pause.

use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::RateLimit;
use serde::Deserialize;
use serde::Serialize;

use crate::clock;
use crate::devices::state::StateError;

const NS: u128 = 1_000_000_000;
/// Nothing that is taken at once costs more than this many tokens (a request has less than 4 GiB, 2.7.5.2), so no bucket owes
/// more.
const MAX_DEBT: i64 = 1 << 33;

/// One bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    limit: RateLimit,
    /// Less than 0: owed.
    tokens: i64,
    /// When `tokens` was right.
    at_ns: u64,
}

/// Version 1.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SavedBucket {
    tokens: i64,
    at_ns: u64,
}

impl Bucket {
    /// A full bucket.
    #[must_use]
    pub fn new(limit: RateLimit, now_ns: u64) -> Self {
        Self {
            limit,
            tokens: capacity(limit),
            at_ns: now_ns,
        }
    }

    fn fill(&mut self, now_ns: u64) {
        let rate = u128::from(self.limit.per_second.max(1));
        let elapsed = u128::from(now_ns.saturating_sub(self.at_ns));
        let gained = elapsed * rate / NS;
        let room = u128::try_from(capacity(self.limit).saturating_sub(self.tokens)).unwrap_or(0);
        if gained >= room {
            self.tokens = capacity(self.limit);
            self.at_ns = now_ns.max(self.at_ns);
        } else {
            // What is not yet a whole token stays in the time.
            self.tokens += i64::try_from(gained).unwrap_or(i64::MAX);
            self.at_ns += u64::try_from(gained * NS / rate).unwrap_or(0);
        }
    }

    /// When the next request may go, in nanoseconds from now; 0: now.
    pub fn wait_ns(&mut self, now_ns: u64) -> u64 {
        self.fill(now_ns);
        if self.tokens > 0 {
            return 0;
        }
        let missing = u128::from(self.tokens.unsigned_abs()) + 1;
        let whole = missing * NS / u128::from(self.limit.per_second.max(1));
        u64::try_from(whole).unwrap_or(u64::MAX).max(1)
    }

    /// Takes what a request costs.
    pub fn take(&mut self, cost: u64) {
        let cost = i64::try_from(cost).unwrap_or(MAX_DEBT).min(MAX_DEBT);
        self.tokens = self.tokens.saturating_sub(cost).max(-MAX_DEBT);
    }

    /// Says how full it is.
    #[must_use]
    pub fn save(&self) -> SavedBucket {
        let Self {
            limit: _,
            tokens,
            at_ns,
        } = self;
        SavedBucket {
            tokens: *tokens,
            at_ns: *at_ns,
        }
    }

    /// Takes over how full it was. A smaller limit than the one that it was saved with holds from now on.
    ///
    /// # Errors
    ///
    /// [`StateError::Field`] for a debt that no request makes.
    pub fn load(&mut self, saved: SavedBucket, now_ns: u64) -> Result<(), StateError> {
        let SavedBucket { tokens, at_ns } = saved;
        if tokens < -MAX_DEBT {
            return Err(StateError::field(
                "bucket.tokens",
                tokens.unsigned_abs(),
                "owed, more than any request costs",
            ));
        }
        self.tokens = tokens.min(capacity(self.limit));
        // The clock of a host that has booted since is behind that of a guest that comes out of its file.
        self.at_ns = at_ns.min(now_ns);
        Ok(())
    }
}

/// The buckets of a device, or of one direction.
#[derive(Debug)]
pub struct Limits {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// Version 1.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SavedLimits {
    bytes: Option<SavedBucket>,
    operations: Option<SavedBucket>,
}

impl Limits {
    /// Full buckets.
    #[must_use]
    pub fn new(limits: DeviceLimits, now_ns: u64) -> Self {
        let DeviceLimits { bytes, operations } = limits;
        let bucket = |limit: Option<_>| limit.map(|limit| Bucket::new(limit, now_ns));
        Self {
            bytes: bucket(bytes),
            operations: bucket(operations),
        }
    }

    /// When the next request may go, in nanoseconds from now; 0: now.
    pub fn wait_ns(&mut self) -> u64 {
        if self.bytes.is_none() && self.operations.is_none() {
            return 0;
        }
        let now = clock::monotonic_ns();
        let wait = |bucket: &mut Option<Bucket>| {
            let bucket = bucket.as_mut();
            bucket.map_or(0, |bucket| bucket.wait_ns(now))
        };
        wait(&mut self.bytes).max(wait(&mut self.operations))
    }

    /// Whether a request that is under way has to wait before it moves more bytes.
    pub fn out_of_bytes(&mut self) -> bool {
        let wait = |bucket: &mut Bucket| bucket.wait_ns(clock::monotonic_ns());
        self.bytes.as_mut().is_some_and(|bucket| wait(bucket) > 0)
    }

    /// Takes what one request of so many bytes costs.
    pub fn take(&mut self, bytes: usize) {
        self.take_bytes(bytes as u64);
        self.take_operation();
    }

    /// Takes what so many bytes of a request cost.
    pub fn take_bytes(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
    }

    /// Takes what a request costs, whatever its size.
    pub fn take_operation(&mut self) {
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }

    /// Says how full they are.
    #[must_use]
    pub fn save(&self) -> SavedLimits {
        let Self { bytes, operations } = self;
        SavedLimits {
            bytes: bytes.as_ref().map(Bucket::save),
            operations: operations.as_ref().map(Bucket::save),
        }
    }

    /// Takes over how full they were. A limit that only one of the two has begins full, or ends.
    ///
    /// # Errors
    ///
    /// As [`Bucket::load`].
    pub fn load(&mut self, saved: SavedLimits, now_ns: u64) -> Result<(), StateError> {
        let SavedLimits { bytes, operations } = saved;
        let own = [&mut self.bytes, &mut self.operations];
        for (own, saved) in own.into_iter().zip([bytes, operations]) {
            if let (Some(own), Some(saved)) = (own, saved) {
                own.load(saved, now_ns)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl SavedLimits {
    /// What there is in the bucket for bytes.
    pub(crate) fn bytes_left(&self) -> Option<i64> {
        self.bytes.map(|bucket| bucket.tokens)
    }

    /// Buckets that owe more than any request costs.
    pub(crate) fn impossible(limits: DeviceLimits) -> Self {
        let mut saved = Limits::new(limits, 0).save();
        for bucket in [&mut saved.bytes, &mut saved.operations] {
            bucket
                .iter_mut()
                .for_each(|bucket| bucket.tokens = i64::MIN);
        }
        saved
    }
}

fn capacity(limit: RateLimit) -> i64 {
    i64::try_from(limit.burst.max(1)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn bucket() -> Bucket {
        let limit = RateLimit {
            per_second: 1000,
            burst: 50,
        };
        Bucket::new(limit, SECOND)
    }

    #[test]
    fn the_rate_holds_whatever_the_requests_cost() {
        for cost in [1, 7, 50, 400] {
            let (mut bucket, mut now, mut taken) = (bucket(), SECOND, 0);
            while now < 11 * SECOND {
                match bucket.wait_ns(now) {
                    0 => {
                        bucket.take(cost);
                        taken += cost;
                    }
                    wait => now += wait,
                }
            }
            assert!(
                (10_000..=10_050 + cost).contains(&taken),
                "cost {cost}: {taken} in 10 s"
            );
        }
    }

    #[test]
    fn a_saved_bucket_goes_on_and_never_begins_full() {
        let mut old = bucket();
        old.take(60);
        let mut new = bucket();
        new.load(old.save(), 2 * SECOND).unwrap();
        assert_eq!(new.wait_ns(SECOND), 11_000_000);
        assert_eq!(new.wait_ns(SECOND + 5_000_000), 6_000_000);
        assert_eq!(new.wait_ns(SECOND + 11_000_000), 0);
    }

    #[test]
    fn a_bucket_goes_on_filling_under_a_clock_that_has_begun_anew() {
        let mut old = bucket();
        old.take(60);
        let mut saved = old.save();
        saved.at_ns = 1000 * SECOND;
        let mut new = bucket();
        new.load(saved, 2 * SECOND).unwrap();
        assert_eq!(new.wait_ns(2 * SECOND), 11_000_000);
        assert_eq!(new.wait_ns(2 * SECOND + 11_000_000), 0);
    }

    #[test]
    fn impossible_buckets_are_refused() {
        let good = bucket().save();
        let saved = SavedBucket {
            tokens: -MAX_DEBT - 1,
            ..good
        };
        match bucket().load(saved, 2 * SECOND) {
            Err(StateError::Field { name, .. }) => assert_eq!(name, "bucket.tokens"),
            other => panic!("{other:?}"),
        }
        let mut full = bucket();
        let saved = SavedBucket {
            tokens: i64::MAX,
            ..good
        };
        full.load(saved, 2 * SECOND).unwrap();
        assert_eq!(full.tokens, 50);
    }
}
