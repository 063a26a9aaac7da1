//! QMP's errors: a class that programs look at, and a text for people (QEMU, `docs/interop/qmp-spec.rst`).

use std::fmt::Display;

use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

/// The class of an error, by QEMU's names (`qapi/error.json`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Anything.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// No such thing.
    DeviceNotFound,
    /// The thing is not there to be used.
    DeviceNotActive,
}

/// A refused or failed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) class: Class,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn generic(text: impl Display) -> Self {
        Self {
            class: Class::GenericError,
            text: text.to_string(),
        }
    }

    pub(crate) fn of(class: Class, text: impl Display) -> Self {
        Self {
            class,
            text: text.to_string(),
        }
    }

    /// The `error` member of an answer.
    pub(crate) fn to_json(&self) -> Value {
        let class = match self.class {
            Class::GenericError => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotFound => "DeviceNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
        };
        json!({"class": class, "desc": self.text})
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        if refusal.remedy.is_empty() {
            Self::generic(refusal.reason)
        } else {
            Self::generic(format_args!("{} ({})", refusal.reason, refusal.remedy))
        }
    }
}
