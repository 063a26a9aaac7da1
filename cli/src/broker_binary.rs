//! Where the broker's binary is.

use std::path::PathBuf;

use baton_ipc::control::Refusal;

use crate::failure::unfit;

/// Names another binary, for tests and for trying a build.
pub(crate) const VARIABLE: &str = "BATON_BROKER";

/// Where packages put it.
const INSTALLED: &str = "/usr/libexec/baton-broker";

/// `$BATON_BROKER`, else `baton-broker` beside this program, else the installed one.
pub(crate) fn find() -> Result<PathBuf, Refusal> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        return Ok(PathBuf::from(named));
    }
    let beside = std::env::current_exe()
        .ok()
        .map(|program| program.with_file_name("baton-broker"));
    beside
        .iter()
        .chain(std::iter::once(&PathBuf::from(INSTALLED)))
        .find(|path| path.is_file())
        .cloned()
        .ok_or_else(|| {
            unfit(
                format!("there is no baton-broker beside this program, and no {INSTALLED}"),
                format!("install it, or name it: {VARIABLE}=/path/to/baton-broker"),
            )
        })
}
