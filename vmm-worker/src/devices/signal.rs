//! What a device may signal: an edge, or the level of a line.

use std::sync::Arc;

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
