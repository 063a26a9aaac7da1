//! Migration capabilities: what may be switched on, and what `migrate` says of it then.

/// A capability: its name, what it means here, and why no CPR mode goes with it, in QEMU's words
/// (`migration/options.c`, `migration/migration.c`).
pub(crate) type Capability = (&'static str, &'static str, Option<&'static str>);

/// All that can be set. What QEMU has besides these moves RAM, which stays where it is here.
pub(crate) const CAPABILITIES: &[Capability] = &[
    ("events", "MIGRATION events are sent.", None),
    (
        "return-path",
        "Accepted, and always so: an upgrade is completed only when the new worker has said that it runs.",
        None,
    ),
    (
        "pause-before-switchover",
        "`migrate` waits in `pre-switchover`, the guest still running, for `migrate-continue`.",
        None,
    ),
    (
        "multifd",
        "Accepted, and of no effect: device state is some kilobytes.",
        None,
    ),
    (
        "postcopy-ram",
        "Can be set; `migrate` refuses it in every mode that there is.",
        Some("Cannot use postcopy with CPR"),
    ),
    (
        "background-snapshot",
        "Can be set; `migrate` refuses it in every mode that there is.",
        Some("Cannot use background snapshot with CPR"),
    ),
    (
        "x-colo",
        "Can be set; `migrate` refuses it in every mode that there is.",
        Some("Cannot use COLO with CPR"),
    ),
    (
        "mapped-ram",
        "Can be set; `migrate` refuses it, since nothing goes to a file.",
        Some("Migration requires seekable transport (e.g. file)"),
    ),
];
