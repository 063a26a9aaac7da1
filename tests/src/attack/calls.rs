//! Every call that is tried, without a name: by number, by a condition that is just not met, by ioctl request.

use baton_policy::Policy;
use baton_policy::Role;
use baton_policy::Rule;
use baton_policy::Syscall;
use baton_policy::bpf::Call;
use baton_policy::condition::Comparison;
use baton_policy::syscalls::Width;

/// The last number that is tried: well beyond what any kernel has (Linux 6.18: 470).
const LAST: u32 = 600;

/// Set in the numbers of x32 programs (`__X32_SYSCALL_BIT`, `asm/unistd.h`).
const X32: u32 = 0x4000_0000;

/// Arguments that are good for nothing: no descriptor, no pointer, no length that the kernel would accept.
const NOWHERE: [u64; 6] = [u64::MAX; 6];

/// What ends the thread that asks, or takes it elsewhere. Every thread of a worker is seen to end, and the handler by
/// which a refusal is survived returns by the last of them.
const ENDS: [&str; 3] = ["exit", "exit_group", "rt_sigreturn"];

/// Everything that a thread of `role` tries.
pub fn calls(policy: &Policy, role: Role) -> impl Iterator<Item = Call> {
    let conditions: Vec<Call> = policy
        .rules
        .iter()
        .filter(|rule| rule.roles.contains(&role) || rule.roles.contains(&Role::Build))
        .flat_map(just_met_and_just_not)
        .collect();
    numbers().chain(conditions).chain(requests())
}

/// Calls of the kernel's own probes, which no filter is asked about: `uretprobe` from Linux 6.14 and `uprobe` from 6.18
/// (`__secure_computing` in `kernel/seccomp.c`). Made by anybody but a probe's trampoline, the one is a SIGILL that nothing
/// outlives, and the other an error.
pub const EXEMPT: [u32; 2] = [335, 336];

fn numbers() -> impl Iterator<Item = Call> {
    let ordinary = (0..=LAST).filter(|number| {
        !EXEMPT.contains(number)
            && Syscall::from_number(*number).is_none_or(|call| !ENDS.contains(&call.name()))
    });
    let others = (0..=LAST).flat_map(|number| [X32 | number, 0x8000_0000 | number]);
    ordinary
        .chain(others)
        .map(|number| Call::new(number, NOWHERE))
}

/// For each way in which a rule lets its call through: the call as it is let through, and for each bit that is compared the
/// call with that bit the other way round. All bits that are not compared are set.
fn just_met_and_just_not(rule: &Rule) -> Vec<Call> {
    let mut calls = Vec::new();
    for alternative in &rule.alternatives {
        let mut met = NOWHERE;
        for Comparison {
            index, mask, value, ..
        } in alternative
        {
            if let Some(argument) = met.get_mut(usize::from(*index)) {
                *argument = *argument & !mask | value;
            }
        }
        calls.push(Call::new(rule.call.number(), met));
        for comparison in alternative {
            let width = match comparison.width {
                Width::Dword => 32,
                Width::Qword => 64,
            };
            for bit in (0..width).map(|bit| 1_u64 << bit) {
                if comparison.mask & bit != 0 {
                    let mut not = met;
                    if let Some(argument) = not.get_mut(usize::from(comparison.index)) {
                        *argument ^= bit;
                    }
                    calls.push(Call::new(rule.call.number(), not));
                }
            }
        }
    }
    calls
}

/// ioctl requests as `asm-generic/ioctl.h` composes them: every number of a type with every direction, and with every size
/// that a structure of `linux/kvm.h` has, multiples of 4 up to 128 bytes and the larger ones by themselves; for the types
/// of other drivers only the sizes of numbers.
fn requests() -> impl Iterator<Item = Call> {
    const KVM: u32 = 0xae;
    // Of linux/kvm.h: kvm_regs, kvm_guest_memfd's neighbours, sregs, sregs2, xcrs, fpu, irqchip, lapic, xsave.
    const LARGER: [u32; 12] = [
        0x90, 0xa0, 0xb8, 0xd0, 0x100, 0x138, 0x140, 0x188, 0x1a0, 0x208, 0x400, 0x1000,
    ];
    // Block devices, terminals and taps, sockets, vhost, VFIO, userfaultfd, perf.
    const OTHERS: [u32; 7] = [0x12, 0x54, 0x89, 0xaf, 0x3b, 0xaa, 0x24];
    let compose = |kind: u32, sizes: Vec<u32>| {
        sizes.into_iter().flat_map(move |size| {
            (0..4_u32).flat_map(move |direction| {
                (0..=0xff_u32).map(move |number| direction << 30 | size << 16 | kind << 8 | number)
            })
        })
    };
    let sizes = (0..=32).map(|words| words * 4).chain(LARGER).collect();
    let others = OTHERS
        .into_iter()
        .flat_map(move |kind| compose(kind, vec![0, 4, 8, 16]));
    compose(KVM, sizes).chain(others).map(|request| {
        // SYS_ioctl is 16 on x86-64; the upper half of the request counts for nobody.
        let mut arguments = NOWHERE;
        if let Some(argument) = arguments.get_mut(1) {
            *argument = u64::from(request) | 0xffff_ffff_0000_0000;
        }
        Call::new(16, arguments)
    })
}
