//! The old side: how far a worker is with handing its guest over.
//!
//! ```text
//! Idle ── transfer ──► Offered ── offer accepted ──► Agreed ── park ──► (the control thread's phase Parked)
//!   ▲                     │ refused, hang-up            │
//!   └─────── rollback ────┴─────────────────────────────┘
//! ```

use std::time::Duration;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::state_stream::Answer;
use baton_ipc::state_stream::Frame;
use baton_ipc::state_stream::Machine;
use baton_ipc::state_stream::Offer;
use serde::Deserialize;
use serde::Serialize;

use super::main_channel::MainChannel;
use crate::cpuid::Told;
use crate::fail_point::fail_point;
use crate::pci_host;
use crate::sections;

/// How long the other worker may take to read an answer or a state that fits its socket's buffer.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_millis(50);

/// What the old worker tells the new one before the pause.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Preview {
    /// What the guest sees as its processors.
    pub(crate) cpuid: Told,
    /// Where the guest has its BARs, and what its interrupts write.
    pub(crate) pci: pci_host::Preview,
}

/// How far it is.
pub(crate) enum Outgoing {
    /// No transfer.
    Idle,
    /// The offer has not come whole.
    Offered {
        main: MainChannel,
        frame: Frame,
        /// The new worker has another broker.
        elsewhere: bool,
    },
    /// Both sides agree.
    Agreed(MainChannel),
}

/// What an accepted offer is answered with.
pub(crate) struct Acceptance {
    pub(crate) preview: Preview,
    pub(crate) entries: Vec<(DescriptorKey, Description)>,
}

/// What came of bytes on the main channel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// More has to come.
    Waiting,
    /// The offer was accepted.
    Agreed,
    /// It was refused, or broke off; why. There is no transfer any more.
    Ended(String),
}

impl Outgoing {
    /// Begins, with a worker of another broker if that is `elsewhere`.
    pub(crate) fn begin(main: MainChannel, elsewhere: bool) -> Self {
        Self::Offered {
            main,
            frame: Frame::default(),
            elsewhere,
        }
    }

    /// The main channel, while there is something to wait for on it.
    pub(crate) fn awaited(&self) -> Option<&MainChannel> {
        match self {
            Self::Offered { main, .. } => Some(main),
            Self::Idle | Self::Agreed(_) => None,
        }
    }

    /// Takes what has come. `acceptance` is asked for when the offer is accepted, and told whether the new worker is elsewhere.
    pub(crate) fn advance(
        &mut self,
        ours: &Machine,
        acceptance: impl FnOnce(bool) -> Acceptance,
    ) -> Progress {
        let Self::Offered {
            main,
            frame,
            elsewhere,
        } = self
        else {
            return Progress::Waiting;
        };
        let received = match main.receive() {
            Ok(Some(bytes)) => frame.push::<Offer>(bytes).map_err(|e| e.to_string()),
            Ok(None) => {
                Err("the new worker has closed the main channel before its offer".to_owned())
            }
            Err(error) => Err(error.to_string()),
        };
        let refused = match received {
            Ok(None) => return Progress::Waiting,
            Ok(Some(offer)) => fail_point!(Agree).and_then(|_| sections::judge(ours, &offer)),
            Err(error) => Err(error),
        };
        let answer = match &refused {
            Ok(()) => {
                let Acceptance { preview, entries } = acceptance(*elsewhere);
                postcard::to_stdvec(&preview)
                    .map(|preview| Answer::Accept { preview, entries })
                    .map_err(|e| e.to_string())
            }
            Err(reason) => Ok(Answer::Refuse(reason.clone())),
        };
        let sent = answer
            .and_then(|answer| Frame::encode(&answer).map_err(|e| e.to_string()))
            .and_then(|bytes| main.send(&bytes, SEND_TIMEOUT).map_err(|e| e.to_string()));
        match (refused.and(sent), std::mem::replace(self, Self::Idle)) {
            (Ok(()), Self::Offered { main, .. }) => {
                *self = Self::Agreed(main);
                Progress::Agreed
            }
            (Ok(()), _) => Progress::Waiting,
            (Err(reason), _) => Progress::Ended(reason),
        }
    }
}
