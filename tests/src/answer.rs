//! What the `baton` command answered.

use std::process::Output;

use serde::Deserialize;
use serde_json::Value;

/// How one command ended.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Answer {
    /// Of a command that was run by other means.
    #[must_use]
    pub fn of(output: &Output) -> Self {
        Self::new(output, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub(crate) fn new(output: &Output, stderr: String) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr,
        }
    }

    /// The document that it printed.
    ///
    /// # Panics
    ///
    /// When it printed none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON document ({error}): {self:?}"))
    }

    /// This answer, whose exit status has to be this one.
    ///
    /// # Panics
    ///
    /// When it is another.
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// What an upgrade did, with the exit status that belongs to it.
    ///
    /// # Panics
    ///
    /// When this is no upgrade's document, or the exit status is not its outcome's.
    #[must_use]
    pub fn upgrade(&self) -> Upgrade {
        let upgrade: Upgrade = serde_json::from_value(self.json())
            .unwrap_or_else(|error| panic!("no upgrade ({error}): {self:?}"));
        let code = match upgrade.outcome.as_str() {
            "committed" | "rehearsed" => 0,
            "aborted" => 10,
            "lost" => 20,
            other => panic!("no outcome {other:?}"),
        };
        assert_eq!(self.code, Some(code), "{self:#?}");
        upgrade
    }
}

/// The document that `baton upgrade --json` prints.
#[derive(Clone, Debug, Deserialize)]
pub struct Upgrade {
    /// `committed`, `aborted`, `lost` or `rehearsed`.
    pub outcome: String,
    /// The generation that runs now.
    pub generation: u32,
    /// Its process.
    pub worker_pid: i32,
    /// Its binary's SHA-256.
    pub worker_digest: String,
    /// The guest's pause by the workers' clocks, in microseconds.
    pub blackout_us: u64,
    /// The guest's pause by the broker's clock, in microseconds; 0 when there was none.
    pub pause_us: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// Their digest.
    pub state_digest: String,
    /// The step that failed.
    pub failed_step: Option<String>,
    /// Why.
    pub reason: String,
}
