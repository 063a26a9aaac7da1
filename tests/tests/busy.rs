//! Every device of one guest busy at once, with its queues full, whole, in odd pieces and by indirect tables, while its worker is
//! replaced again and again: each request is completed once, each byte arrives once and in order.
//!
//! `BATON_UPGRADES=1000 cargo test -p baton-tests --test busy -- --nocapture` does it a thousand times, which takes longer than
//! nextest lets a test take; the blackouts are printed.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::os::unix::net::UnixListener;

use baton_guest::CommandLine;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Talk;
use baton_tests::Vm;
use baton_tests::Wire;
use baton_tests::until;

/// The port of the host that the guest connects to.
const PORT: u32 = 52;

/// How often the worker is replaced.
fn upgrades() -> u32 {
    let wanted = std::env::var("BATON_UPGRADES").ok();
    wanted.map_or(10, |wanted| wanted.parse().unwrap())
}

/// What every device of the guest has done.
fn work(vm: &Vm, wire: &Wire, [vsock, console]: &[Talk; 2]) -> [(&'static str, u64); 7] {
    let ram = &vm.ram;
    [
        ("the disk", ram.disk().done),
        ("frames to the guest", ram.net().received),
        ("frames from the guest", wire.peer().received),
        ("the entropy device", ram.rng().done),
        ("the balloon", ram.balloon().reported),
        ("the vsock", vsock.back()),
        ("the virtio console", console.back()),
    ]
}

#[test]
fn every_device_works_on_over_upgrades_and_loses_nothing() {
    let tap = format!("bb{}", std::process::id());
    let line = CommandLine::new().disk_irq().net_rest().vsock(PORT);
    let line = line.hvc().rng().balloon().console().period_ms(50);
    let mut listener = None;
    let vm = Builder::release()
        .line(line)
        .disk("data", 8, "queues = 2")
        .net(&tap, "queues = 2")
        .vsock()
        .balloon()
        .tables("[virtio_console]\nkind = \"socket\"\n")
        .start_in(|site| {
            let path = site.path(&format!("v_{PORT}"));
            listener = Some(UnixListener::bind(path).unwrap());
        });
    let wire = Wire::new(&tap);
    vm.ram.mail(layout::COMMAND_NET_WORK);
    until("frames", || (vm.ram.net().received > 0).then_some(()));
    let (stream, _) = listener.unwrap().accept().unwrap();
    let mut person = vm.at_console(&["--virtio"]);
    let talks = [
        Talk::new(stream.try_clone().unwrap(), stream),
        Talk::new(person.stdin.take().unwrap(), person.stdout.take().unwrap()),
    ];
    let (mut blackouts, mut aborted) = (Vec::new(), 0);
    for _ in 0..upgrades() {
        let before = work(&vm, &wire, &talks);
        vm.ram.mail(layout::COMMAND_BALLOON_REPORT);
        // One that is late on a busy machine is rolled back, over which nothing is lost either.
        let upgrade = vm.upgrade();
        match upgrade.outcome.as_str() {
            "committed" => blackouts.push(upgrade.blackout_us),
            _ => aborted += 1,
        }
        for (index, (device, before)) in before.into_iter().enumerate() {
            let goes_on = || {
                let now = work(&vm, &wire, &talks).get(index).map(|(_, now)| *now);
                (now > Some(before)).then_some(())
            };
            until(device, goes_on);
        }
    }
    blackouts.sort_unstable();
    let rank = |percent: usize| blackouts.get((blackouts.len() - 1) * percent / 100);
    println!(
        "{} upgrades, {aborted} rolled back, blackout in microseconds: p50 {:?}, p99 {:?}, max {:?}",
        blackouts.len(),
        rank(50),
        rank(99),
        blackouts.last()
    );

    assert!(aborted <= blackouts.len() / 10, "{aborted} rolled back");

    for talk in talks {
        assert!(talk.finish() > 0);
    }
    vm.assert_frames_arrived(&wire);
    vm.assert_disk_is_whole("data.img");
    let (rng, hvc, vsock) = (vm.ram.rng(), vm.ram.hvc(), vm.ram.vsock());
    assert_eq!(
        (rng.wrong, hvc.wrong, vsock.wrong),
        (0, 0, 0),
        "{rng:?} {hvc:?} {vsock:?}"
    );
    let guest = vm.ram.report().unwrap();
    assert_eq!((guest.boots, guest.faults()), (1, 0), "{guest:?}");
    person.kill().unwrap();
    person.wait().unwrap();
}
