//! How the VM is, for those who ask, and for those who find no broker.

use std::time::Instant;

use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::control::Awaited;
use baton_ipc::control::DiskStatus;
use baton_ipc::control::NetdevStatus;
use baton_ipc::control::Refusal;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use serde_json::json;

use super::Broker;
use crate::devices::hotplug::Backing;
use crate::devices::netdevs::Netdev;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::run_dir::BrokerProcess;
use crate::run_dir::StateFile;
use crate::run_dir::Successor;
use crate::vm_file::slots::Plugged;
use crate::worker::Worker;
use crate::worker::process::ProcessId;

/// What is in the way, in words.
fn reasons(refusals: impl Iterator<Item = Refusal>) -> Vec<String> {
    refusals.map(|refusal| refusal.reason).collect()
}

impl Broker {
    pub(crate) fn generation(&self) -> u32 {
        self.worker.as_ref().map_or(0, |worker| worker.generation)
    }

    /// Writes down who runs what, for those who find no broker.
    pub(crate) fn publish(&mut self) -> Result<()> {
        self.publish_with(None)
    }

    /// The same, with the worker that may run the guest from a commit on.
    pub(crate) fn publish_with(&mut self, successor: Option<ProcessId>) -> Result<()> {
        let Some(worker) = self.worker.take() else {
            return Ok(());
        };
        let published = self.publish_worker(&worker, successor);
        self.worker = Some(worker);
        published
    }

    /// The same for this worker, which need not hold the guest yet.
    pub(crate) fn publish_worker(
        &mut self,
        worker: &Worker,
        successor: Option<ProcessId>,
    ) -> Result<()> {
        let me = ProcessId::of_self()
            .ok_or_else(|| unfit("/proc has no record of this process", "mount /proc"))?;
        let runners: Vec<_> = std::iter::once(worker.process).chain(successor).collect();
        self.ids.record(&runners)?;
        self.directory.publish(&StateFile {
            name: self.vm.name.as_str().to_owned(),
            broker: BrokerProcess {
                broker_pid: me.pid,
                broker_start: me.start,
            },
            worker_pid: worker.process.pid,
            worker_start: worker.process.start,
            successor: successor.map(|ProcessId { pid, start }| Successor { pid, start }),
            generation: worker.generation,
            ram_bytes: self.vm.memory.size.0,
            cgroup: self.cgroup.as_ref().map(|cgroup| cgroup.path().to_owned()),
        })
    }

    pub(crate) fn vm_status(&self) -> VmStatus {
        let worker = self.worker.as_ref();
        VmStatus {
            name: self.vm.name.as_str().to_owned(),
            id: self.id.to_string(),
            state: match self.state {
                VmState::Paused if self.panicked => VmState::GuestPanicked,
                state => state,
            },
            broker_pid: rustix::process::getpid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            worker_pid: worker.map_or(0, |worker| worker.process.pid.unsigned_abs()),
            worker_answers: worker.is_none_or(|worker| !worker.silent),
            generation: self.generation(),
            worker_digest: worker
                .map(|worker| worker.digest.to_string())
                .unwrap_or_default(),
            worker_build: worker
                .map(|worker| worker.build.clone())
                .unwrap_or_default(),
            uptime_s: self.began.elapsed().as_secs(),
            ram_bytes: self.vm.memory.size.0,
            cpus: self.vm.cpus.count.0,
            paused: self.paused,
            disks: self.disks(),
            vcpu_threads: worker.map_or_else(Vec::new, |worker| {
                crate::worker::process::vcpu_threads(worker.process.pid, self.vm.cpus.count.0)
            }),
            tsc_khz: self.status.tsc_khz,
            console_dropped: self.status.console_dropped,
            last_upgrade: self.last_upgrade.clone(),
            last_cancelled: self.last_cancelled,
            vm_file: self.options.vm_file.display().to_string(),
            balloon: (self.vm.memory.balloon)
                .then(|| self.left_by_balloon(self.status.balloon_pages)),
            vhost_user: (self.vm.vhost_user.0.iter())
                .map(|device| device.id.0.clone())
                .collect(),
            vfio: (self.vm.vfio.0.iter())
                .map(|device| device.id.0.clone())
                .collect(),
            awaits: self.awaits(),
            netdevs: self.netdev_statuses(),
            blocks_transfer: reasons(self.blocks_transfer()),
            blocks_save: reasons(self.blocks_save()),
        }
    }

    fn netdev_statuses(&self) -> Vec<NetdevStatus> {
        let status = |netdev: &Netdev| {
            let backing = Backing::Netdev(netdev.id.0.clone());
            let mut devices = self.devices.iter();
            let device = devices.find(|device| device.backing == backing);
            NetdevStatus {
                id: netdev.id.0.clone(),
                tap: netdev.tap.0.clone(),
                added: device.map(|device| device.id.clone()),
            }
        };
        self.netdevs.iter().map(status).collect()
    }

    /// Its disks, for those who ask how it is.
    fn disks(&self) -> Vec<DiskStatus> {
        let status = |(slot, plugged)| match plugged {
            Plugged::Disk(disk) => Some(DiskStatus {
                id: disk.id.0.clone(),
                path: disk.path.display().to_string(),
                readonly: disk.readonly,
                direct: disk.direct,
                bytes: self.block_bytes(slot).unwrap_or_default(),
                added: None,
            }),
            _ => None,
        };
        let mut disks: Vec<_> = self.vm.devices().filter_map(status).collect();
        disks.extend(self.devices.iter().filter_map(|device| {
            let Backing::Node(name) = &device.backing else {
                return None;
            };
            let node = self.node(name)?;
            Some(DiskStatus {
                id: name.clone(),
                path: node.path.display().to_string(),
                readonly: node.config.readonly,
                direct: node.config.direct,
                bytes: self.block_bytes(device.slot).unwrap_or_default(),
                added: Some(device.id.clone()),
            })
        }));
        disks
    }

    /// Of descriptors that the running worker gets.
    pub(crate) fn record_grants_of(&mut self, registry: &Registry) -> Result<()> {
        let (generation, mode) = (self.generation(), StartMode::None);
        for (key, description, _) in registry.iter() {
            self.log.write("grant", &json!({
                "generation": generation, "mode": mode, "descriptor": key.name(), "id": key.id(), "uid": self.ids.ids.uid, "what": description,
            }))
            .recorded()?;
        }
        Ok(())
    }

    /// What is waited for, on either side of an upgrade.
    fn awaits(&self) -> Option<Awaited> {
        let (what, by) = match (&self.upgrade, &self.incoming) {
            (Some(upgrade), _) => (upgrade.awaits(), Some(upgrade.deadline())),
            (None, Some(incoming)) => (incoming.awaits(), incoming.deadline()),
            (None, None) if self.awaits_file() => ("`migrate-incoming`", None),
            (None, None) => return None,
        };
        let left = by.map(|by| by.saturating_duration_since(Instant::now()));
        Some(Awaited {
            what: what.to_owned(),
            left_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        })
    }

    pub(crate) fn record_grants(&mut self, generation: u32, mode: StartMode) -> Result<()> {
        for (key, description, _) in self.registry.iter() {
            self.log.write("grant", &json!({
                "generation": generation, "mode": mode, "descriptor": key.name(), "id": key.id(), "uid": self.ids.ids.uid, "what": description,
            }))
            .recorded()?;
        }
        Ok(())
    }
}
