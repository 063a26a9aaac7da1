//! PCI devices that come and go while the guest runs, by the registers that its ACPI tables name (QEMU's
//! `docs/specs/acpi_pci_hotplug.rst`). It looks at them by itself, without the event.
//!
//! Touches those ports.

use crate::disk::Disk;
use crate::layout::*;
use crate::net::Net;
use crate::options::Options;
use crate::power::{in32, out32};
use crate::report;

/// Slots that have got a device, slots that are to lose theirs, and where one is let go.
const CAME: u16 = 0xae00;
const LEAVING: u16 = 0xae04;
const EJECT: u16 = 0xae08;
/// Turns from one look to the next: each is an exit.
const LOOK: u32 = 512;

pub struct Hotplug {
    turns: u32,
    keeps: bool,
}

impl Hotplug {
    pub fn new(options: &Options) -> Option<Self> {
        options.hotplug.then_some(Self {
            turns: 0,
            keeps: false,
        })
    }

    /// One of `layout`'s commands.
    pub fn obey(&mut self, command: u64, disk: &mut Option<Disk>, net: &mut Option<Net>) {
        match command {
            COMMAND_HOTPLUG_KEEP => self.keeps = true,
            COMMAND_HOTPLUG_YIELD => self.keeps = false,
            COMMAND_HOTPLUG_EJECT => {
                *disk = None;
                *net = None;
                out32(EJECT, u32::MAX);
                report::increment(HOTPLUG_WENT_OFFSET);
            }
            _ => {}
        }
    }

    /// Takes a disk or a network interface that has come, and lets one go that is to.
    pub fn step(
        &mut self,
        disk: &mut Option<Disk>,
        net: &mut Option<Net>,
        options: &Options,
        nonce: u64,
    ) {
        self.turns += 1;
        if self.turns < LOOK {
            return;
        }
        self.turns = 0;
        let came = in32(CAME);
        for slot in 0..32 {
            if came & 1 << slot != 0 {
                report::increment(HOTPLUG_CAME_OFFSET);
                if disk.is_none() {
                    *disk = Disk::at(slot, options, nonce);
                }
                if net.is_none() && options.net {
                    *net = Net::at(slot, options);
                }
            }
        }
        let leaving = if self.keeps { 0 } else { in32(LEAVING) };
        for slot in 0..32 {
            if leaving & 1 << slot == 0 {
                continue;
            }
            if let Some(leaver) = disk.as_mut().filter(|disk| disk.slot() == slot) {
                if !leaver.rest() {
                    continue;
                }
                leaver.leave();
                *disk = None;
            }
            if let Some(leaver) = net.take_if(|net| net.slot() == slot) {
                leaver.leave();
            }
            out32(EJECT, 1 << slot);
            report::increment(HOTPLUG_WENT_OFFSET);
        }
    }
}
