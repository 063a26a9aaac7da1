//! The new side: the offer before there is a VM, and the stream that brings the guest's state.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::StateDigest;
use baton_ipc::state_stream::Answer;
use baton_ipc::state_stream::Decoder;
use baton_ipc::state_stream::Frame;
use baton_ipc::state_stream::Offer;
use baton_ipc::state_stream::StateStream;
use baton_ipc::state_stream::StreamError;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use thiserror::Error;

use super::entries::Entries;
use super::main_channel::MainChannel;
use super::main_channel::MainError;
use super::outgoing::Preview;
use super::outgoing::SEND_TIMEOUT;
use crate::assembly::Machinery;
use crate::devices::lifecycle::LifecycleError;
use crate::fail_point::fail_point;
use crate::gap::Gap;
use crate::gap::GapError;
use crate::sections;
use crate::sections::SectionError;
use crate::vcpu::Purpose;
use crate::vcpu::VcpuError;
use crate::vm_state::VmStateError;

/// How long the old worker may take to answer an offer. The broker's own deadline is shorter.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why this worker cannot take the guest over.
#[derive(Debug, Error)]
pub(crate) enum IncomingError {
    /// The main channel.
    #[error(transparent)]
    Main(#[from] MainError),
    /// A frame or the stream is malformed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The old worker refuses.
    #[error("the old worker refuses: {0}")]
    Refused(String),
    /// The old worker has closed before its answer.
    #[error("the old worker has closed the main channel before its answer")]
    HungUp,
    /// The old worker does not answer.
    #[error("the old worker has not answered the offer within {ANSWER_TIMEOUT:?}")]
    Silent,
    /// The broker has closed the control socket.
    #[error("the control socket ended while the old worker was to answer")]
    Control,
    /// Waiting failed.
    #[error("poll: {0}")]
    Poll(Errno),
    /// The answer's preview is malformed.
    #[error("the old worker's preview: {0}")]
    Preview(String),
    /// A section is refused.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// A vCPU refuses its state.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The VM refuses its state.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// The guest's clocks.
    #[error(transparent)]
    Gap(#[from] GapError),
    /// A device refuses its state.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// A fault for a test.
    #[error("{0}")]
    FailPoint(String),
}

/// Offers to take the guest over, and waits for the old worker's answer, which also names the descriptors that that one has. `control` ends the wait: nothing belongs there
/// now but a hang-up.
///
/// # Errors
///
/// [`IncomingError`].
pub(crate) fn agree(
    main: &mut MainChannel,
    offer: &Offer,
    control: BorrowedFd<'_>,
) -> Result<(Preview, Entries), IncomingError> {
    fail_point!(Agree).map_err(IncomingError::FailPoint)?;
    main.send(&Frame::encode(offer)?, SEND_TIMEOUT)?;
    let begun = Instant::now();
    let mut frame = Frame::default();
    loop {
        let left = ANSWER_TIMEOUT
            .checked_sub(begun.elapsed())
            .ok_or(IncomingError::Silent)?;
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut wait = [
            PollFd::from_borrowed_fd(main.as_fd(), PollFlags::IN),
            // For its end alone: connections of a vsock may come before the answer is seen.
            PollFd::from_borrowed_fd(control, PollFlags::empty()),
        ];
        match rustix::event::poll(&mut wait, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(IncomingError::Poll(e)),
        }
        let [_, control_ready] = &wait;
        if !control_ready.revents().is_empty() {
            return Err(IncomingError::Control);
        }
        let bytes = main.receive()?.ok_or(IncomingError::HungUp)?;
        match frame.push::<Answer>(bytes)? {
            None => {}
            Some(Answer::Refuse(reason)) => return Err(IncomingError::Refused(reason)),
            Some(Answer::Accept { preview, entries }) => {
                let preview = baton_ipc::channel::decode(&preview)
                    .map_err(|e| IncomingError::Preview(e.to_string()))?;
                return Ok((preview, Entries::said(entries)));
            }
        }
    }
}

/// The stream as it arrives.
pub(crate) struct Incoming {
    main: MainChannel,
    decoder: Decoder,
}

impl Incoming {
    pub(crate) fn new(main: MainChannel, decoder: Decoder) -> Self {
        Self { main, decoder }
    }

    /// The main channel, to wait for.
    pub(crate) fn channel(&self) -> &MainChannel {
        &self.main
    }

    /// Takes what has come; the stream once it is whole.
    ///
    /// # Errors
    ///
    /// [`IncomingError`] for a stream that is malformed or ends early.
    pub(crate) fn advance(&mut self) -> Result<Option<StateStream>, IncomingError> {
        loop {
            match self.main.receive()? {
                None => return Err(self.decoder.hang_up().into()),
                Some([]) => return Ok(None),
                Some(bytes) => {
                    if let Some(stream) = self.decoder.push(bytes)? {
                        return Ok(Some(stream));
                    }
                }
            }
        }
    }
}

/// Validates and loads a state from beyond a gap; the digest that the stream had.
///
/// # Errors
///
/// [`IncomingError`]; the VM then has parts of the state and must not run.
pub(crate) fn load(
    machinery: &mut Machinery,
    stream: StateStream,
    gap: Gap,
) -> Result<StateDigest, IncomingError> {
    let digest = stream.digest;
    let mut parsed = sections::parse(stream, machinery.vcpus.count(), &machinery.inventory, gap)?;
    parsed.cross(gap, &machinery.vm)?;
    fail_point!(Validate).map_err(IncomingError::FailPoint)?;
    // The vCPUs first, then what they deliver interrupts to, then the devices that raise them.
    machinery.vcpus.load(parsed.vcpus, Purpose::Transfer)?;
    if fail_point!(Load).map_err(IncomingError::FailPoint)? {
        return Ok(digest);
    }
    parsed.vm.load(&machinery.vm, Purpose::Transfer)?;
    machinery
        .platform
        .devices
        .load(baton_ipc::StartMode::CprTransfer, &parsed.devices)?;
    Ok(digest)
}
