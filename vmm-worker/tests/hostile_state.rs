//! A state stream and descriptors of unknown origin: each is refused with a reason, before anything runs, and without
//! harm to the guest that still runs in the old worker.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use baton_guest::CommandLine;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::cpr::CprHeader;
use baton_ipc::descriptor;
use baton_ipc::state_stream::Decoder;
use baton_ipc::state_stream::Encoder;
use baton_ipc::state_stream::Section;
use baton_ipc::worker::Order;
use harness::Upgrade;
use harness::Vm;
use harness::Worker;
use harness::assert_goes_on;

fn guest() -> Vm {
    Vm::new(2, 16, CommandLine::new().timer_us(1000))
}

/// Takes a stream apart, lets `change` at its sections, and puts it together again with a digest that is right.
fn forge(vm: &Vm, stream: &[u8], change: &dyn Fn(&mut Vec<Section>)) -> Vec<u8> {
    let mut sections = Decoder::new(vm.config.vm, 2)
        .push(stream)
        .unwrap()
        .unwrap()
        .sections;
    change(&mut sections);
    let mut encoder = Encoder::new(vm.config.vm, 2);
    sections
        .iter()
        .for_each(|section| encoder.section(section).unwrap());
    encoder.finish().0
}

/// A change to a stream, and what the refusal of it says.
type Forgery<'a> = (&'a dyn Fn(&mut Vec<Section>), &'a str);

#[test]
fn forged_sections_with_a_right_digest() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    // Sections 0 and 1 are the vCPUs, 2 the VM, the others the devices.
    let forgeries: &[Forgery<'_>] = &[
        (
            &|sections| drop(sections.remove(0)),
            "section 0x8001.0 is missing",
        ),
        (
            &|sections| drop(sections.remove(2)),
            "section 0x8002.0 is missing",
        ),
        (
            &|sections| drop(sections.pop()),
            "no saved state for pci-hotplug",
        ),
        (&|sections| sections.push(sections[0].clone()), "came twice"),
        (
            &|sections| sections[1].id.instance = 2,
            "unknown section 0x8001.2",
        ),
        (
            &|sections| sections.swap(4, 5),
            "where serial[2.0]'s belongs",
        ),
        (
            &|sections| sections[3].id.kind = 99,
            "which this VM does not have",
        ),
        (
            &|sections| sections[0].id.kind = 0x9000,
            "unknown section 0x9000.0",
        ),
        (&|sections| sections[0].version = 2, "version 2"),
        (&|sections| sections[4].version = 2, "version 2"),
        (&|sections| sections[0].payload.truncate(4000), "malformed"),
        (&|sections| sections[0].payload.push(0), "1 bytes too many"),
        (&|sections| sections[4].payload.push(0), "1 bytes too many"),
        (&|sections| sections[0].payload.clear(), "malformed"),
        // The first field of a vCPU is its run state.
        (&|sections| sections[0].payload[0] = 9, "mp_state is 0x9"),
        // The power latch is one byte.
        (&|sections| sections[3].payload[0] = 9, "pending is 0x9"),
        // The VM's begins with the first PIC's length and number.
        (
            &|sections| sections[2].payload[2] = 7,
            "irqchip.chip_id is 0x7",
        ),
    ];
    for (change, wanted) in forgeries {
        let (mut upgrade, tap) = Upgrade::agree_tapped(&vm, &mut old, 2);
        upgrade.build(&vm);
        let saved = Upgrade::park(&mut old);
        tap.send(&forge(&vm, &tap.stream(&saved), change));
        let reason = upgrade.new.expect_failed("load");
        assert!(reason.contains(wanted), "{wanted:?}: {reason}");
        assert_eq!(upgrade.new.exit_code(), 1);
        old.order(&Order::Rollback);
        old.expect_resumed();
        assert_goes_on(&vm, &before);
    }
    let (_new, _) = Upgrade::complete(&vm, old, 2);
    assert_goes_on(&vm, &before);
}

#[test]
fn an_unknown_section_that_is_not_mandatory_is_skipped() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let (mut upgrade, tap) = Upgrade::agree_tapped(&vm, &mut old, 2);
    upgrade.build(&vm);
    let saved = Upgrade::park(&mut old);
    let add = |sections: &mut Vec<Section>| {
        let mut extra = sections[0].clone();
        (extra.id.kind, extra.mandatory) = (0x9000, false);
        sections.push(extra);
    };
    tap.send(&forge(&vm, &tap.stream(&saved), &add));
    upgrade.expect_loaded();
    upgrade.new.order(&Order::Commit);
    upgrade.new.expect_running();
    assert_goes_on(&vm, &before);
}

#[test]
fn bent_bytes() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for position in [0, 5, 9, 27, 28, 36, 400, 9000] {
        let (mut upgrade, tap) = Upgrade::agree_tapped(&vm, &mut old, 2);
        upgrade.build(&vm);
        let saved = Upgrade::park(&mut old);
        let mut stream = tap.stream(&saved);
        stream[position] ^= 0x40;
        tap.send(&stream);
        drop(tap);
        upgrade.new.expect_failed("load");
        assert_eq!(upgrade.new.exit_code(), 1);
        old.order(&Order::Rollback);
        old.expect_resumed();
    }
    assert_goes_on(&vm, &before);
}

/// Lets a worker build what `change` made of its registry and header, and returns why it did not.
#[track_caller]
fn refused_build(
    vm: &Vm,
    step: &str,
    change: impl FnOnce(&mut Registry, &mut CprHeader),
) -> String {
    let mut worker = Worker::spawn();
    worker.expect_hello();
    worker.configure(vm.config(1), None);
    let mut header = CprHeader {
        mode: StartMode::None,
        vm: vm.config.vm,
        generation: 1,
    };
    let mut registry = vm.registry();
    change(&mut registry, &mut header);
    worker.hand_over(&header, &registry);
    let reason = worker.expect_failed(step);
    assert_eq!(worker.exit_code(), 1);
    reason
}

fn key(name: &str) -> DescriptorKey {
    DescriptorKey::new(name, 0).unwrap()
}

#[test]
fn wrong_descriptors() {
    let vm = guest();
    for name in [
        descriptor::KVM,
        descriptor::RAM,
        descriptor::KERNEL,
        descriptor::CONSOLE,
    ] {
        let reason = refused_build(&vm, "build", |registry, _| {
            registry.delete(&key(name)).unwrap()
        });
        assert_eq!(reason, format!("descriptor {name}#0 is missing"));
    }
    let extra = |registry: &mut Registry, _: &mut CprHeader| {
        let kernel = vm.kernel.try_clone().unwrap();
        registry
            .save(key("extra"), DescriptorKind::Image, kernel)
            .unwrap();
    };
    assert_eq!(refused_build(&vm, "build", extra), "nobody claimed extra#0");
    let kind = |registry: &mut Registry, _: &mut CprHeader| {
        registry.delete(&key(descriptor::KERNEL)).unwrap();
        let socket = vm.console.try_clone().unwrap().into();
        registry
            .save(key(descriptor::KERNEL), DescriptorKind::Stream, socket)
            .unwrap();
    };
    assert!(refused_build(&vm, "build", kind).contains("is Stream, not Image"));
    let smaller = |registry: &mut Registry, _: &mut CprHeader| {
        registry.delete(&key(descriptor::RAM)).unwrap();
        let other = Vm::ram_of(8 << 20);
        registry
            .save(key(descriptor::RAM), DescriptorKind::GuestRam, other)
            .unwrap();
    };
    assert!(refused_build(&vm, "build", smaller).contains("its memfd 0x800000"));
}

#[test]
fn a_cpr_state_for_another_worker() {
    let vm = guest();
    for change in [
        &(|header: &mut CprHeader| header.generation = 7) as &dyn Fn(&mut CprHeader),
        &|header| header.vm = VmId([0; 16]),
        &|header| header.mode = StartMode::CprTransfer,
    ] {
        let reason = refused_build(&vm, "hand-over", |_, header| change(header));
        assert!(reason.starts_with("the CPR state is for"), "{reason}");
    }
}
