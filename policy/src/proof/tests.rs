//! A worker that is as declared is proven, and each thing that is not is found, alone.

use super::*;
use crate::policy::Policy;
use crate::rlimits::Resource;

const UID: u32 = 1_900_000_007;
const GID: u32 = 1_900_000_008;

fn compiled() -> Compiled {
    Policy::builtin().unwrap().compile().unwrap()
}

fn thread(tid: u32, compiled: &Compiled, role: Role, threads: u32) -> ObservedThread {
    let filters: Vec<Program> = compiled.stack(role).into_iter().cloned().collect();
    ObservedThread {
        status: TaskStatus {
            name: "worker".into(),
            state: 'S',
            tgid: 100,
            pid: tid,
            ppid: 50,
            tracer: 0,
            uids: [UID; 4],
            gids: [GID; 4],
            groups: vec![],
            ns_pids: vec![tid, tid - 99],
            threads,
            inheritable: Capabilities::NONE,
            permitted: Capabilities::NONE,
            effective: Capabilities::NONE,
            bounding: Capabilities::NONE,
            ambient: Capabilities::NONE,
            no_new_privs: true,
            seccomp: 2,
            seccomp_filters: u32::try_from(filters.len()).unwrap(),
        },
        stat: TaskStat {
            pid: tid,
            name: "worker".into(),
            state: 'S',
            ppid: 50,
            flags: 0x40_0000,
            threads,
            start_time: 1,
        },
        filters: Some(filters),
    }
}

/// Control, two vCPUs, one I/O thread, and the kernel's own.
fn settled(compiled: &Compiled) -> Observed {
    let roles = [Role::Control, Role::Vcpu, Role::Vcpu, Role::Io];
    let mut threads: Vec<_> = (100..)
        .zip(roles)
        .map(|(tid, role)| thread(tid, compiled, role, 5))
        .collect();
    // It has whatever its maker had at the first KVM_RUN, and its filters are not read.
    let mut own = thread(104, compiled, Role::Build, 5);
    own.stat.flags |= procfs::PF_USER_WORKER;
    own.filters = None;
    threads.push(own);
    observed(threads)
}

fn fresh(compiled: &Compiled) -> Observed {
    observed(vec![thread(100, compiled, Role::Build, 1)])
}

fn observed(threads: Vec<ObservedThread>) -> Observed {
    let namespaces = |device| {
        Namespace::ALL
            .into_iter()
            .map(|namespace| (namespace, (device, 7)))
            .collect()
    };
    Observed {
        threads,
        namespaces: namespaces(1),
        own_namespaces: namespaces(2),
    }
}

fn judged(compiled: &Compiled, moment: Moment, observed: &Observed) -> Verdict {
    let namespaces = Namespace::ALL.into();
    let declared = Declared {
        compiled,
        inherited_filters: 0,
        keep: Capabilities::NONE,
        uid: UID,
        gid: GID,
        namespaces: &namespaces,
        moment,
    };
    prove(&declared, observed)
}

const SETTLED: Moment = Moment::Settled { vcpus: 2, io: 1 };

/// Changes one thing in a settled worker, which must be the one finding.
#[track_caller]
fn found(change: impl FnOnce(&mut Observed), expected: &Discrepancy) {
    let compiled = compiled();
    let mut observed = settled(&compiled);
    change(&mut observed);
    let verdict = judged(&compiled, SETTLED, &observed);
    let found: Vec<&Discrepancy> = verdict
        .findings
        .iter()
        .map(|finding| &finding.what)
        .collect();
    assert_eq!(found, [expected]);
    assert!(!expected.to_string().is_empty());
}

#[test]
fn what_is_as_declared_is_proven() {
    let compiled = compiled();
    let verdict = judged(&compiled, Moment::Fresh, &fresh(&compiled));
    assert!(verdict.is_proven(), "{:?}", verdict.findings);
    assert_eq!(verdict.evidence, Evidence::Bytes);

    let verdict = judged(&compiled, SETTLED, &settled(&compiled));
    assert!(verdict.is_proven(), "{:?}", verdict.findings);
    assert_eq!(verdict.evidence, Evidence::Bytes);
    let roles: Vec<_> = verdict.roles.into_iter().collect();
    assert_eq!(
        roles,
        [
            (100, Role::Control),
            (101, Role::Vcpu),
            (102, Role::Vcpu),
            (103, Role::Io)
        ]
    );
}

#[test]
fn without_the_bytes_the_count_is_what_is_known() {
    let compiled = compiled();
    let mut observed = settled(&compiled);
    for thread in &mut observed.threads {
        thread.filters = None;
    }
    let verdict = judged(&compiled, SETTLED, &observed);
    assert!(verdict.is_proven());
    assert_eq!(
        (verdict.evidence, verdict.roles.len()),
        (Evidence::Counted, 0)
    );
    observed.threads[1].status.seccomp_filters = 2;
    let verdict = judged(&compiled, SETTLED, &observed);
    assert_eq!(
        verdict.findings[0].what,
        Discrepancy::FilterCount {
            found: 2,
            expected: 3
        }
    );
}

#[test]
fn one_thread_that_was_told_of_none_of_it_is_found() {
    found(
        |o| o.threads[1].status.no_new_privs = false,
        &Discrepancy::NewPrivileges,
    );
    found(
        |o| o.threads[4].status.no_new_privs = false,
        &Discrepancy::NewPrivileges,
    );
    found(
        |o| o.threads[2].status.seccomp = 0,
        &Discrepancy::SeccompMode { mode: 0 },
    );
    found(
        |o| o.threads[4].status.seccomp = 0,
        &Discrepancy::SeccompMode { mode: 0 },
    );
    found(
        |o| o.threads[0].status.tracer = 9,
        &Discrepancy::Traced { by: 9 },
    );
    found(
        |o| o.threads[0].status.groups = vec![0],
        &Discrepancy::Groups { found: vec![0] },
    );
    found(|o| o.threads[0].stat.pid = 7, &Discrepancy::Foreign);
    found(
        |o| o.threads[0].stat.flags |= PF_KTHREAD,
        &Discrepancy::Foreign,
    );
    for which in 0..4 {
        let mut ids = [UID; 4];
        ids[which] = 0;
        let expected = Discrepancy::Id {
            kind: "uid".into(),
            found: ids,
            expected: UID,
        };
        found(|o| o.threads[3].status.uids = ids, &expected);
    }
    let expected = Discrepancy::Id {
        kind: "gid".into(),
        found: [0; 4],
        expected: GID,
    };
    found(|o| o.threads[3].status.gids = [0; 4], &expected);
}

#[test]
fn a_capability_in_any_set_is_found() {
    let extra = Capabilities::from_mask(1 << 21);
    let expected = |set| Discrepancy::Capability { set, extra };
    found(
        |o| o.threads[0].status.inheritable = extra,
        &expected(CapabilitySetName::Inheritable),
    );
    found(
        |o| o.threads[0].status.permitted = extra,
        &expected(CapabilitySetName::Permitted),
    );
    found(
        |o| o.threads[0].status.effective = extra,
        &expected(CapabilitySetName::Effective),
    );
    found(
        |o| o.threads[0].status.bounding = extra,
        &expected(CapabilitySetName::Bounding),
    );
    found(
        |o| o.threads[0].status.ambient = extra,
        &expected(CapabilitySetName::Ambient),
    );
}

#[test]
fn a_filter_that_is_not_the_declared_one_is_found() {
    // One byte of the second build filter.
    let tampered = |program: &Program| {
        let mut bytes = program.as_bytes().to_vec();
        let last = bytes.last_mut().unwrap();
        *last ^= 1;
        Program::from_bytes(&bytes).unwrap()
    };
    let expected = Discrepancy::Filter {
        index: 1,
        expected: Role::Build,
    };
    found(
        |o| {
            let filters = o.threads[2].filters.as_mut().unwrap();
            filters[1] = tampered(&filters[1]);
        },
        &expected,
    );
    let compiled = compiled();
    let mut observed = settled(&compiled);
    let filters = observed.threads[2].filters.as_mut().unwrap();
    filters[2] = tampered(&filters[2]);
    let verdict = judged(&compiled, SETTLED, &observed);
    let found: Vec<_> = verdict
        .findings
        .iter()
        .map(|finding| (finding.tid, finding.what.clone()))
        .collect();
    let count = Discrepancy::RoleCount {
        role: Role::Vcpu,
        found: 1,
        expected: 2,
    };
    assert_eq!(found, [(Some(102), Discrepancy::NoRole), (None, count)]);
}

#[test]
fn a_thread_too_few_too_many_or_of_another_role_is_found() {
    let compiled = compiled();
    let judge = |observed: &Observed| judged(&compiled, SETTLED, observed).findings.len();
    // A vCPU thread with the wider filter of the main thread.
    let mut observed = settled(&compiled);
    observed.threads[1] = thread(101, &compiled, Role::Control, 5);
    assert_eq!(
        judge(&observed),
        2,
        "one control too many, one vCPU too few"
    );
    // A thread that took no filter of its own: the count, and a vCPU is missing.
    let mut observed = settled(&compiled);
    observed.threads[1] = thread(101, &compiled, Role::Build, 5);
    assert_eq!(judge(&observed), 2);
    let mut observed = settled(&compiled);
    observed.threads.pop();
    assert_eq!(judge(&observed), 1, "the kernel counts five");
    assert_eq!(judge(&Observed::default()), 1, "gone");
    found(
        |o| {
            let mut another = o.threads[4].clone();
            another.status.pid = 105;
            another.stat.pid = 105;
            o.threads.push(another);
        },
        &Discrepancy::UserWorkers { found: 2 },
    );
}

#[test]
fn a_namespace_that_is_shared_or_unknown_is_found() {
    for namespace in Namespace::ALL {
        found(
            |o| {
                let own = o.own_namespaces[&namespace];
                o.namespaces.insert(namespace, own);
            },
            &Discrepancy::SharedNamespace { namespace },
        );
        found(
            |o| o.namespaces.retain(|one, _| *one != namespace),
            &Discrepancy::UnknownNamespace { namespace },
        );
    }
    found(
        |o| o.threads[0].status.ns_pids = vec![100],
        &Discrepancy::NotInit { ns_pids: vec![100] },
    );
    found(
        |o| o.threads[0].status.ns_pids = vec![100, 2],
        &Discrepancy::NotInit {
            ns_pids: vec![100, 2],
        },
    );
}

#[test]
fn a_fresh_worker_has_one_thread_and_no_role() {
    let compiled = compiled();
    let found = |observed: &Observed| -> Vec<Discrepancy> {
        judged(&compiled, Moment::Fresh, observed)
            .findings
            .into_iter()
            .map(|finding| finding.what)
            .collect()
    };
    let two = observed(
        (100..102)
            .map(|tid| thread(tid, &compiled, Role::Build, 2))
            .collect(),
    );
    assert_eq!(found(&two), [Discrepancy::NotSingleThreaded { threads: 2 }]);
    let narrowed = observed(vec![thread(100, &compiled, Role::Control, 1)]);
    assert_eq!(
        found(&narrowed),
        [Discrepancy::FilterCount {
            found: 3,
            expected: 2
        }]
    );
}

#[test]
fn filters_that_the_broker_itself_has_are_counted_but_not_compared() {
    let compiled = compiled();
    let mut observed = fresh(&compiled);
    let outer = compiled.roles.get(&Role::Io).unwrap().clone();
    observed.threads[0].status.seccomp_filters += 1;
    observed.threads[0]
        .filters
        .as_mut()
        .unwrap()
        .insert(0, outer);
    let namespaces = Namespace::ALL.into();
    let declared = |inherited_filters| Declared {
        compiled: &compiled,
        inherited_filters,
        keep: Capabilities::NONE,
        uid: UID,
        gid: GID,
        namespaces: &namespaces,
        moment: Moment::Fresh,
    };
    assert!(prove(&declared(1), &observed).is_proven());
    assert!(!prove(&declared(0), &observed).is_proven());
}

#[test]
fn a_limit_above_the_declared_one_is_found() {
    let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
        Max core file size        0                    0                    bytes     \n\
        Max processes             18                   unlimited            processes \n\
        Max open files            512                  1024                 files     \n";
    let mut declared = Rlimits::default();
    declared.set(Resource::Core, Limit::At(0));
    declared.set(Resource::Nofile, Limit::At(1024));
    assert!(limits(&declared, text).is_empty());
    declared.set(Resource::Nproc, Limit::At(18));
    declared.set(Resource::Nice, Limit::At(0));
    let found: Vec<String> = limits(&declared, text)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        found,
        [
            "the limit nice is not known, 0 declared",
            "the limit nproc is 18, hard unlimited, 18 declared"
        ]
    );
}
