//! What is taken, and what is refused, in each run state of either side.

use crate::pair::Pair;
use crate::pair::differs;
use crate::pair::same;
use crate::pairs::CPR;
use crate::pairs::HOLD;
use crate::pairs::INCOMING;
use crate::pairs::MIGRATE;
use crate::pairs::NEW;
use crate::pairs::OLD;
use crate::party::New;

pub(crate) const RUN_STATES: &[Pair] = &[
    same(
        "running",
        New::Nobody,
        &[
            "old cont {}",
            "old migrate_cancel {}",
            r#"old migrate-continue {"state": "device"}"#,
            "old system_reset {}",
            "old system_powerdown {}",
            OLD,
        ],
    ),
    differs(
        "paused",
        New::Nobody,
        &[
            "old stop {}",
            "old stop {}",
            "old system_powerdown {}",
            "old system_reset {}",
            "old migrate_cancel {}",
            OLD,
            "old query-cpus-fast {} => /0/cpu-index",
            "old cont {}",
            OLD,
        ],
        r#"done; done; done; done; done; "paused"; 0; done; "running""#,
        "a guest that stands still is `paused`, whether it was reset since or not",
    ),
    // (A QEMU that interprets its guest may not answer at all when it refuses a device.)
    same(
        "setup",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            OLD,
            "old query-migrate {} => /status /ram /downtime /total-time",
            "old cont {}",
            "old system_powerdown {}",
            r#"old migrate-continue {"state": "pre-switchover"}"#,
            r#"old migrate-incoming {"channels": [$main]}"#,
            r#"old device_del {"id": "x"}"#,
            r#"old human-monitor-command {"command-line": "info status"}"#,
            OLD,
        ],
    ),
    same(
        "setup, and the guest is reset",
        New::Deferred,
        &[CPR, MIGRATE, "old system_reset {}", OLD],
    ),
    differs(
        "inmigrate, before the CPR state",
        New::Deferred,
        &["new serves QMP"],
        "new serves",
        "QEMU has no monitor before",
    ),
    differs(
        "inmigrate",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            "new has the CPR state",
            NEW,
            "new query-migrate {} => /status",
            "new query-cpus-fast {} => /0/cpu-index",
            "new system_powerdown {}",
            "new migrate_cancel {}",
            "new query-migrate-parameters {} => /mode",
            NEW,
        ],
        r#"done; done; "inmigrate"; -; -; GenericError: the VM is awaited from another broker, so `power-button` is not possible (`baton status` shows its state); done; "normal"; "inmigrate""#,
        "there are no processors yet, and nobody presses the button of a guest that is elsewhere; QEMU says that it does",
    ),
    same(
        "inmigrate, told to stop",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            "new stop {}",
            NEW,
            INCOMING,
            "old settles",
            "new has it",
        ],
    ),
    same(
        "inmigrate, told to go on",
        New::Stands,
        &[
            CPR,
            MIGRATE,
            "new cont {}",
            NEW,
            INCOMING,
            "old settles",
            "new has it",
        ],
    ),
    same(
        "inmigrate, both channels named",
        New::Listening,
        &[CPR, MIGRATE, "old settles", OLD, "new has it", INCOMING],
    ),
    same(
        "inmigrate, the cpr channel alone named",
        New::CprAlone,
        &[CPR, MIGRATE, NEW, INCOMING, "old settles", "new has it"],
    ),
    same(
        "held before the switchover",
        New::Deferred,
        &[
            CPR,
            HOLD,
            MIGRATE,
            INCOMING,
            "old is held",
            MIGRATE,
            r#"old migrate-set-capabilities {"capabilities": [{"capability": "events", "state": true}]}"#,
            r#"old migrate-continue {"state": "device"}"#,
            NEW,
        ],
    ),
    differs(
        "postmigrate",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            OLD,
            "old stop {}",
            "old migrate_cancel {}",
            r#"old migrate-continue {"state": "pre-switchover"}"#,
            r#"old migrate-incoming {"channels": [$main]}"#,
            "old query-migrate {} => /status",
            r#"old human-monitor-command {"command-line": "info status"}"#,
            "old system_powerdown {}",
            OLD,
            "old quit {}",
            NEW,
        ],
        r#"done; done; done; old completed; new running; "postmigrate"; done; done; GenericError: Migration not in expected state: completed; GenericError: '-incoming' was not specified on the command line; "completed"; "VM status: paused (postmigrate)\r\n"; GenericError: the VM was handed to another broker, so `power-button` is not possible (`baton status` shows its state); "postmigrate"; done; "running""#,
        "there is no guest here whose button could be pressed",
    ),
    differs(
        "postmigrate, and the guest is reset",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            "old system_reset {}",
            OLD,
            NEW,
        ],
        r#"done; done; done; old completed; new running; GenericError: the VM was handed to another broker, so `reset` is not possible (`baton status` shows its state); "postmigrate"; "running""#,
        "QEMU resets the memory that the other side's guest runs in",
    ),
    same(
        "failed",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            "new is killed",
            "old settles",
            OLD,
            "old stop {}",
            OLD,
            "old cont {}",
            OLD,
        ],
    ),
];
