//! The devices that the command line asks for, and the host's commands to them: all the first vCPU's, a step of each a turn.

use crate::balloon::Balloon;
use crate::console::Console;
use crate::disk::Disk;
use crate::fs::Fs;
use crate::heartbeat::Turn;
use crate::hotplug::Hotplug;
use crate::hvc::Hvc;
use crate::load::Load;
use crate::net::Net;
use crate::options::Options;
use crate::power;
use crate::report;
use crate::rng::Rng;
use crate::vsock::Vsock;
use crate::wreck::Wreck;

pub struct Devices {
    options: &'static Options,
    nonce: u64,
    console: Console,
    disk: Option<Disk>,
    net: Option<Net>,
    vsock: Option<Vsock>,
    balloon: Option<Balloon>,
    hotplug: Option<Hotplug>,
    hvc: Option<Hvc>,
    rng: Option<Rng>,
    fs: Option<Fs>,
    load: Option<Load>,
    wreck: Option<Wreck>,
}

impl Devices {
    pub fn new(options: &'static Options, nonce: u64) -> Self {
        Self {
            options,
            nonce,
            console: Console::new(options, nonce),
            disk: Disk::new(options, nonce),
            net: Net::new(options),
            vsock: Vsock::new(options),
            balloon: Balloon::new(options),
            hotplug: Hotplug::new(options),
            hvc: Hvc::new(options),
            rng: Rng::new(options),
            fs: Fs::new(options, nonce),
            load: Load::new(options),
            wreck: Wreck::new(options, nonce),
        }
    }

    pub fn step(&mut self, turn: &Turn) {
        self.console.step(turn);
        let command = report::take_mailbox();
        power::obey(command);
        if let Some(hotplug) = &mut self.hotplug {
            let (disk, net) = (&mut self.disk, &mut self.net);
            hotplug.obey(command, disk, net);
            hotplug.step(disk, net, self.options, self.nonce);
        }
        if let Some(disk) = &mut self.disk {
            disk.obey(command);
            disk.step();
        }
        if let Some(net) = &mut self.net {
            net.obey(command);
            net.step();
        }
        if let Some(balloon) = &mut self.balloon {
            balloon.obey(command);
            balloon.step();
        }
        if let Some(fs) = &mut self.fs {
            fs.obey(command);
            fs.step();
        }
        if let Some(hvc) = &mut self.hvc {
            hvc.step();
        }
        if let Some(rng) = &mut self.rng {
            rng.step();
        }
        if let Some(vsock) = &mut self.vsock {
            vsock.obey(command);
            vsock.step();
        }
        if let Some(load) = &mut self.load {
            load.step();
        }
        if let Some(wreck) = &mut self.wreck {
            wreck.obey(command);
            wreck.step();
        }
    }
}
