//! The one table of what QMP offers here. Dispatch, the check of arguments and answers, `query-qmp-schema` and
//! `docs/qmp.md` are made from it, so that they cannot differ. The names are QEMU's (`qapi/*.json` of 10.0).

use crate::commands;
use crate::devices;
use crate::hmp;
use crate::schema::Command;
use crate::schema::Event;
use crate::schema::Type::List;
use crate::schema::Type::Str;
use crate::schema::Type::Struct as Of;
use crate::types;

macro_rules! command {
    ($name:literal, $arguments:expr, $returns:expr, $run:path, $doc:literal) => {
        Command {
            name: $name,
            doc: $doc,
            arguments: $arguments,
            returns: $returns,
            oob: false,
            run: $run,
        }
    };
    (oob $name:literal, $arguments:expr, $returns:expr, $run:path, $doc:literal) => {
        Command {
            name: $name,
            doc: $doc,
            arguments: $arguments,
            returns: $returns,
            oob: true,
            run: $run,
        }
    };
}

/// What the names of our own begin with (QEMU's `docs/devel/qapi-code-gen.rst`, "Downstream extensions").
pub(crate) const OWN: &str = "__org.baton_";

/// Every command.
#[rustfmt::skip]
pub(crate) static COMMANDS: &[Command] = &[
    command!("qmp_capabilities", &types::QMP_CAPABILITIES, Of(&types::EMPTY), commands::qmp_capabilities,
        "The first command of every connection; before it every other one is refused."),
    command!("query-commands", &types::EMPTY, List(&Of(&types::COMMAND_INFO)), commands::query_commands, "All commands."),
    command!("query-qmp-schema", &types::EMPTY, List(&Of(&types::SCHEMA_INFO)), commands::query_qmp_schema,
        "All commands, events and types. Made from the same table as this text and the commands themselves."),
    command!("query-version", &types::EMPTY, Of(&types::VERSION_INFO), commands::query_version, "Who speaks, and which QMP."),
    command!("query-name", &types::EMPTY, Of(&types::NAME_INFO), commands::query_name, "The VM's name."),
    command!("query-uuid", &types::EMPTY, Of(&types::UUID_INFO), commands::query_uuid, "The VM's identity."),
    command!("query-status", &types::EMPTY, Of(&types::STATUS_INFO), commands::query_status, "Whether the guest runs."),
    command!("query-cpus-fast", &types::EMPTY, List(&Of(&types::CPU_INFO)), commands::query_cpus_fast, "The vCPUs. The guest is not disturbed."),
    command!("query-memory-size-summary", &types::EMPTY, Of(&types::MEMORY), commands::query_memory_size_summary, "The guest's memory."),
    command!("query-block", &types::EMPTY, List(&Of(&types::BLOCK_INFO)), commands::query_block, "The disks, in the order in which the guest finds them."),
    command!("block_resize", &types::BLOCK_RESIZE, Of(&types::EMPTY), devices::block_resize,
        "Give a disk another size: the file behind it is made longer, or cut off once no request reaches beyond the new end. A block device has the size that it has, which the guest is told: resize it first, and give its size, or a smaller one. The guest's driver is told at once. Refused for a disk that is read-only, and while the worker is being replaced."),
    command!("blockdev-add", &types::BLOCKDEV_ADD, Of(&types::EMPTY), devices::blockdev_add,
        "Open a disk that `device_add` can give the guest. It is locked like a disk of the VM file, until `blockdev-del` or the VM's end."),
    command!("blockdev-del", &types::BLOCKDEV_DEL, Of(&types::EMPTY), devices::blockdev_del,
        "Close a node that no device is made of."),
    command!("netdev_add", &types::NETDEV_ADD, Of(&types::EMPTY), devices::netdev_add,
        "Open a tap that `device_add` can give the guest. It is there already (`ip tuntap add`), and no other VM's, until `netdev_del` or the VM's end."),
    command!("netdev_del", &types::NETDEV_DEL, Of(&types::EMPTY), devices::netdev_del,
        "Close a netdev that no device is made of."),
    command!("device_add", &types::DEVICE_ADD, Of(&types::EMPTY), devices::device_add,
        "Give the guest a disk or a network interface while it runs, by PCI hot-plug as ACPI has it. It is the guest's over upgrades, resets and transfers to another broker, until `device_del`; a VM that is started again has what its VM file says. Refused while the worker is being replaced."),
    command!("device_del", &types::DEVICE_DEL, Of(&types::EMPTY), devices::device_del,
        "Ask the guest to let a device go that `device_add` has added. DEVICE_DELETED says that nothing of it is left but its node or netdev; a reset of the guest takes it, too. DEVICE_UNPLUG_GUEST_ERROR says that the guest has not let it go within 5 s: it may still do so, and can be asked again."),
    command!("balloon", &types::BALLOON, Of(&types::EMPTY), commands::balloon,
        "Ask the guest's balloon driver to leave it so much memory; what it gives up goes back to the host. How far it comes is the guest's decision: BALLOON_CHANGE and `query-balloon` say. For a guest that runs, with `memory.balloon` in its VM file; the wish stays over upgrades and resets."),
    command!("query-balloon", &types::EMPTY, Of(&types::BALLOON_INFO), commands::query_balloon, "What the balloon leaves to the guest."),
    command!("stop", &types::EMPTY, Of(&types::EMPTY), commands::stop,
        "Stop the guest, until `cont`. Of no effect when it stands still; refused while its worker is being replaced. One that is awaited (`inmigrate`) stands still when it has come."),
    command!("cont", &types::EMPTY, Of(&types::EMPTY), commands::cont, "Let the guest run again. Of no effect when it runs. One that is awaited (`inmigrate`) runs when it has come, unless it stood still before."),
    command!("system_reset", &types::EMPTY, Of(&types::EMPTY), commands::system_reset, "Press the reset button, also of a guest that stands still, and while its worker is being replaced."),
    command!("system_powerdown", &types::EMPTY, Of(&types::EMPTY), commands::system_powerdown,
        "Press the power button, also of a guest that stands still, and while its worker is being replaced. What follows is the guest's decision: SHUTDOWN says that it did."),
    command!("quit", &types::EMPTY, Of(&types::EMPTY), commands::quit, "End the VM at once; the broker ends too."),
    command!("migrate", &types::MIGRATE, Of(&types::EMPTY), commands::migrate,
        "Begin an upgrade. The answer says that it has begun; MIGRATION and `query-migrate` say how it goes on. In mode `cpr-transfer`, without channels, the VM's configured worker is opened again and takes the guest over; the connection stays. With channels the guest goes to the broker that waits there (`baton run --incoming`): this one is then in `postmigrate`, and ends when its clients have gone, after ten minutes at the latest. In mode `cpr-reboot` it goes into the file of `uri` or of the `main` channel."),
    command!("migrate_cancel", &types::EMPTY, Of(&types::EMPTY), commands::migrate_cancel,
        "Cancel the upgrade that is under way; on the side that waits, refuse the guest that comes. Of no effect when there is none, or when it is too late."),
    command!("migrate-continue", &types::CONTINUE, Of(&types::EMPTY), commands::migrate_continue,
        "Go on with an upgrade that waits in `pre-switchover`."),
    command!("migrate-incoming", &types::INCOMING, Of(&types::EMPTY), commands::migrate_incoming,
        "To a broker that waits with `--incoming defer`: listen for the main channel, or load the guest's file. The old side, which may have sent its CPR state already, goes on only then; it waits for ten minutes. Once only."),
    command!("query-migrate", &types::EMPTY, Of(&types::MIGRATION_INFO), commands::query_migrate,
        "The upgrade that is under way, or the last one, whoever asked for it."),
    command!("migrate-set-parameters", &types::PARAMETERS, Of(&types::EMPTY), commands::migrate_set_parameters, "Set parameters; what is left out stays."),
    command!("query-migrate-parameters", &types::EMPTY, Of(&types::PARAMETERS), commands::query_migrate_parameters, "The parameters."),
    command!("migrate-set-capabilities", &types::SET_CAPABILITIES, Of(&types::EMPTY), commands::migrate_set_capabilities,
        "Switch capabilities on or off. Refused while an upgrade is under way."),
    command!("query-migrate-capabilities", &types::EMPTY, List(&Of(&types::CAPABILITY_STATUS)), commands::query_migrate_capabilities, "All capabilities."),
    command!("__org.baton_events", &types::OWN_EVENTS, Of(&types::EMPTY), commands::own_events,
        "Be told of events that QEMU does not have, those whose names begin with `__org.baton_`, on this connection. Nobody is told of them otherwise: some clients take no event that they do not know."),
    command!(oob "query-yank", &types::EMPTY, List(&Of(&types::YANK_INSTANCE)), commands::query_yank,
        "What can be cut off: `migration`, once, while an upgrade is under way."),
    command!(oob "yank", &types::YANK, Of(&types::EMPTY), commands::yank,
        "Cut something off. `migration` closes both channels, from either side: before the commit the old worker runs on."),
    command!("human-monitor-command", &types::HMP, Str, hmp::execute, "A line of QEMU's human monitor, for the few verbs that its documentation of CPR uses."),
];

/// Every event.
#[rustfmt::skip]
pub(crate) static EVENTS: &[Event] = &[
    Event { name: "STOP", doc: "The guest stands still: at an operator's wish, or in the pause of an upgrade.", data: &types::EMPTY },
    Event { name: "RESUME", doc: "The guest runs again.", data: &types::EMPTY },
    Event { name: "RESET", doc: "The guest was reset.", data: &types::RESET_DATA },
    Event { name: "POWERDOWN", doc: "The guest's power button was pressed.", data: &types::EMPTY },
    Event { name: "SHUTDOWN", doc: "The guest has ended. The connection ends after it.", data: &types::SHUTDOWN_DATA },
    Event { name: "BALLOON_CHANGE", doc: "The guest has given memory up, or taken it back. At most once a second, the last number always.", data: &types::BALLOON_DATA },
    Event { name: "DEVICE_DELETED", doc: "A device that was added is gone, with every descriptor that its worker had of it.", data: &types::DEVICE_DELETED_DATA },
    Event { name: "DEVICE_UNPLUG_GUEST_ERROR", doc: "The guest has not let a device go.", data: &types::DEVICE_KEPT_DATA },
    Event { name: "GUEST_PANICKED", doc: "The guest's kernel has panicked, by its own word. STOP follows unless it runs on.", data: &types::PANICKED_DATA },
    Event { name: "GUEST_CRASHLOADED", doc: "The guest's kernel has panicked, and its crash kernel takes over.", data: &types::CRASH_LOADED_DATA },
    Event { name: "GUEST_PVSHUTDOWN", doc: "The guest has shut down by its pvpanic device. SHUTDOWN follows.", data: &types::EMPTY },
    Event { name: "MIGRATION", doc: "An upgrade has come on, if capability `events` is switched on. Those of the pause are sent after it, with the times at which they happened.", data: &types::MIGRATION_DATA },
    Event { name: "__org.baton_WORKER_REPLACED", doc: "A new worker runs the guest, whoever asked for that.", data: &types::REPLACED_DATA },
    Event { name: "__org.baton_VM_LOST", doc: "Nobody runs the guest any more, and nobody will.", data: &types::LOST_DATA },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability::CAPABILITIES;
    use crate::types::CAPABILITY;

    #[test]
    fn the_capabilities_are_those_that_work() {
        let declared: Vec<_> = CAPABILITY.values.iter().map(|value| value.0).collect();
        let known: Vec<_> = CAPABILITIES.iter().map(|known| known.0).collect();
        assert_eq!(declared, known);
    }

    #[test]
    fn events_of_our_own_carry_a_prefix() {
        let qemus = [
            "STOP",
            "RESUME",
            "RESET",
            "POWERDOWN",
            "SHUTDOWN",
            "BALLOON_CHANGE",
            "DEVICE_DELETED",
            "DEVICE_UNPLUG_GUEST_ERROR",
            "GUEST_PANICKED",
            "GUEST_CRASHLOADED",
            "GUEST_PVSHUTDOWN",
            "MIGRATION",
        ];
        for event in EVENTS {
            assert!(qemus.contains(&event.name) || event.name.starts_with(OWN));
        }
    }
}
