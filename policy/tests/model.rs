//! The filters do what the policy says: for random calls, and for random policies, what an interpreter makes of the
//! compiled filters is what the policy's own meaning says. seccompiler is not trusted with it.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's helpers fail as the test does"
)]

use std::collections::BTreeSet;

use baton_policy::bpf::{AUDIT_ARCH_X86_64, Answer, Call, run_all};
use baton_policy::condition::{Comparison, Conjunction};
use baton_policy::syscalls::Width;
use baton_policy::{Compiled, Policy, Refusal, Role, Rule, Syscall, Violation};
use proptest::prelude::*;

fn builtin() -> Policy {
    Policy::builtin().unwrap()
}

fn filtered(compiled: &Compiled, role: Role, call: &Call) -> Answer {
    run_all(compiled.stack(role), call).unwrap()
}

fn role() -> impl Strategy<Value = Role> {
    prop::sample::select(&Role::ALL[..])
}

/// Values that a policy's comparisons care about, near misses of those, and anything.
fn value(interesting: Vec<u64>) -> impl Strategy<Value = u64> {
    let one = prop::sample::select(interesting);
    prop_oneof![
        4 => one.clone(),
        2 => (one.clone(), 0_u32..64).prop_map(|(value, bit)| value ^ (1 << bit)),
        1 => (one, any::<u32>()).prop_map(|(value, high)| value | u64::from(high) << 32),
        1 => any::<u64>(),
        1 => 0_u64..16,
    ]
}

/// Calls that a policy speaks of, with arguments that it cares about, and any others.
fn call(policy: &Policy) -> impl Strategy<Value = Call> + use<> {
    let mut numbers: Vec<u32> = policy.rules.iter().map(|rule| rule.call.number()).collect();
    numbers.extend(policy.refusals.iter().map(|refusal| refusal.call.number()));
    let comparisons = policy
        .rules
        .iter()
        .flat_map(|rule| rule.alternatives.iter().flatten());
    let mut values: Vec<u64> = comparisons.flat_map(|one| [one.value, one.mask]).collect();
    values.push(0);
    let number = prop_oneof![
        8 => prop::sample::select(numbers.clone()),
        2 => 0_u32..500,
        1 => any::<u32>(),
        1 => prop::sample::select(numbers).prop_map(|number| number | 0x4000_0000),
    ];
    let arch =
        prop_oneof![20 => Just(AUDIT_ARCH_X86_64), 1 => Just(0x4000_0003), 1 => any::<u32>()];
    (number, arch, prop::array::uniform6(value(values))).prop_map(|(number, arch, arguments)| {
        Call {
            number,
            arch,
            arguments,
        }
    })
}

fn comparison(index: u8) -> impl Strategy<Value = Comparison> {
    let mask = prop_oneof![
        Just(u64::MAX),
        Just(u64::from(u32::MAX)),
        any::<u64>(),
        any::<u32>().prop_map(u64::from)
    ];
    (any::<bool>(), mask, any::<u64>()).prop_map(move |(wide, mask, value)| {
        let width = if wide { Width::Qword } else { Width::Dword };
        let mask = if wide {
            mask
        } else {
            mask & u64::from(u32::MAX)
        };
        // The parser lets no comparison through that compares nothing.
        let mask = if mask == 0 { 1 } else { mask };
        Comparison {
            index,
            width,
            mask,
            value: value & mask,
        }
    })
}

fn conjunction() -> impl Strategy<Value = Conjunction> {
    prop::collection::btree_set(0_u8..6, 1..=6)
        .prop_flat_map(|indices| indices.into_iter().map(comparison).collect::<Vec<_>>())
}

fn rule(call: Syscall) -> impl Strategy<Value = Rule> {
    let alternatives =
        prop_oneof![2 => Just(Vec::new()), 3 => prop::collection::vec(conjunction(), 1..12)];
    (alternatives, prop::collection::btree_set(role(), 1..=4)).prop_map(
        move |(alternatives, roles)| Rule {
            topic: "random".into(),
            roles,
            call,
            when: None,
            alternatives,
            why: "random".into(),
            line: 1,
        },
    )
}

/// A policy with random rules, each call in at most one of them, as the parser guarantees that a call with any
/// arguments has no other rule.
fn random_policy() -> impl Strategy<Value = Policy> {
    let calls = prop::collection::btree_set(0_u32..330, 4..24);
    let rules = calls.prop_flat_map(|numbers| {
        numbers
            .into_iter()
            .filter_map(Syscall::from_number)
            .map(rule)
            .collect::<Vec<_>>()
    });
    let violations =
        prop::array::uniform4(prop::sample::select(vec![Violation::Trap, Violation::Kill]));
    let refused = prop::collection::btree_map(400_u32..460, 1_u16..5, 0..5);
    (rules, violations, refused).prop_map(|(mut rules, violations, refused)| {
        let mut policy = builtin();
        // A role with no rule at all does not compile.
        let exit = Syscall::from_name("exit_group").unwrap();
        rules.retain(|rule| rule.call != exit);
        let everyone: BTreeSet<Role> = Role::ALL.into();
        rules.push(Rule {
            roles: everyone,
            call: exit,
            alternatives: Vec::new(),
            ..policy.rules[0].clone()
        });
        policy.rules = rules;
        for (role, violation) in policy.roles.values_mut().zip(violations) {
            role.violation = violation;
        }
        let template = policy.refusals[0].clone();
        policy.refusals = refused
            .into_iter()
            .filter_map(|(number, errno)| {
                Some(Refusal {
                    call: Syscall::from_number(number)?,
                    errno,
                    ..template.clone()
                })
            })
            .collect();
        policy
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_builtin_filters_do_what_the_builtin_policy_says(role in role(), call in call(&builtin())) {
        // Compiled once for all cases of the thread.
        thread_local!(static BUILTIN: (Policy, Compiled) = {
            let policy = builtin();
            let compiled = policy.compile().unwrap();
            (policy, compiled)
        });
        BUILTIN.with(|(policy, compiled)| {
            prop_assert_eq!(filtered(compiled, role, &call), policy.judge(role, &call));
            Ok(())
        })?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn the_filters_of_any_policy_do_what_it_says(
        (policy, calls) in random_policy().prop_flat_map(|policy| {
            let calls = prop::collection::vec(call(&policy), 60);
            (Just(policy), calls)
        }),
    ) {
        let compiled = policy.compile().unwrap();
        for call in calls {
            for role in Role::ALL {
                prop_assert_eq!(filtered(&compiled, role, &call), policy.judge(role, &call), "{} {:?}", role, call);
            }
        }
    }
}

#[test]
fn every_rule_of_the_builtin_policy_lets_its_own_calls_through_and_says_so() {
    let policy = builtin();
    let compiled = policy.compile().unwrap();
    for rule in &policy.rules {
        let any = vec![Vec::new()];
        let alternatives = if rule.alternatives.is_empty() {
            &any
        } else {
            &rule.alternatives
        };
        for alternative in alternatives {
            let mut arguments = [0; 6];
            for one in alternative {
                arguments[usize::from(one.index)] = one.value;
            }
            let call = Call::new(rule.call.number(), arguments);
            for role in &rule.roles {
                assert_eq!(
                    filtered(&compiled, *role, &call),
                    Answer::Allow,
                    "{role} {rule:?}"
                );
                assert_eq!(
                    policy.rule_for(*role, &call).map(|found| found.call),
                    Some(rule.call)
                );
            }
        }
    }
}
