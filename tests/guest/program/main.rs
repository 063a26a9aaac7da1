//! The guest program: counts its turns, stamps them with the TSC, walks its memory, and says how it is.
//!
//! It runs at CPL3 with everything mapped, as the only program of its machine. So it is made of unsafe code: raw
//! addresses that the boot protocol and `layout` give their meaning, ports, and symbols of `entry`. Each file says which
//! of these it touches.
//!
//! Every vCPU runs [`run`]: one turn of the heartbeat, then a step of each mode that the command line asked for, a file
//! each: one page of the walk, a look at its interrupts, on the first vCPU one byte of the console. So no work is long
//! enough to look like a gap.

#![no_std]
#![no_main]

use core::panic::PanicInfo;

mod balloon;
mod boot;
mod console;
mod devices;
mod disk;
mod entry;
mod fs;
mod heartbeat;
mod hotplug;
mod hvc;
mod interrupts;
#[expect(dead_code, reason = "some of it only the host side reads")]
mod layout;
mod load;
mod memory;
mod net;
mod options;
mod paging;
mod pci;
mod power;
mod processors;
mod report;
mod rng;
mod serial;
mod virtio;
mod vsock;
mod walker;
mod wreck;

use boot::BootParameters;
use devices::Devices;
use heartbeat::Heartbeat;
use interrupts::Interrupts;
use options::Options;
use walker::Walker;

/// What the first vCPU found out and the others need: written once, before they start.
struct Machine {
    options: Options,
    nonce: u64,
    gap_ticks: u64,
    memory: memory::Ranges,
}

static mut MACHINE: Option<Machine> = None;

fn machine() -> &'static Machine {
    // SAFETY: written by the boot vCPU before it starts another, and never after.
    match unsafe { &*(&raw const MACHINE) } {
        Some(machine) => machine,
        None => power::crash(),
    }
}

/// The boot vCPU, at CPL3.
extern "C" fn boot_main(zero_page: u64) -> ! {
    let start = heartbeat::tsc();
    interrupts::fill_table();
    interrupts::prepare(0);
    let parameters = BootParameters::new(zero_page);
    let options = Options::parse(parameters.command_line());
    let (tsc_khz, tsc_source) = boot::tsc_frequency(options.tsc_khz);
    let gap_ticks = tsc_khz.saturating_mul(options.gap_us) / 1000;
    let memory = parameters.usable_memory(options.walk);
    for range in memory.iter() {
        paging::map(range.start, range.end);
    }
    if options.bare {
        pci::set_up();
    }
    let nonce = boot::nonce(start);
    report::boot(&report::Boot {
        nonce,
        start,
        tsc_khz,
        tsc_source,
        gap_ticks,
        vcpus: options.vcpus,
        walk_bytes: memory.bytes(),
    });
    // SAFETY: no other vCPU runs yet.
    unsafe {
        *(&raw mut MACHINE) = Some(Machine {
            options,
            nonce,
            gap_ticks,
            memory,
        })
    };
    report::publish();
    processors::start_others(machine().options.vcpus, tsc_khz);
    run(0)
}

/// Every other vCPU, at CPL3.
extern "C" fn other_main(vcpu: u64) -> ! {
    interrupts::prepare(vcpu as usize);
    run(vcpu as usize)
}

fn run(vcpu: usize) -> ! {
    let machine = machine();
    let mut heart = Heartbeat::new(vcpu, machine.gap_ticks);
    let mut walker = Walker::new(vcpu, machine.options.vcpus, machine.nonce, &machine.memory);
    let mut interrupts = Interrupts::new(vcpu, &machine.options);
    let mut devices = (vcpu == 0).then(|| Devices::new(&machine.options, machine.nonce));
    loop {
        let turn = heart.turn();
        walker.step(&turn);
        interrupts.step(&turn);
        if let Some(devices) = &mut devices {
            devices.step(&turn);
        }
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    report::panicked(
        info.location()
            .map_or(u64::MAX, |location| u64::from(location.line())),
    );
    loop {
        core::hint::spin_loop();
    }
}
