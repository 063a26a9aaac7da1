//! The rehearsal: every path of an upgrade once, on the reset state of a VM that has not run, under the last filters.
//!
//! A filter that is too tight, an MSR that cannot be set back, a KVM that refuses its own state: all of it shows here and
//! costs an upgrade that was not begun, instead of a pause. Only reset state is used: the paravirtual clock's MSRs are off
//! in it, so that nothing writes guest RAM. It ends with a KVM_RUN that runs nothing, on each vCPU, the first one first:
//! that is when KVM makes its own thread in this process.

use std::os::fd::BorrowedFd;

use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::state_stream::Decoder;
use baton_ipc::state_stream::StreamError;
use thiserror::Error;

use crate::assembly::LastFilters;
use crate::assembly::Machinery;
use crate::devices::lifecycle::LifecycleError;
use crate::fail_point::fail_point;
use crate::gap::Gap;
use crate::io_pool::PoolError;
use crate::sections;
use crate::sections::SectionError;
use crate::transfer::main_channel;
use crate::transfer::main_channel::MainError;
use crate::vcpu::Command;
use crate::vcpu::Purpose;
use crate::vcpu::VcpuError;
use crate::vcpu::VcpuState;
use crate::vm_state::VmState;
use crate::vm_state::VmStateError;

/// Why the rehearsal failed; nothing of a guest was touched.
#[derive(Debug, Error)]
pub(crate) enum RehearsalError {
    /// A last filter could not be put on.
    #[error("the control thread's filter: {0}")]
    Filter(std::io::Error),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// An I/O thread.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The VM's own state.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// A section.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The stream that was just written is not whole.
    #[error("the rehearsed stream is incomplete")]
    Incomplete,
    /// The devices.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// The channel.
    #[error(transparent)]
    Main(#[from] MainError),
    /// A fault for a test.
    #[error("{0}")]
    FailPoint(String),
}

/// The reset state: what a guest that resets itself starts from.
pub(crate) struct ResetState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) vm: VmState,
}

/// Puts the last filter on every thread, the control thread (the caller) included.
///
/// # Errors
///
/// [`RehearsalError::Filter`], [`RehearsalError::Vcpu`] and [`RehearsalError::Pool`].
pub(crate) fn confine(
    machinery: &mut Machinery,
    filters: &LastFilters,
) -> Result<(), RehearsalError> {
    machinery
        .vcpus
        .command_all(|_| Command::Confine(filters.vcpu.clone()))?;
    machinery.pool.confine(&filters.io)?;
    filters.control.install().map_err(RehearsalError::Filter)
}

/// Rehearses. `no_socket` is any descriptor that is no socket, for the main channel's system calls to fail on.
///
/// # Errors
///
/// [`RehearsalError`].
pub(crate) fn rehearse(
    machinery: &mut Machinery,
    mode: StartMode,
    vm: VmId,
    no_socket: BorrowedFd<'_>,
) -> Result<ResetState, RehearsalError> {
    let reset = ResetState {
        vcpus: machinery.vcpus.save()?,
        vm: VmState::save(&machinery.vm)?,
    };
    if fail_point!(Rehearse).map_err(RehearsalError::FailPoint)? {
        return Ok(reset);
    }
    machinery.vcpus.rehearse_kick();

    main_channel::rehearse(no_socket)?;

    let (bytes, _) = sections::encode(vm, 1, &reset.vcpus, &reset.vm, Vec::new())?;
    let stream = Decoder::new(vm, 1)
        .push(&bytes)?
        .ok_or(RehearsalError::Incomplete)?;
    let parsed = sections::parse(
        stream,
        machinery.vcpus.count(),
        &machinery.inventory,
        Gap::Pause,
    )?;
    machinery.vcpus.load(parsed.vcpus, Purpose::Transfer)?;
    parsed.vm.load(&machinery.vm, Purpose::Transfer)?;
    machinery.platform.devices.rehearse(mode)?;

    for index in 0..machinery.vcpus.count() {
        machinery.vcpus.command_one(index, Command::Touch)?;
    }
    Ok(reset)
}
