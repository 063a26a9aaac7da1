//! Deterministic faults, armed by [`Order::Fail`](baton_ipc::worker::Order) in builds for tests. A default build contains
//! none of this: there, [`fail_point!`] is `Ok(false)`.

/// What happens at a site, which is named by its variant of [`baton_ipc::FailSite`]: `Ok(true)` when the step is to claim
/// its success without doing it, an error when it is to fail.
macro_rules! fail_point {
    ($site:ident) => {{
        #[cfg(feature = "fail-points")]
        let outcome = crate::fail_point::hit(baton_ipc::FailSite::$site);
        #[cfg(not(feature = "fail-points"))]
        let outcome = Ok::<bool, String>(false);
        outcome
    }};
}

pub(crate) use fail_point;

#[cfg(feature = "fail-points")]
mod armed {
    use std::sync::Mutex;
    use std::sync::PoisonError;
    use std::time::Duration;

    use baton_ipc::FailAction;
    use baton_ipc::FailPoint;
    use baton_ipc::FailSite;

    static ARMED: Mutex<Option<FailPoint>> = Mutex::new(None);

    /// Arms a fault, in place of the one that was armed before.
    pub(crate) fn arm(fault: FailPoint) {
        *ARMED.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
    }

    /// Lets the fault that is armed for this site happen, once.
    pub(crate) fn hit(site: FailSite) -> Result<bool, String> {
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(FailPoint { action, .. }) = armed.take_if(|fault| fault.site == site) else {
            return Ok(false);
        };
        drop(armed);
        match action {
            FailAction::Die => crate::signals::end(1),
            FailAction::Error => Err(format!("fail point {site:?}")),
            FailAction::Hang => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            FailAction::Lie => Ok(true),
            FailAction::Violate => {
                // Harmless, and on no list.
                let parent = rustix::process::getppid();
                Err(format!(
                    "fail point {site:?}: no filter refused getppid, which said {parent:?}"
                ))
            }
        }
    }
}

#[cfg(feature = "fail-points")]
pub(crate) use armed::arm;
#[cfg(feature = "fail-points")]
pub(crate) use armed::hit;
