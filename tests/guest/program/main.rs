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

use boot::BootParameters;
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
    let mut console = (vcpu == 0).then(|| console::Console::new(&machine.options, machine.nonce));
    let mut disk = if vcpu == 0 {
        disk::Disk::new(&machine.options, machine.nonce)
    } else {
        None
    };
    let mut net = if vcpu == 0 {
        net::Net::new(&machine.options)
    } else {
        None
    };
    let mut vsock = if vcpu == 0 {
        vsock::Vsock::new(&machine.options)
    } else {
        None
    };
    let mut balloon = if vcpu == 0 {
        balloon::Balloon::new(&machine.options)
    } else {
        None
    };
    let mut hotplug = if vcpu == 0 {
        hotplug::Hotplug::new(&machine.options)
    } else {
        None
    };
    let mut hvc = if vcpu == 0 {
        hvc::Hvc::new(&machine.options)
    } else {
        None
    };
    let mut rng = if vcpu == 0 {
        rng::Rng::new(&machine.options)
    } else {
        None
    };
    let mut fs = if vcpu == 0 {
        fs::Fs::new(&machine.options, machine.nonce)
    } else {
        None
    };
    let mut load = if vcpu == 0 {
        load::Load::new(&machine.options)
    } else {
        None
    };
    loop {
        let turn = heart.turn();
        if let Some(load) = &mut load {
            load.step();
        }
        walker.step(&turn);
        interrupts.step(&turn);
        if let Some(console) = &mut console {
            console.step(&turn);
            let command = report::take_mailbox();
            power::obey(command);
            if let Some(hotplug) = &mut hotplug {
                hotplug.obey(command, &mut disk, &mut net);
                hotplug.step(&mut disk, &mut net, &machine.options, machine.nonce);
            }
            if let Some(disk) = &mut disk {
                disk.obey(command);
                disk.step();
            }
            if let Some(net) = &mut net {
                net.obey(command);
                net.step();
            }
            if let Some(balloon) = &mut balloon {
                balloon.obey(command);
                balloon.step();
            }
            if let Some(fs) = &mut fs {
                fs.obey(command);
                fs.step();
            }
            if let Some(hvc) = &mut hvc {
                hvc.step();
            }
            if let Some(rng) = &mut rng {
                rng.step();
            }
            if let Some(vsock) = &mut vsock {
                vsock.obey(command);
                vsock.step();
            }
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
