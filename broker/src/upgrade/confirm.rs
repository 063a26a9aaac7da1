//! The confirmation of a worker from the kernel's own records, before it is given anything and before a guest runs in it.

use baton_ipc::control::Exit;
use baton_policy::proof::Finding;
use baton_policy::proof::Moment;
use serde_json::json;

use crate::broker::Broker;
use crate::broker::Rules;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::worker::Worker;
use crate::worker::nascent::Nascent;

impl Broker {
    /// Confirms a worker from the kernel's records before it is given anything.
    pub(crate) fn confirm_fresh(&mut self, nascent: &Nascent, rules: &Rules) -> Result<()> {
        let Some(worker) = nascent.worker() else {
            return Err(unfit("the worker is not there", ""));
        };
        let mut findings = nascent.confirm_process(&self.prover, self.cgroup.as_ref());
        findings.extend(
            self.prover
                .threads(rules, worker.process.pid, worker.ids, Moment::Fresh)
                .findings,
        );
        self.judge("confirmed-fresh", worker.generation, &findings)
    }

    /// Confirms the last filters of all its threads before the guest runs in it.
    pub(crate) fn confirm_settled(&mut self, worker: &Worker, rules: &Rules) -> Result<()> {
        let verdict = self
            .prover
            .threads(rules, worker.process.pid, worker.ids, self.settled());
        self.judge("confirmed-settled", worker.generation, &verdict.findings)
    }

    /// What a worker looks like when its guest runs.
    pub(crate) fn settled(&self) -> Moment {
        Moment::Settled {
            vcpus: u32::from(self.vm.cpus.count.0),
            io: self.io_threads().into(),
        }
    }

    pub(super) fn judge(
        &mut self,
        event: &str,
        generation: u32,
        findings: &[Finding],
    ) -> Result<()> {
        let findings: Vec<_> = findings.iter().map(ToString::to_string).collect();
        self.log.write(event, &json!({
            "generation": generation, "findings": findings, "filters_unreadable": self.prover.unreadable,
        }))
        .recorded()?;
        if findings.is_empty() {
            return Ok(());
        }
        Err(refusal(
            Exit::Unfit,
            format_args!(
                "the worker is not confined as policy says: {}",
                findings.join("; ")
            ),
            "`baton doctor` says what this host lacks",
        ))
    }
}
