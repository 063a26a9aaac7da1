//! The audit of a running worker: the kernel's records of its threads and descriptors beside what it was granted.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use baton_ipc::DescriptorKind;
use baton_ipc::control::AuditDescriptor;
use baton_ipc::control::AuditReport;
use baton_ipc::control::AuditThread;
use baton_ipc::control::Finding;
use baton_ipc::control::Verdict;
use baton_policy::proof::Evidence;
use serde_json::json;

use crate::broker::Broker;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::unfit;

/// How many descriptors and findings an answer lists.
const MAX_LISTED: usize = 256;

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

/// The kernel's number of an eventfd (`eventfd-id` in fdinfo, proc_pid_fdinfo(5)); none of anything else.
fn eventfd_id(pid: i32, fd: u32) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("eventfd-id:"))?;
    Some(line.trim().to_owned())
}

fn eventfd_id_of_own(fd: BorrowedFd<'_>) -> Option<String> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    eventfd_id(pid, u32::try_from(fd.as_raw_fd()).ok()?)
}

impl Broker {
    /// Compares everything anew.
    pub(crate) fn audit(&mut self) -> Result<AuditReport> {
        let worker = self
            .worker
            .as_ref()
            .ok_or_else(|| unfit("there is no worker to audit", ""))?;
        let pid = worker.process.pid;
        let verdict = self
            .prover
            .threads(&self.rules, pid, worker.ids, self.settled());
        let filters = u32::try_from(self.rules.compiled.build.len()).unwrap_or(0) + 1;
        let (proof, role) = match (verdict.evidence, &self.prover.unreadable) {
            (Evidence::Bytes, _) => ("compared byte for byte".to_owned(), None),
            (Evidence::Counted, Some(why)) => (format!("by construction: {why}"), Some("unknown")),
            (Evidence::Counted, None) => ("not compared".to_owned(), Some("unknown")),
        };
        let tids = crate::proof::threads_of(pid);
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
                proof: proof.clone(),
            })
            .collect();
        let mut findings: Vec<Finding> = verdict
            .findings
            .iter()
            .map(|finding| Finding {
                rule: "confinement".to_owned(),
                subject: finding
                    .tid
                    .map_or_else(|| format!("process {pid}"), |tid| format!("thread {tid}")),
                declared: "as policy says".to_owned(),
                found: finding.what.to_string(),
            })
            .collect();
        let descriptors = self.descriptors(pid, &mut findings)?;
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
            threads,
            descriptors,
            findings,
            weaker,
        };
        let record = json!({"verdict": report.verdict, "findings": report.findings});
        self.log.write("audit", &record).recorded()?;
        Ok(report)
    }

    fn descriptors(&self, pid: i32, findings: &mut Vec<Finding>) -> Result<Vec<AuditDescriptor>> {
        let directory = format!("/proc/{pid}/fd");
        let entries = fs::read_dir(&directory).map_err(|e| {
            unfit(
                format_args!("cannot list the worker's descriptors: {e}"),
                "",
            )
        })?;
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let Some(fd) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok())
            else {
                continue;
            };
            let target = fs::read_link(entry.path())
                .map(|path| path.display().to_string())
                .unwrap_or_default();
            // Through the link: device and inode of the open file itself.
            let identity = fs::metadata(entry.path())
                .ok()
                .map(|file| (file.dev(), file.ino()));
            // All eventfds are one file to stat(2), as is much else that is anonymous; the kernel numbers them.
            let counter = eventfd_id(pid, fd);
            let granted = self.registry.iter().find(|(_, description, own)| {
                if description.kind == DescriptorKind::Eventfd {
                    counter.is_some() && counter == eventfd_id_of_own(*own)
                } else {
                    identity == Some((description.device, description.inode))
                }
            });
            let own = OWN.iter().find(|(prefix, _)| target.starts_with(prefix));
            let (grant, kind, access) = match (granted, own, fd) {
                (Some((key, description, _)), ..) => (
                    key.to_string(),
                    Some(description.kind),
                    Some(description.access),
                ),
                (None, Some((_, what)), _) => ((*what).to_owned(), None, None),
                (None, None, 0) if target.starts_with("socket:") => {
                    ("control socket".to_owned(), None, None)
                }
                (None, None, 1 | 2) if target.starts_with("pipe:") => {
                    ("diagnostics".to_owned(), None, None)
                }
                (None, None, _) => {
                    findings.push(Finding {
                        rule: "descriptor".to_owned(),
                        subject: format!("descriptor {fd}"),
                        declared: "nothing".to_owned(),
                        found: target.clone(),
                    });
                    ("unexplained".to_owned(), None, None)
                }
            };
            all.push(AuditDescriptor {
                fd,
                target,
                grant,
                kind,
                access,
            });
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
        findings.truncate(MAX_LISTED);
        Ok(all)
    }
}
