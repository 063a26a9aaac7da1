//! Waiting, with a bound that only a hang reaches.

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
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
