//! A guest that drives half of its devices as no driver should: the other half works on, and so does the worker, and its
//! replacement.

use baton_guest::CommandLine;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::Wire;
use baton_tests::until;

/// Devices that are driven so: a disk, a network interface, the socket device, the virtio console, and the entropy device.
const WRECKED: u64 = 5;
/// How often the worker is replaced meanwhile.
const UPGRADES: usize = 5;
/// How often a device has to have said meanwhile that it needs a reset.
const BROKEN: u64 = 100;

/// All that goes on: what is done to the others, how often they said so, and what the driven ones do.
fn progress(vm: &Vm) -> [u64; 4] {
    let (wreck, disk, net) = (vm.ram.wreck(), vm.ram.disk(), vm.ram.net());
    [
        wreck.turns / 1000,
        wreck.broken / BROKEN,
        disk.done,
        net.received,
    ]
}

#[test]
fn devices_in_one_place_do_not_keep_a_worker_from_being_replaced() {
    let mut vm = Builder::release()
        .line(CommandLine::new().disk_irq().stack())
        .disk("data", 8, "queues = 2")
        .disk("one", 4, "")
        .disk("two", 4, "queues = 2")
        .start();
    // Two disks, and the entropy device.
    assert_eq!(vm.ram.wreck().devices, 3);
    let goes_on = |vm: &Vm| {
        let before = vm.ram.disk().done;
        until("the disk goes on", || {
            (vm.ram.disk().done > before).then_some(())
        });
    };
    goes_on(&vm);
    for _ in 0..2 {
        vm.assert_upgrades();
        goes_on(&vm);
    }
    vm.assert_transfers();
    goes_on(&vm);
    vm.assert_disk_is_whole("data.img");
}

#[test]
fn what_it_does_to_some_devices_neither_the_others_nor_an_upgrade_feel() {
    let taps = ['a', 'b'].map(|tag| format!("bh{tag}{}", std::process::id()));
    let [tap, other] = &taps;
    let line = CommandLine::new().disk_irq().net_rest().wreck();
    let vm = Builder::release()
        .line(line.console().period_ms(50))
        .disk("data", 8, "queues = 2")
        .disk("spare", 4, "queues = 2")
        .net(tap, "queues = 2")
        .net(other, "queues = 2")
        .vsock()
        .tables("[virtio_console]\nkind = \"socket\"\n")
        .start();
    let wire = Wire::new(tap);
    vm.ram.mail(layout::COMMAND_NET_WORK);
    assert_eq!(vm.ram.wreck().devices, WRECKED);
    for _ in 0..UPGRADES {
        let before = progress(&vm);
        until("all to go on", || {
            let now = progress(&vm);
            before
                .iter()
                .zip(now)
                .all(|(before, now)| *before < now)
                .then_some(())
        });
        vm.assert_upgrades();
    }
    assert_eq!(vm.ask("audit").expect(0).json()["verdict"], "proven");

    // Whoever behaves from now on is served.
    vm.ram.mail(layout::COMMAND_WRECK_REST);
    until("every device to be ready", || {
        (vm.ram.wreck().well == WRECKED).then_some(())
    });
    vm.assert_upgrades();
    assert_eq!(vm.ram.wreck().well, WRECKED);
    vm.assert_frames_arrived(&wire);
    vm.assert_disk_is_whole("data.img");
    let spare = std::fs::metadata(vm.site.path("spare.img")).unwrap();
    assert_eq!(spare.len(), 4 << 20);
    let guest = vm.ram.report().unwrap();
    assert_eq!((guest.boots, guest.faults()), (1, 0), "{guest:?}");
}
