//! What a device may signal: an edge, or the level of a line.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

/// Something to be told that an event happened: an edge-triggered interrupt, or the wake-up of a thread.
///
/// It is called with a device's lock held, from vCPU threads and the control thread: it must not lock a device, must
/// not block, and copes with being called more often than needed.
pub trait Trigger: Send + Sync {
    /// Signals the event.
    fn trigger(&self);
}

/// A level-triggered interrupt line. The rules of [`Trigger`] hold.
pub trait IrqLine: Send + Sync {
    /// Drives the line; repeating a level changes nothing.
    fn set(&self, high: bool);
}

impl<F: Fn() + Send + Sync> Trigger for F {
    fn trigger(&self) {
        self();
    }
}

impl<T: Trigger + ?Sized> Trigger for Arc<T> {
    fn trigger(&self) {
        (**self).trigger();
    }
}

/// One of several drivers of one line, which is high while any of them holds it up.
pub struct SharedLine {
    line: Arc<dyn IrqLine>,
    /// One bit a driver.
    held: Arc<Mutex<u8>>,
    own: u8,
}

impl SharedLine {
    /// Two drivers of a line that is low.
    #[must_use]
    pub fn two(line: Arc<dyn IrqLine>) -> [Self; 2] {
        let held = Arc::new(Mutex::new(0));
        [1, 2].map(|own| Self {
            line: Arc::clone(&line),
            held: Arc::clone(&held),
            own,
        })
    }
}

impl IrqLine for SharedLine {
    fn set(&self, high: bool) {
        // Kept while the line is driven: of two drivers, the last one's level stands.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held = if high {
            *held | self.own
        } else {
            *held & !self.own
        };
        self.line.set(*held != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Level(Mutex<bool>);

    impl IrqLine for Level {
        fn set(&self, high: bool) {
            *self.0.lock().unwrap() = high;
        }
    }

    #[test]
    fn a_shared_line_is_high_while_one_driver_holds_it() {
        let level = Arc::new(Level(Mutex::new(false)));
        let [one, other] = SharedLine::two(level.clone());
        for (line, high, expected) in [
            (&one, true, true),
            (&other, true, true),
            (&one, false, true),
            (&other, false, false),
        ] {
            line.set(high);
            assert_eq!(*level.0.lock().unwrap(), expected);
        }
    }
}
