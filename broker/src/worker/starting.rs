//! How a broker starts a worker of its VM: under its ids, in its cgroup, confined as its policy says.

use std::os::fd::AsFd;
use std::rc::Rc;

use baton_ipc::control::Step;
use baton_ipc::worker::WorkerConfig;
use baton_policy::Confinement;
use baton_policy::Policy;

use crate::broker::Broker;
use crate::broker::Rules;
use crate::refusal::Result;
use crate::worker::binary::WorkerBinary;
use crate::worker::launch::Begun;
use crate::worker::launch::Program;
use crate::worker::nascent::Nascent;

impl Broker {
    /// Keeps what the build of the next worker declares that it needs.
    pub(crate) fn declare(&mut self, declared: Policy) {
        Rc::make_mut(&mut self.rules).declared = Some(declared);
    }

    /// Starts a worker on its way.
    pub(crate) fn launch(
        &self,
        binary: WorkerBinary,
        config: WorkerConfig,
        rules: &Rules,
    ) -> Result<Nascent> {
        let begun = Begun::start(
            &self.launcher,
            Program::Worker,
            self.ids.ids,
            self.cgroup.as_ref(),
        )?;
        self.launch_begun(begun, binary, config, rules)
    }

    /// The same with one that was begun before its broker knew all of it.
    pub(crate) fn launch_begun(
        &self,
        begun: Begun,
        binary: WorkerBinary,
        config: WorkerConfig,
        rules: &Rules,
    ) -> Result<Nascent> {
        let policy = &rules.policy;
        let confinement = Confinement {
            rlimits: policy.rlimits(u32::from(self.vm.cpus.count.0), self.vm.pinned()),
            keep: policy.capabilities,
            landlock_floor: policy.landlock.floor_abi,
            filters: rules.compiled.build.clone(),
            learn: policy.learn.is_some(),
        };
        let lessons = self.lessons.as_ref().map(AsFd::as_fd);
        let launch = begun.become_of(binary.as_fd(), confinement, lessons)?;
        Ok(Nascent::new(
            launch,
            config,
            binary,
            self.deadlines.of(Step::Spawn),
        ))
    }
}
