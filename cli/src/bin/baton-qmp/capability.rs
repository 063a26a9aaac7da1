//! Migration capabilities: what may be switched on, and what `migrate` says of it then. What each means is in `types.rs`.

use crate::migration::Mode;

/// A capability: its name, and what it does not go with.
pub(crate) type Capability = (&'static str, Option<Clash>);

/// What a capability does not go with, in QEMU's words (`migration/options.c`, `migration/migration.c`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Clash {
    /// Any CPR mode.
    Cpr(&'static str),
    /// A mode in which nothing goes into a file.
    Sockets(&'static str),
}

impl Clash {
    /// Why it does not go with this mode.
    pub(crate) fn with(self, mode: Mode) -> Option<&'static str> {
        match (self, mode) {
            // Refused by itself, which is the reason then.
            (_, Mode::Normal) | (Self::Sockets(_), Mode::CprReboot) => None,
            (Self::Cpr(why) | Self::Sockets(why), _) => Some(why),
        }
    }

    /// Why, for the document.
    pub(crate) fn why(self) -> &'static str {
        match self {
            Self::Cpr(why) | Self::Sockets(why) => why,
        }
    }
}

/// All that can be set. What QEMU has besides these moves RAM, which stays where it is here.
pub(crate) const CAPABILITIES: &[Capability] = &[
    ("events", None),
    ("return-path", None),
    ("pause-before-switchover", None),
    ("multifd", None),
    ("x-ignore-shared", None),
    (
        "postcopy-ram",
        Some(Clash::Cpr("Cannot use postcopy with CPR")),
    ),
    (
        "background-snapshot",
        Some(Clash::Cpr("Cannot use background snapshot with CPR")),
    ),
    ("x-colo", Some(Clash::Cpr("Cannot use COLO with CPR"))),
    (
        "mapped-ram",
        Some(Clash::Sockets(
            "Migration requires seekable transport (e.g. file)",
        )),
    ),
];
