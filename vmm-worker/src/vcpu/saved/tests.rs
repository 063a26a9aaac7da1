//! A saved vCPU of a real VM, and one wrong field at a time.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::*;
use crate::vm;

/// A fresh vCPU's state, and what it is judged by.
fn fresh() -> (VcpuState, Inventory) {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("this test needs /dev/kvm");
    let (vm, host) = vm::create(OwnedFd::from(kvm)).unwrap();
    let vcpus = vm::add_processors(&vm, 1).unwrap();
    let cpuid = kvm_bindings::CpuId::from_entries(&host.cpuid).unwrap();
    vcpus[0].set_cpuid2(&cpuid).unwrap();
    let inventory = Inventory::of(&vcpus[0], &host.msrs, host.xsave).unwrap();
    (VcpuState::save(&vcpus[0], &inventory).unwrap(), inventory)
}

fn saved(state: &VcpuState) -> SavedVcpu {
    postcard::from_bytes(&state.encode().unwrap()).unwrap()
}

#[test]
fn a_state_survives_its_encoding() {
    let (state, inventory) = fresh();
    let bytes = state.encode().unwrap();
    assert!(bytes.len() < 16 << 10, "{}", bytes.len());
    let again = VcpuState::parse(VERSION, &bytes, &inventory, Gap::Pause).unwrap();
    assert_eq!(again.encode().unwrap(), bytes);
    assert_eq!(
        (again.regs, again.sregs, again.events),
        (state.regs, state.sregs, state.events)
    );
    assert!(!state.msrs.is_empty());
    assert!(
        state
            .msrs
            .iter()
            .all(|(index, _)| ![0x10, 0x11, 0x4b56_4d00].contains(index))
    );
}

#[test]
fn every_wrong_field_is_named() {
    let (state, inventory) = fresh();
    let refused = |change: &dyn Fn(&mut SavedVcpu)| {
        let mut wrong = saved(&state);
        change(&mut wrong);
        match VcpuState::parse(
            VERSION,
            &postcard::to_stdvec(&wrong).unwrap(),
            &inventory,
            Gap::Pause,
        ) {
            Err(StateError::Field { name, .. }) => name,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&|wrong| wrong.mp_state = 5), "mp_state");
    assert_eq!(refused(&|wrong| wrong.sregs.flags = 2), "sregs.flags");
    assert_eq!(refused(&|wrong| wrong.xsave.0.truncate(4095)), "xsave.len");
    assert_eq!(refused(&|wrong| wrong.xsave.0.push(0)), "xsave.len");
    assert_eq!(refused(&|wrong| wrong.tsc_khz += 1), "tsc_khz");
    for index in [0x10, 0x11, 0x4b56_4d00, 0xdead_beef] {
        assert_eq!(refused(&|wrong| wrong.msrs[0].0 = index), "msr");
    }
    assert_eq!(refused(&|wrong| wrong.msrs.push(wrong.msrs[0])), "msr");
}

#[test]
fn wrong_versions_lengths_and_rests_are_refused() {
    let (state, inventory) = fresh();
    let bytes = state.encode().unwrap();
    let parse =
        |version, bytes: &[u8]| VcpuState::parse(version, bytes, &inventory, Gap::Pause).map(drop);
    assert!(matches!(
        parse(0, &bytes),
        Err(StateError::Version {
            found: 0,
            supported: VERSION
        })
    ));
    for length in 0..bytes.len() {
        assert!(
            matches!(
                parse(VERSION, &bytes[..length]),
                Err(StateError::Malformed(_))
            ),
            "{length}"
        );
    }
    assert!(matches!(
        parse(VERSION, &[bytes, vec![0]].concat()),
        Err(StateError::Trailing(1))
    ));
}
