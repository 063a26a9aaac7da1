//! Waiting, with a bound that only a hang reaches.

use std::fmt::Debug;
use std::time::Duration;
use std::time::Instant;

/// No step of a healthy VM takes nearly as long, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(40);

/// Asks until there is an answer.
///
/// # Panics
///
/// When there is none for so long that something hangs.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    until_said(what, || ask().ok_or("no answer"))
}

/// The same of somebody who says meanwhile how things stand.
///
/// # Panics
///
/// Likewise; with what was said last.
pub(crate) fn until_said<T, E: Debug>(what: &str, mut ask: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(said) => assert!(
                Instant::now() < deadline,
                "waited in vain: {what}: {said:?}"
            ),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
