//! MSI-X (PCI Local Bus 3.0, 6.8.2): the table that a guest writes, the bits of what is pending, and how a vector fires.
//!
//! A vector fires through an interrupt route that KVM holds, by an eventfd. A route is changed by the control thread a
//! moment after the guest has changed the vector, since changing one can take KVM milliseconds; until then the vector
//! fires by hand, with the message that the guest wrote. So the guest never waits for a route, and neither does an
//! upgrade: routes that differ from those announced before the pause are set after it.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use serde::Deserialize;
use serde::Serialize;

use crate::devices::state::StateError;

/// Bytes of a table entry: address, upper address, data, vector control.
pub const ENTRY_SIZE: u64 = 16;
/// Vector control: masked.
const MASKED: u32 = 1;
/// Message control (offset 2 of the capability): enabled.
pub const ENABLE: u16 = 1 << 15;
/// Message control: all vectors masked.
pub const FUNCTION_MASK: u16 = 1 << 14;
/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// The most vectors of a function here, so that vectors of all functions have interrupt numbers of their own.
pub const MAX_VECTORS: u16 = 64;

/// A message: what a vector writes, where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Guest-physical address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// How vectors leave this process. Called with a table locked: it must neither block nor lock a device.
pub trait Sink: Send + Sync {
    /// Fires the route that was installed for a vector.
    fn fire(&self, vector: u16);
    /// Delivers a message by hand.
    fn deliver(&self, message: Message);
    /// Says that a route is no longer what the guest wants.
    fn stale(&self);
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    message: Message,
    masked: bool,
    pending: bool,
    /// The route that KVM holds; none while it is being changed.
    routed: Option<Message>,
}

#[derive(Debug)]
struct Table {
    enabled: bool,
    function_masked: bool,
    entries: Vec<Entry>,
}

/// A function's vectors.
pub struct Msix {
    table: Mutex<Table>,
    sink: Box<dyn Sink>,
}

/// Version 1. Whether it is enabled is in the configuration space.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedMsix {
    entries: Vec<SavedEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedEntry {
    message: Message,
    masked: bool,
    pending: bool,
}

const RESET: Entry = Entry {
    message: Message {
        address: 0,
        data: 0,
    },
    masked: true,
    pending: false,
    routed: None,
};

impl Msix {
    /// `vectors` vectors, all masked.
    #[must_use]
    pub fn new(vectors: u16, sink: Box<dyn Sink>) -> Self {
        Self {
            table: Mutex::new(Table {
                enabled: false,
                function_masked: false,
                entries: vec![RESET; vectors.min(MAX_VECTORS).into()],
            }),
            sink,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.table().entries.len()).unwrap_or(0)
    }

    /// Masks all, as at power-on. Routes stay until they are changed.
    pub fn reset(&self) {
        let mut table = self.table();
        table.enabled = false;
        table.function_masked = false;
        for entry in &mut table.entries {
            let routed = entry.routed;
            *entry = Entry { routed, ..RESET };
        }
    }

    /// Takes over what the guest wrote to message control.
    pub fn control(&self, control: u16) {
        let mut table = self.table();
        table.enabled = control & ENABLE != 0;
        table.function_masked = control & FUNCTION_MASK != 0;
        table.fire_pending(&*self.sink);
    }

    /// A guest's read in the table, of 4 or 8 bytes on their boundary; others read as all ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let table = self.table();
        let Some(image) = index(offset, data.len()).and_then(|i| table.entries.get(i)) else {
            return;
        };
        let at = usize::try_from(offset % ENTRY_SIZE).unwrap_or(0);
        for (to, from) in data.iter_mut().zip(image.image().iter().skip(at)) {
            *to = *from;
        }
    }

    /// A guest's write in the table, of 4 or 8 bytes on their boundary; others do nothing.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut table = self.table();
        let Some(entry) = index(offset, data.len()).and_then(|i| table.entries.get_mut(i)) else {
            return;
        };
        let mut image = entry.image();
        let at = usize::try_from(offset % ENTRY_SIZE).unwrap_or(0);
        for (to, from) in image.iter_mut().skip(at).zip(data) {
            *to = *from;
        }
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = image;
        entry.message = Message {
            // The two lowest bits are reserved, so that a message is a double word on its boundary.
            address: u64::from_le_bytes([a0 & !3, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        };
        entry.masked = u32::from(control) & MASKED != 0;
        if !entry.masked && entry.routed != Some(entry.message) {
            self.sink.stale();
        }
        table.fire_pending(&*self.sink);
    }

    /// A guest's read of the pending bits: 64 vectors a quad word.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let table = self.table();
        let bits = table
            .entries
            .iter()
            .take(64)
            .zip(0..)
            .fold(0_u64, |bits, (entry, bit)| {
                bits | u64::from(entry.pending) << bit
            });
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, index) in data.iter_mut().zip(at..) {
            *to = bits.to_le_bytes().get(index).copied().unwrap_or(0);
        }
    }

    /// Fires a vector, or keeps it pending while it is masked. While MSI-X is off nobody hears it.
    pub fn fire(&self, vector: u16) {
        let mut table = self.table();
        let Table {
            enabled,
            function_masked,
            ref mut entries,
        } = *table;
        let Some(entry) = entries.get_mut(usize::from(vector)).filter(|_| enabled) else {
            return;
        };
        if function_masked || entry.masked {
            entry.pending = true;
        } else {
            entry.go(vector, &*self.sink);
        }
    }

    /// The routes that KVM should hold, of the vectors that can fire. Until [`Msix::installed`], those that differ from
    /// the ones it holds fire by hand.
    #[must_use]
    pub fn routes(&self) -> Vec<(u16, Message)> {
        let mut table = self.table();
        (0..)
            .zip(&mut table.entries)
            .filter_map(|(vector, entry)| {
                if entry.routed != Some(entry.message) {
                    entry.routed = None;
                }
                (!entry.masked).then_some((vector, entry.message))
            })
            .collect()
    }

    /// Writes a vector's entry, of a function that has no table for its guest: one with MSI.
    pub fn program(&self, vector: u16, message: Message) {
        if let Some(entry) = self.table().entries.get_mut(usize::from(vector)) {
            entry.message = message;
            entry.masked = false;
        }
    }

    /// The vectors that fire now by the route that KVM holds, when whoever has them fires them.
    #[must_use]
    pub fn deliverable(&self) -> Vec<u16> {
        let table = self.table();
        let on = table.enabled && !table.function_masked;
        let fires = |entry: &Entry| on && !entry.masked && entry.routed == Some(entry.message);
        (0..)
            .zip(&table.entries)
            .filter(|(_, entry)| fires(entry))
            .map(|(vector, _)| vector)
            .collect()
    }

    /// What the vectors that can fire write now.
    #[must_use]
    pub fn enabled_messages(&self) -> Vec<(u16, Message)> {
        (0..)
            .zip(&self.table().entries)
            .filter(|(_, entry)| !entry.masked)
            .map(|(vector, entry)| (vector, entry.message))
            .collect()
    }

    /// Says that something else of the function is no longer as it was arranged: its BAR.
    pub fn note_stale(&self) {
        self.sink.stale();
    }

    /// Says that KVM holds these routes now, and none for other vectors.
    pub fn installed(&self, routes: &[(u16, Message)]) {
        let mut table = self.table();
        for (vector, entry) in (0..).zip(&mut table.entries) {
            entry.routed = routes
                .iter()
                .find(|(routed, _)| *routed == vector)
                .map(|(_, message)| *message);
        }
    }

    /// How many vectors can fire whose route is not the one that KVM holds.
    #[must_use]
    pub fn stale(&self) -> u32 {
        let table = self.table();
        let stale = |entry: &&Entry| !entry.masked && entry.routed != Some(entry.message);
        u32::try_from(table.entries.iter().filter(stale).count()).unwrap_or(u32::MAX)
    }

    /// Says all that a guest can see.
    #[must_use]
    pub fn save(&self) -> SavedMsix {
        let table = self.table();
        let Table {
            enabled: _,
            function_masked: _,
            ref entries,
        } = *table;
        let entries = entries
            .iter()
            .map(|entry| {
                let Entry {
                    message,
                    masked,
                    pending,
                    routed: _,
                } = *entry;
                SavedEntry {
                    message,
                    masked,
                    pending,
                }
            })
            .collect();
        SavedMsix { entries }
    }

    /// Takes over what was said; nothing fires. `control` is message control of the saved configuration space.
    ///
    /// # Errors
    ///
    /// [`StateError::Field`] for another number of vectors, and a message that no table holds.
    pub fn load(&self, saved: SavedMsix, control: u16) -> Result<(), StateError> {
        let SavedMsix { entries } = saved;
        let mut table = self.table();
        if entries.len() != table.entries.len() {
            return Err(StateError::field(
                "msix.entries",
                entries.len() as u64,
                "not the number of vectors of the device",
            ));
        }
        if let Some(bad) = entries.iter().find(|entry| entry.message.address & 3 != 0) {
            return Err(StateError::field(
                "msix.address",
                bad.message.address,
                "not a multiple of 4",
            ));
        }
        for (entry, saved) in table.entries.iter_mut().zip(entries) {
            let SavedEntry {
                message,
                masked,
                pending,
            } = saved;
            let routed = entry.routed;
            *entry = Entry {
                message,
                masked,
                pending,
                routed,
            };
        }
        table.enabled = control & ENABLE != 0;
        table.function_masked = control & FUNCTION_MASK != 0;
        Ok(())
    }
}

impl Table {
    fn fire_pending(&mut self, sink: &dyn Sink) {
        if !self.enabled || self.function_masked {
            return;
        }
        for (vector, entry) in (0..).zip(&mut self.entries) {
            if entry.pending && !entry.masked {
                entry.pending = false;
                entry.go(vector, sink);
            }
        }
    }
}

impl Entry {
    fn image(&self) -> [u8; 16] {
        let mut image = [0; 16];
        let control = if self.masked { MASKED } else { 0 };
        let parts = self
            .message
            .address
            .to_le_bytes()
            .into_iter()
            .chain(self.message.data.to_le_bytes())
            .chain(control.to_le_bytes());
        image
            .iter_mut()
            .zip(parts)
            .for_each(|(to, from)| *to = from);
        image
    }

    fn go(&self, vector: u16, sink: &dyn Sink) {
        if self.routed == Some(self.message) {
            sink.fire(vector);
        } else {
            sink.deliver(self.message);
        }
    }
}

/// The entry of an access that lies within one, on its boundary.
fn index(offset: u64, length: usize) -> Option<usize> {
    let length = length as u64;
    let fits = matches!(length, 4 | 8) && offset % length == 0;
    fits.then(|| usize::try_from(offset / ENTRY_SIZE).ok())?
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.table().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Event {
        Fired(u16),
        Delivered(u32),
        Stale,
    }

    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<Event>>>);

    impl Sink for Recorder {
        fn fire(&self, vector: u16) {
            self.0.lock().unwrap().push(Event::Fired(vector));
        }
        fn deliver(&self, message: Message) {
            self.0.lock().unwrap().push(Event::Delivered(message.data));
        }
        fn stale(&self) {
            self.0.lock().unwrap().push(Event::Stale);
        }
    }

    fn take(recorder: &Recorder) -> Vec<Event> {
        std::mem::take(&mut *recorder.0.lock().unwrap())
    }

    fn msix() -> (Msix, Recorder) {
        let recorder = Recorder::default();
        (Msix::new(3, Box::new(recorder.clone())), recorder)
    }

    fn program(msix: &Msix, vector: u64, data: u32) {
        let at = vector * ENTRY_SIZE;
        msix.table_write(at, &0xFEE0_0000_u64.to_le_bytes());
        msix.table_write(at + 8, &data.to_le_bytes());
        msix.table_write(at + 12, &0_u32.to_le_bytes());
    }

    #[test]
    fn a_vector_fires_by_hand_until_its_route_is_there() {
        let (msix, events) = msix();
        msix.control(ENABLE);
        program(&msix, 1, 0x41);
        assert_eq!(take(&events), [Event::Stale]);
        msix.fire(1);
        assert_eq!(take(&events), [Event::Delivered(0x41)]);
        let routes = msix.routes();
        assert_eq!(routes.len(), 1);
        msix.fire(1);
        msix.installed(&routes);
        msix.fire(1);
        assert_eq!(take(&events), [Event::Delivered(0x41), Event::Fired(1)]);
        // The guest changes it while routes are being set: the old route is not used for it.
        program(&msix, 1, 0x42);
        let routes = msix.routes();
        program(&msix, 1, 0x43);
        msix.installed(&routes);
        take(&events);
        msix.fire(1);
        assert_eq!(take(&events), [Event::Delivered(0x43)]);
        assert_eq!(msix.stale(), 1);
    }

    #[test]
    fn what_is_masked_stays_pending_and_fires_once() {
        let (msix, events) = msix();
        msix.fire(0);
        msix.control(ENABLE);
        msix.fire(2);
        msix.fire(2);
        let mut bits = [0; 8];
        msix.pending_read(0, &mut bits);
        assert_eq!(bits, [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(take(&events), []);
        msix.control(ENABLE | FUNCTION_MASK);
        program(&msix, 2, 7);
        assert_eq!(take(&events), [Event::Stale]);
        msix.control(ENABLE);
        assert_eq!(take(&events), [Event::Delivered(7)]);
        msix.control(ENABLE);
        assert_eq!(take(&events), []);
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let (msix, _) = msix();
        let mut before = [0; 8];
        msix.table_read(0, &mut before);
        for (offset, length) in [(1, 4), (2, 4), (0, 2), (4, 8), (48, 4), (u64::MAX - 3, 4)] {
            msix.table_write(offset, &vec![0; length]);
        }
        let mut control = [0; 4];
        msix.table_read(12, &mut control);
        assert_eq!(control, [1, 0, 0, 0]);
        let mut outside = [0xFF; 4];
        msix.table_read(48, &mut outside);
        assert_eq!(outside, [0xFF; 4]);
    }

    #[test]
    fn a_loaded_table_is_the_saved_one_and_a_wrong_one_is_refused() {
        let (old, _) = msix();
        old.control(ENABLE);
        program(&old, 0, 5);
        old.fire(1);
        let (new, events) = msix();
        new.load(old.save(), ENABLE).unwrap();
        new.fire(0);
        program(&new, 1, 6);
        assert_eq!(
            take(&events),
            [Event::Delivered(5), Event::Stale, Event::Delivered(6)]
        );

        let mut short = old.save();
        short.entries.pop();
        let mut odd = old.save();
        odd.entries[0].message.address |= 2;
        for (saved, field) in [(short, "msix.entries"), (odd, "msix.address")] {
            match new.load(saved, 0) {
                Err(StateError::Field { name, .. }) => assert_eq!(name, field),
                other => panic!("{other:?}"),
            }
        }
    }
}
