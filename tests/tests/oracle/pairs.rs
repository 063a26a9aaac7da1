//! The flows.

use crate::pair::Pair;
use crate::pair::differs;
use crate::pair::same;
use crate::party::New;

pub(crate) const CPR: &str = r#"old migrate-set-parameters {"mode": "cpr-transfer"}"#;
pub(crate) const MIGRATE: &str = r#"old migrate {"channels": [$main, $cpr]}"#;
pub(crate) const INCOMING: &str = r#"new migrate-incoming {"channels": [$main]}"#;
pub(crate) const HOLD: &str = r#"old migrate-set-capabilities {"capabilities": [{"capability": "pause-before-switchover", "state": true}]}"#;
const EVENTS: &str =
    r#"old migrate-set-capabilities {"capabilities": [{"capability": "events", "state": true}]}"#;
pub(crate) const OLD: &str = "old query-status {} => /status";
pub(crate) const NEW: &str = "new query-status {} => /status";
pub(crate) const MIGRATION: &str = "old query-migrate {} => /status";

pub(crate) const PAIRS: &[Pair] = &[
    same(
        "the whole flow, and what the sides are afterwards",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            MIGRATION,
            OLD,
            NEW,
            INCOMING,
            "old settles",
            OLD,
            "new has it",
            "new query-migrate {} => /status",
            "new query-migrate-parameters {} => /mode",
            "old query-migrate-parameters {} => /mode",
        ],
    ),
    same(
        "the events of either side",
        New::Deferred,
        &[
            CPR,
            EVENTS,
            MIGRATE,
            "new has the CPR state",
            r#"new migrate-set-capabilities {"capabilities": [{"capability": "events", "state": true}]}"#,
            INCOMING,
            "old settles",
            "new has it",
            "new query-migrate {} => /status",
            "old heard",
            "new heard",
        ],
    ),
    same(
        "the events of a cancel",
        New::Deferred,
        &[
            CPR,
            EVENTS,
            MIGRATE,
            "old migrate_cancel {}",
            "old settles",
            "old heard",
        ],
    ),
    differs(
        "cont on the old side, afterwards",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            "old cont {}",
            OLD,
            NEW,
        ],
        r#"done; done; done; old completed; new running; GenericError: the VM was handed to another broker, so `resume` is not possible (`baton status` shows its state); "postmigrate"; "running""#,
        "QEMU runs the guest twice, on one RAM",
    ),
    same(
        "migrate on the old side, afterwards",
        New::Deferred,
        &[CPR, MIGRATE, INCOMING, "old settles", "new has it", MIGRATE],
    ),
    same(
        "migrate-incoming, a second time",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            INCOMING,
        ],
    ),
    same(
        "a guest that stands still",
        New::Deferred,
        &[
            "old stop {}",
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            OLD,
            "new has it",
        ],
    ),
    same(
        "a guest that is to stand still there",
        New::Stands,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            OLD,
            "new has it",
            "new cont {}",
            NEW,
        ],
    ),
    same(
        "migrate-incoming with both channels",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            r#"new migrate-incoming {"channels": [$main, $cpr]}"#,
        ],
    ),
    differs(
        "migrate-incoming with the cpr channel",
        New::Deferred,
        &[CPR, MIGRATE, r#"new migrate-incoming {"channels": [$cpr]}"#],
        "done; done; GenericError: Channel list must have only one entry, for type 'main'",
        "QEMU takes it for a main channel",
    ),
    same(
        "migrate on the side that waits",
        New::Deferred,
        &[CPR, MIGRATE, r#"new migrate {"channels": [$main, $cpr]}"#],
    ),
    same(
        "while the other side is awaited: migrate, parameters, capabilities",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            MIGRATE,
            r#"old migrate-set-parameters {"mode": "normal"}"#,
            r#"old migrate-set-capabilities {"capabilities": [{"capability": "events", "state": false}]}"#,
            MIGRATION,
        ],
    ),
    differs(
        "while the other side is awaited: stop",
        New::Deferred,
        &[CPR, MIGRATE, "old stop {}", OLD],
        r#"done; done; GenericError: the VM is being upgraded, so `pause` is not possible (try again when the upgrade has ended, or `baton status` to see how it goes); "running""#,
        "whether the guest stands still is agreed on with the other side, and does not change until the transfer has ended",
    ),
    differs(
        "what can be yanked while the other side is awaited",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            r#"old yank {"instances": [{"type": "migration"}]}"#,
            "old settles",
            OLD,
        ],
        r#"done; done; done; old cancelled; "running""#,
        "QEMU has nothing to yank then, and waits for ever",
    ),
    differs(
        "cancelled while the other side is awaited",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            "old migrate_cancel {}",
            "old settles",
            OLD,
            "new lives",
        ],
        r#"done; done; done; old cancelled; "running"; new has ended"#,
        "QEMU's other side never hears of it",
    ),
    same(
        "cancelled twice",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            "old migrate_cancel {}",
            "old migrate_cancel {}",
            "old settles",
            OLD,
        ],
    ),
    differs(
        "held before the switchover, and let go",
        New::Deferred,
        &[
            CPR,
            HOLD,
            MIGRATE,
            INCOMING,
            "old is held",
            OLD,
            r#"old migrate-continue {"state": "pre-switchover"}"#,
            "old settles",
            "new has it",
        ],
        r#"done; done; done; done; "running"; done; old completed; new running"#,
        "the guest runs on while it is held; QEMU has stopped it by then",
    ),
    same(
        "held before the switchover, and cancelled",
        New::Deferred,
        &[
            CPR,
            HOLD,
            MIGRATE,
            INCOMING,
            "old is held",
            "old migrate_cancel {}",
            "old settles",
            OLD,
        ],
    ),
    differs(
        "a machine with more processors",
        New::TwoCpus,
        &[
            CPR,
            MIGRATE,
            "perhaps new migrate-incoming {\"channels\": [$main]}",
            "old settles",
            OLD,
            "old cont {}",
            OLD,
            "new lives",
        ],
        r#"done; done; old failed; "running"; done; "running"; new has ended"#,
        "QEMU says completed, and afterwards each side runs the guest",
    ),
    same(
        "a machine with more memory",
        New::MoreMemory,
        &[CPR, MIGRATE, "old settles", OLD, "new lives"],
    ),
    differs(
        "somebody connects to the cpr socket and goes",
        New::Deferred,
        &["a probe comes", "new lives"],
        "new lives",
        "QEMU takes the first who connects for its peer, and ends when it says nothing",
    ),
    differs(
        "somebody says something else on the cpr socket",
        New::Deferred,
        &["noise comes", "new lives"],
        "new lives",
        "QEMU ends; who is no peer is refused here, and the waiting goes on",
    ),
    same(
        "the side that waits is told to end",
        New::Deferred,
        &["new is told to end", "new lives"],
    ),
];
