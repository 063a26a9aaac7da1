//! One module per command.

pub(crate) mod audit;
pub(crate) mod console;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod fleet;
pub(crate) mod learn;
pub(crate) mod list;
pub(crate) mod log;
pub(crate) mod policy;
pub(crate) mod qmp;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod steer;
pub(crate) mod stop;
pub(crate) mod successor;
pub(crate) mod upgrade;
