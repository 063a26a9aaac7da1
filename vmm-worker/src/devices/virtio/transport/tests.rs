use std::sync::Mutex;
use std::sync::mpsc;

use super::*;
use crate::devices::DeviceKind;
use crate::devices::state::StateError;
use crate::devices::virtio::Backend;
use crate::devices::virtio::FEATURES_OK;
use crate::devices::virtio::Next;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::seat::Stop;
use crate::devices::virtio::test_driver::*;

/// A device whose backend says when it begins, and ends when it is told to.
struct Slow(Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>);

struct SlowBackend(Mutex<(mpsc::Sender<()>, mpsc::Receiver<()>)>);

impl Backend for SlowBackend {
    fn serve(&mut self, _: &mut [Virtqueue], _: &Stop) -> Result<Next, Broken> {
        let (begun, end) = self.0.get_mut().unwrap();
        begun.send(()).unwrap();
        end.recv().unwrap();
        Ok(Next::Wait)
    }
}

impl VirtioDevice for Slow {
    fn identity(&self) -> crate::devices::virtio::Identity {
        crate::devices::virtio::Identity {
            kind: DeviceKind(0x7001),
            virtio_type: 4,
            pci_class: 0xFF_0000,
        }
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }
    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        let channels = self.0.take().unwrap();
        vec![(vec![0], Box::new(SlowBackend(Mutex::new(channels))))]
    }
    fn config(&self) -> Vec<u8> {
        (0..=255).collect()
    }
    fn activate(&mut self, _: u64) {}
    fn reset(&mut self) {}
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }
    fn load(&mut self, _: &[u8], _: Option<u64>) -> Result<(), StateError> {
        Ok(())
    }
}

fn slow() -> (Rig, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((begun, has_begun), (end, ended)) = (mpsc::channel(), mpsc::channel());
    let rig = Rig::new(Box::new(Slow(Some((begun, ended)))));
    (rig, has_begun, end)
}

#[test]
fn a_reset_is_over_when_the_backend_is_and_nobody_waits_for_it() {
    let (mut rig, begun, end) = slow();
    rig.bring_up();
    let seat = Arc::clone(rig.transport.seats().next().unwrap());
    let thread = std::thread::spawn(move || seat.serve());
    begun.recv().unwrap();
    rig.write(0x14, 0, 1);
    assert_ne!(rig.status(), 0);
    // Nothing is heard meanwhile.
    rig.write(0x14, 3, 1);
    rig.write(0x1C, 1, 2);
    assert_eq!(rig.status(), 15);
    end.send(()).unwrap();
    thread.join().unwrap();
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.read(0x1C, 2), 0);
    rig.bring_up();
    assert_eq!(rig.status(), 15);
}

#[test]
fn parking_gives_up_in_time_and_goes_on() {
    let (mut rig, begun, end) = slow();
    rig.bring_up();
    let seat = Arc::clone(rig.transport.seats().next().unwrap());
    let thread = std::thread::spawn(move || seat.serve());
    begun.recv().unwrap();
    assert!(matches!(
        rig.transport.park(StartMode::CprTransfer),
        Err(DeviceError::Busy(1))
    ));
    rig.transport.failed(StartMode::CprTransfer);
    rig.transport.resume(StartMode::CprTransfer).unwrap();
    end.send(()).unwrap();
    thread.join().unwrap();
    rig.transport.park(StartMode::CprTransfer).unwrap();
    // Parked, it serves nothing.
    rig.serve();
    assert!(begun.try_recv().is_err());
}

#[test]
fn features_that_are_not_offered_are_not_agreed() {
    let (mut rig, ..) = slow();
    for features in [0, 0b111 | F_VERSION_1, 0b101, u64::MAX] {
        rig.write(0x14, 0, 1);
        rig.write(0x14, 3, 1);
        for half in [0, 1] {
            rig.write(0x08, half, 4);
            rig.write(0x0C, features >> (32 * half) & 0xFFFF_FFFF, 4);
        }
        rig.write(0x14, 11, 1);
        assert_eq!(rig.status() & FEATURES_OK, 0, "{features:#x}");
        rig.write(0x14, 15, 1);
        assert_eq!(rig.status() & DRIVER_OK, 0, "{features:#x}");
    }
    rig.bring_up();
    // Once agreed, they stay.
    rig.write(0x08, 0, 4);
    rig.write(0x0C, 0, 4);
    assert_eq!(rig.read(0x0C, 4) & 0b101, 0b101);
}

#[test]
fn the_access_capability_reaches_the_registers() {
    let (mut rig, ..) = slow();
    rig.bring_up();
    let at = rig.transport.access_at;
    let mut answer = [0; 4];
    // Common configuration, status: one byte at 0x14.
    rig.transport.config_write(at + 8, &0x14_u32.to_le_bytes());
    rig.transport.config_write(at + 12, &1_u32.to_le_bytes());
    rig.transport.config_read(at + 16, &mut answer[..1]);
    assert_eq!(answer[0], 15);
    rig.transport.config_write(at + 16, &[0]);
    assert_eq!(rig.status(), 0);
    for (bar, offset, length) in [
        (1, 0x14_u32, 1_u32),
        (0, 0x8000, 1),
        (0, 0x15, 4),
        (0, 0, 8),
    ] {
        rig.transport.config_write(at + 4, &[bar]);
        rig.transport.config_write(at + 8, &offset.to_le_bytes());
        rig.transport.config_write(at + 12, &length.to_le_bytes());
        rig.transport.config_write(at + 16, &[0xFF; 4]);
        assert_eq!(rig.status(), 0, "{bar} {offset:#x} {length}");
    }
}

/// What the field `name` of a good state is changed to, and refused for.
#[test]
fn each_field_that_can_be_wrong_is_refused_by_name() {
    type Change = fn(&mut saved::SavedTransport);
    let changes: [(&str, Change); 14] = [
        ("status", |state| state.driver.status = 0x20),
        ("status", |state| state.driver.status = 7),
        ("features", |state| state.driver.features |= 1 << 40),
        ("features", |state| state.driver.features &= !F_VERSION_1),
        ("isr", |state| state.isr = 4),
        ("queues", |state| state.driver.queues.clear()),
        ("queues", |state| state.driver.queue_vectors.push(0)),
        ("config_vector", |state| state.driver.config_vector = 100),
        ("queue_vector", |state| state.driver.queue_vectors[0] = 100),
        ("queue.size", |state| state.driver.queues[0].size = 128),
        ("queue.size", |state| state.driver.queues[0].size = 12),
        ("queue", |state| state.driver.queues[0].used += 1),
        ("queue", |state| state.driver.queues[0].available = RAM),
        ("queue", |state| state.driver.queues[0].descriptors = !15),
    ];
    let (mut rig, ..) = slow();
    rig.bring_up();
    rig.transport.park(StartMode::CprTransfer).unwrap();
    let good = rig.transport.state().unwrap();
    let bytes = postcard::to_stdvec(&good).unwrap();
    for (field, change) in changes {
        let mut state = postcard::from_bytes(&bytes).unwrap();
        change(&mut state);
        let section = rig.transport.section_of(&state).unwrap();
        let mut fresh = Rig::on(
            Box::new(Slow(Some({
                let ((begun, _), (_, ended)) = (mpsc::channel(), mpsc::channel());
                (begun, ended)
            }))),
            rig.ram,
        );
        match fresh.transport.load(StartMode::CprTransfer, &section) {
            Err(DeviceError::State(StateError::Field { name, .. })) => assert_eq!(name, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}
