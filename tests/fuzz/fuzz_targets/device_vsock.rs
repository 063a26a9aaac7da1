//! The socket device, driven through its registers and rings (`baton_fuzz`), with a broker that hands it connections, refuses some, and
//! programs at their other ends.
#![no_main]

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_fuzz::Script;
use baton_fuzz::Subject;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::VsockConfig;
use baton_ipc::worker::VsockOrder;
use baton_ipc::worker::VsockReport;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::vsock::Link;
use baton_worker::devices::virtio::vsock::Vsock;
use libfuzzer_sys::fuzz_target;
use rustix::net::SocketType;

#[derive(Default)]
struct Broker {
    link: Option<Link>,
    /// Connections that there are: the worker's ends, and the programs'.
    held: BTreeMap<u32, (OwnedFd, OwnedFd)>,
    /// What the guest has asked for.
    tickets: Vec<u32>,
}

impl Broker {
    fn make(&self) -> (Vsock, Link) {
        let held = self.held.iter();
        let held = held.map(|(id, (worker, _))| (*id, worker.try_clone().unwrap()));
        let config = VsockConfig { cid: 3 };
        Vsock::new(&config, held.collect(), Arc::new(|| {}))
    }

    /// What the worker says.
    fn hear(&mut self, parked: bool) {
        for report in self.link.iter().flat_map(|link| link.deeds(parked)) {
            match report {
                VsockReport::Connect { ticket, .. } => self.tickets.push(ticket),
                VsockReport::Closed { id } => {
                    self.held.remove(&id).expect("a connection that there is");
                }
            }
        }
    }

    /// Another connection, if there may be one.
    fn connection(&mut self) -> Option<(u32, OwnedFd)> {
        let id = (0..MAX_VSOCK_CONNECTIONS).find(|id| !self.held.contains_key(id))?;
        let (worker, program) = baton_fuzz::pair(SocketType::STREAM);
        let lent = worker.try_clone().unwrap();
        self.held.insert(id, (worker, program));
        Some((id, lent))
    }
}

impl Subject for Broker {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (device, link) = self.make();
        self.link = Some(link);
        Box::new(device)
    }

    fn forged(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(self.make().0)
    }

    fn parked(&mut self) {
        self.link.iter().for_each(Link::settle);
        self.hear(true);
    }

    fn outside(&mut self, script: &mut Script<'_>) {
        match script.byte() % 4 {
            0 => {
                let port = u32::from(script.byte());
                if let (Some((id, end)), Some(link)) = (self.connection(), &self.link) {
                    link.order(VsockOrder::Incoming { id, port }, Some(end));
                }
            }
            1 => {
                let Some(ticket) = self.tickets.pop() else {
                    return;
                };
                let answer = if script.byte() % 2 == 0 { self.connection() } else { None };
                let (order, end) = match answer {
                    Some((id, end)) => (VsockOrder::Connected { ticket, id }, Some(end)),
                    None => (VsockOrder::Refused { ticket }, None),
                };
                if let Some(link) = &self.link {
                    link.order(order, end);
                }
            }
            2 => {
                let index = usize::from(script.byte()) % self.held.len().max(1);
                if let Some((_, program)) = self.held.values().nth(index) {
                    let count = usize::from(script.short() % 1024);
                    let _ = rustix::io::write(program, script.bytes(count));
                    let _ = rustix::io::read(program, &mut [0; 1 << 14]);
                }
            }
            _ => {
                let index = usize::from(script.byte()) % self.held.len().max(1);
                if let Some((_, program)) = self.held.values().nth(index) {
                    let _ = rustix::net::shutdown(program, rustix::net::Shutdown::Both);
                }
            }
        }
    }

    fn check(&mut self) {
        self.hear(false);
    }
}

fuzz_target!(|data: &[u8]| {
    baton_fuzz::drive(data, &mut Broker::default());
});
