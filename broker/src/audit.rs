//! The audit of a running worker: the kernel's records of its threads and descriptors beside what it was granted.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use baton_audit::quoted;
use baton_ipc::Access;
use baton_ipc::DescriptorKind;
use baton_ipc::control::AuditDescriptor;
use baton_ipc::control::AuditReport;
use baton_ipc::control::AuditThread;
use baton_ipc::control::Finding;
use baton_ipc::control::Verdict;
use baton_policy::proof::Evidence;
use rustix::fs::OFlags;
use rustix::fs::SealFlags;
use serde_json::json;

use crate::broker::Broker;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::worker::Worker;
use crate::worker::launcher::DescriptorRecord;
use crate::worker::launcher::Records;

/// How many descriptors an answer lists.
const MAX_LISTED: usize = 256;
/// How many findings, and how long a text of one, in bytes: with the descriptors they fit into an answer of 48 KiB.
const MAX_FINDINGS: usize = 24;
const MAX_FOUND: usize = 200;

/// Anonymous objects that a worker makes for itself, by what /proc calls them.
const OWN: &[(&str, &str)] = &[
    ("anon_inode:kvm-vm", "made by the worker: its VM"),
    ("anon_inode:kvm-vcpu:", "made by the worker: a vCPU"),
    (
        "anon_inode:[eventfd]",
        "made by the worker: an event counter",
    ),
    (
        "anon_inode:[eventpoll]",
        "made by the worker: its event loop",
    ),
    ("anon_inode:[timerfd]", "made by the worker: a timer"),
];

/// What /proc calls a device that VFIO gave out (Linux, `drivers/vfio/group.c`).
const VFIO_DEVICE: &str = "anon_inode:[vfio-device]";

/// What tells two files of a kind apart that are one to stat(2), as the line of fdinfo that says it (proc_pid_fdinfo(5)):
/// the kernel's number of an eventfd, the interface of a tap. None of any other kind.
fn line_of(kind: DescriptorKind) -> Option<&'static str> {
    match kind {
        DescriptorKind::Eventfd => Some("eventfd-id:"),
        DescriptorKind::Tap => Some("iff:"),
        _ => None,
    }
}

fn told_by(line: &str, info: &str) -> Option<String> {
    let line = info.lines().find_map(|text| text.strip_prefix(line))?;
    Some(line.trim().to_owned())
}

fn told_by_own(line: &str, fd: BorrowedFd<'_>) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    told_by(line, &info)
}

impl Broker {
    /// Compares everything anew.
    pub(crate) fn audit(&mut self) -> Result<AuditReport> {
        let worker = self
            .worker
            .as_ref()
            .ok_or_else(|| unfit("there is no worker to audit", ""))?;
        let pid = worker.process.pid;
        let records = self.prover.records(pid)?;
        let verdict = self
            .prover
            .threads(&self.rules, pid, worker.ids, self.settled());
        let filters = u32::try_from(self.rules.compiled.build.len()).unwrap_or(0) + 1;
        let (proof, role) = match (verdict.evidence, &self.prover.unreadable) {
            (Evidence::Bytes, _) => ("compared byte for byte".to_owned(), None),
            (Evidence::Counted, Some(why)) => (format!("by construction: {why}"), Some("unknown")),
            (Evidence::Counted, None) => ("not compared".to_owned(), Some("unknown")),
        };
        let tids = crate::worker::proof::threads_of(pid);
        let threads = tids
            .into_iter()
            .map(|tid| AuditThread {
                tid,
                role: match (role, verdict.roles.get(&tid)) {
                    (None, Some(role)) => role.to_string(),
                    (Some(unknown), _) => unknown.to_owned(),
                    (None, None) => "the kernel's own".to_owned(),
                },
                filters,
                // The kernel's own thread runs no user code, and no filter could be read from it.
                proof: match (role, verdict.roles.get(&tid)) {
                    (None, None) => "the kernel's flag PF_USER_WORKER".to_owned(),
                    _ => proof.clone(),
                },
            })
            .collect();
        let mut findings: Vec<Finding> = verdict
            .findings
            .iter()
            .map(|finding| finding_of(pid, finding))
            .collect();
        let limits = self
            .rules
            .policy
            .rlimits(u32::from(self.vm.cpus.count.0), self.vm.pinned());
        let executable = crate::worker::evidence::Executable {
            identity: worker.executable,
            digest: worker.digest,
        };
        let (mut checks, wrong) = crate::worker::evidence::process(
            pid,
            &records,
            &executable,
            self.cgroup.as_ref(),
            Some(&limits),
        );
        findings.extend(wrong.iter().map(|finding| finding_of(pid, finding)));
        checks.extend(crate::worker::evidence::threads(&self.rules, &verdict));
        let (own, wrong) = self.compare_own();
        checks.extend(own);
        let wrong = wrong
            .into_iter()
            .map(|what| crate::worker::proof::other(None, what));
        findings.extend(wrong.map(|finding| finding_of(pid, &finding)));
        findings.extend(self.rules.policy.learn.iter().map(|why| Finding {
            rule: "learn".to_owned(),
            subject: format!("process {pid}"),
            declared: "filters that deny what no rule permits".to_owned(),
            found: quoted(&format!(
                "not confined by its filters: the policy learns ({why})"
            )),
        }));
        let descriptors = self.descriptors(worker, records, &mut findings)?;
        let unreadable = self.prover.unreadable.iter();
        let mut weaker: Vec<String> = unreadable
            .map(|why| format!("the filters' bytes cannot be read back: {why}"))
            .collect();
        if worker.ids.is_own() {
            weaker.push(format!(
                "the worker runs as the broker's own user {}, in no cgroup of its own",
                worker.ids.uid
            ));
            weaker.extend((!self.prover.own_groups.is_empty()).then(|| {
                format!(
                    "it has that user's groups {:?}, which nobody without privilege can leave",
                    self.prover.own_groups
                )
            }));
        }
        let report = AuditReport {
            verdict: if findings.is_empty() {
                Verdict::Proven
            } else {
                Verdict::Findings
            },
            worker_pid: pid.unsigned_abs(),
            generation: worker.generation,
            worker_digest: worker.digest.to_string(),
            policy: self.vm.policy.display().to_string(),
            policy_digest: self.rules.policy.digest.to_string(),
            pause_us: crate::upgrade::phase_clock::micros(self.prover.stood.get()),
            checks,
            threads,
            descriptors,
            findings,
            weaker,
        };
        let record = json!({"verdict": report.verdict, "findings": report.findings});
        self.log.write("audit", &record).recorded()?;
        Ok(report)
    }

    fn descriptors(
        &self,
        worker: &Worker,
        records: Records,
        findings: &mut Vec<Finding>,
    ) -> Result<Vec<AuditDescriptor>> {
        let held = records.descriptors.map_err(|e| {
            unfit(
                format_args!("cannot list the worker's descriptors: {e}"),
                "",
            )
        })?;
        let mut all = Vec::new();
        for DescriptorRecord {
            number: fd,
            target,
            identity,
            info,
        } in held
        {
            let (target, identity) = (quoted(&target), identity.unwrap_or_default());
            let granted = self.registry.iter().find(|(_, description, own)| {
                match line_of(description.kind) {
                    Some(line) => {
                        let told = told_by(line, &info);
                        told.is_some() && told == told_by_own(line, *own)
                    }
                    // Anonymous, and one inode with all that is: known by what the kernel calls it.
                    None if description.kind == DescriptorKind::VfioDevice => target == VFIO_DEVICE,
                    None => identity == (description.device, description.inode),
                }
            });
            let access = access_of(&info);
            let mut wrong = |declared: String, found: String| {
                findings.push(Finding {
                    rule: "descriptor".to_owned(),
                    subject: format!("descriptor {fd}"),
                    declared,
                    found,
                });
            };
            let own = OWN.iter().find(|(prefix, _)| target.starts_with(prefix));
            let [control, diagnostics] = worker.standard;
            let mut seals = Vec::new();
            let (grant, kind) = match (granted, own, fd) {
                (Some((key, description, held)), ..) => {
                    // Kind, size and seals belong to the object, which this process holds, too.
                    if let Err(error) = description.verify(held) {
                        wrong(format!("{key}"), error.to_string());
                    }
                    if access != Some(description.access) {
                        wrong(
                            format!("{key}, access {:?}", description.access),
                            format!("access {access:?}"),
                        );
                    }
                    seals = seals_of(held);
                    (key.to_string(), Some(description.kind))
                }
                (None, Some((_, what)), _) => ((*what).to_owned(), None),
                (None, None, 0) if target == format!("socket:[{control}]") => {
                    ("control socket".to_owned(), None)
                }
                (None, None, 1 | 2) if target == format!("pipe:[{diagnostics}]") => {
                    ("diagnostics".to_owned(), None)
                }
                (None, None, _) => {
                    wrong("nothing".to_owned(), target.clone());
                    ("unexplained".to_owned(), None)
                }
            };
            all.push(AuditDescriptor {
                fd,
                target,
                grant,
                kind,
                access,
                identity,
                seals,
            });
        }
        let vms = |name| {
            all.iter()
                .filter(|one: &&AuditDescriptor| one.target.starts_with(name))
                .count()
        };
        for (what, most) in [
            ("anon_inode:kvm-vm", 1),
            ("anon_inode:kvm-vcpu:", usize::from(self.vm.cpus.count.0)),
        ] {
            if vms(what) > most {
                findings.push(Finding {
                    rule: "descriptor".to_owned(),
                    subject: "the worker".to_owned(),
                    declared: format!("at most {most} of {what}"),
                    found: vms(what).to_string(),
                });
            }
        }
        all.sort_by_key(|descriptor| descriptor.fd);
        if all.len() > MAX_LISTED {
            findings.push(Finding {
                rule: "descriptor".to_owned(),
                subject: "the worker".to_owned(),
                declared: format!("at most {MAX_LISTED} descriptors"),
                found: format!("{} descriptors, not all listed", all.len()),
            });
            all.truncate(MAX_LISTED);
        }
        findings.truncate(MAX_FINDINGS);
        for finding in findings {
            for text in [&mut finding.declared, &mut finding.found] {
                *text = text.chars().take(MAX_FOUND).collect();
            }
        }
        Ok(all)
    }
}

/// A finding about the worker or one of its threads.
fn finding_of(pid: i32, finding: &baton_policy::proof::Finding) -> Finding {
    let (rule, declared) = finding.what.rule();
    Finding {
        rule: rule.to_owned(),
        subject: finding
            .tid
            .map_or_else(|| format!("process {pid}"), |tid| format!("thread {tid}")),
        declared,
        found: quoted(&finding.what.to_string()),
    }
}

/// The access mode of a descriptor, as the kernel says.
fn access_of(info: &str) -> Option<Access> {
    let flags = baton_policy::procfs::descriptor_flags(info)?;
    Access::of(OFlags::from_bits_retain(flags))
}

fn seals_of(memfd: BorrowedFd<'_>) -> Vec<String> {
    // What is no memfd has none.
    let seals = rustix::fs::fcntl_get_seals(memfd).unwrap_or(SealFlags::empty());
    seals
        .iter_names()
        .map(|(name, _)| name.to_lowercase())
        .collect()
}
