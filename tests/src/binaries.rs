//! Where the programs under test are.

use std::path::Path;
use std::path::PathBuf;

/// The target that `.cargo/config.toml` names.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A directory with `baton`, `baton-broker` and `baton-worker` of one build.
#[derive(Clone, Debug)]
pub struct Binaries(PathBuf);

impl Binaries {
    /// The release build: `$BATON_BIN`, else the target directory's.
    ///
    /// # Panics
    ///
    /// When it is not there, with the command that makes it.
    #[must_use]
    pub fn release() -> Self {
        Self::find(
            "BATON_BIN",
            "release",
            "cargo build --release -p baton -p baton-broker -p baton-worker",
        )
    }

    /// The build with fail points (profile `fault`), whose worker is another binary: `$BATON_FAULT_BIN`, else the target
    /// directory's.
    ///
    /// # Panics
    ///
    /// When it is not there, with the command that makes it.
    #[must_use]
    pub fn with_fail_points() -> Self {
        Self::find(
            "BATON_FAULT_BIN",
            "fault",
            "cargo build --profile fault -p baton -p baton-broker -p baton-worker --features baton-broker/fail-points,baton-worker/fail-points",
        )
    }

    fn find(variable: &str, profile: &str, command: &str) -> Self {
        let named = std::env::var_os(variable).map(PathBuf::from);
        let directory = named.unwrap_or_else(|| target_directory().join(TARGET).join(profile));
        for program in ["baton", "baton-qmp", "baton-broker", "baton-worker"] {
            assert!(
                directory.join(program).is_file(),
                "there is no {program} in {}; make it with\n  {command}\nor name its directory in {variable}",
                directory.display(),
            );
        }
        Self(directory)
    }

    /// The command that people use.
    #[must_use]
    pub fn baton(&self) -> PathBuf {
        self.0.join("baton")
    }

    /// The broker.
    #[must_use]
    pub fn broker(&self) -> PathBuf {
        self.0.join("baton-broker")
    }

    /// The worker.
    #[must_use]
    pub fn worker(&self) -> PathBuf {
        self.0.join("baton-worker")
    }
}

/// The target directory that this test was built into: `TARGET_DIR/TRIPLE/PROFILE/deps/this`.
fn target_directory() -> PathBuf {
    let me = std::env::current_exe().expect("a test knows its own path");
    me.ancestors()
        .nth(4)
        .map(Path::to_owned)
        .expect("a test lies in a target directory")
}
