//! The types of the table's arguments, answers and events. Their names and shapes are QEMU's (`qapi/*.json` of 10.0).

use crate::schema::Enum;
use crate::schema::Struct;
use crate::schema::Type::Any;
use crate::schema::Type::Bool;
use crate::schema::Type::Enum as OneOf;
use crate::schema::Type::Int;
use crate::schema::Type::List;
use crate::schema::Type::Number;
use crate::schema::Type::Str;
use crate::schema::Type::Struct as Of;
use crate::schema::Variants;
use crate::schema::member;
use crate::schema::optional;

/// Nothing.
pub(crate) static EMPTY: Struct = Struct {
    name: "q_empty",
    doc: "No members.",
    members: &[],
    variants: None,
};

macro_rules! object {
    ($constant:ident, $name:literal, $doc:literal, [$($member:expr),* $(,)?]) => {
        pub(crate) static $constant: Struct = Struct { name: $name, doc: $doc, members: &[$($member),*], variants: None };
    };
    ($constant:ident, $name:literal, $doc:literal, [$($member:expr),* $(,)?], $tag:literal => [$($case:expr),* $(,)?]) => {
        pub(crate) static $constant: Struct = Struct {
            name: $name, doc: $doc, members: &[$($member),*],
            variants: Some(Variants { tag: $tag, cases: &[$($case),*] }),
        };
    };
}

macro_rules! choice {
    ($constant:ident, $name:literal, $doc:literal, [$(($value:literal, $meaning:literal)),* $(,)?]) => {
        pub(crate) static $constant: Enum = Enum { name: $name, doc: $doc, values: &[$(($value, $meaning)),*] };
    };
}

choice!(
    QMP_CAPABILITY,
    "QMPCapability",
    "What a client may ask for when it connects.",
    [("oob", "Commands may be executed out of band (`exec-oob`)."),]
);
object!(
    QMP_CAPABILITIES,
    "q_obj_qmp_capabilities-arg",
    "Arguments of `qmp_capabilities`.",
    [optional(
        "enable",
        List(&OneOf(&QMP_CAPABILITY)),
        "What to enable; nothing if left out."
    ),]
);

object!(
    COMMAND_INFO,
    "CommandInfo",
    "A command.",
    [member("name", Str, "Its name.")]
);

object!(
    VERSION_TRIPLE,
    "VersionTriple",
    "A version in three parts.",
    [
        member("major", Int, "Major."),
        member("minor", Int, "Minor."),
        member("micro", Int, "Micro."),
    ]
);
object!(
    VERSION_INFO,
    "VersionInfo",
    "Who speaks, and which QMP.",
    [
        member(
            "qemu",
            Of(&VERSION_TRIPLE),
            "The QEMU release whose QMP this is, as far as it goes."
        ),
        member("package", Str, "This program and its version."),
    ]
);

choice!(
    RUN_STATE,
    "RunState",
    "How the guest is.",
    [
        ("prelaunch", "Not started yet."),
        (
            "running",
            "It runs; also while its worker is being replaced."
        ),
        ("paused", "It stands still at an operator's wish."),
        ("shutdown", "It has powered itself off."),
        ("inmigrate", "It is another broker's, and is awaited here."),
        (
            "postmigrate",
            "It was handed to another broker, and runs there."
        ),
        ("internal-error", "Its worker is dead: the guest is lost."),
        (
            "guest-panicked",
            "Its kernel has panicked, and it stands still until `cont`."
        ),
    ]
);
object!(
    STATUS_INFO,
    "StatusInfo",
    "Whether the guest runs.",
    [
        member("running", Bool, "It runs."),
        member("status", OneOf(&RUN_STATE), "How it is."),
    ]
);

choice!(
    TARGET,
    "SysEmuTarget",
    "The guest's architecture.",
    [("x86_64", "64-bit x86.")]
);
object!(
    CPU_PROPS,
    "CpuInstanceProperties",
    "Where a vCPU is in the guest's topology.",
    [
        member("socket-id", Int, "Its socket."),
        member("core-id", Int, "Its core."),
        member("thread-id", Int, "Its hardware thread."),
    ]
);
object!(
    CPU_INFO,
    "CpuInfoFast",
    "A vCPU.",
    [
        member("cpu-index", Int, "Its number, from 0."),
        member(
            "qom-path",
            Str,
            "Its path in the object tree; made up, there is no tree."
        ),
        member(
            "thread-id",
            Int,
            "The thread that runs it, in the broker's pid namespace. Another one after an upgrade."
        ),
        member("target", OneOf(&TARGET), "Its architecture."),
        optional(
            "props",
            Of(&CPU_PROPS),
            "Where it is in the guest's topology."
        ),
    ]
);
object!(
    MEMORY,
    "MemoryInfo",
    "The guest's memory.",
    [
        member("base-memory", Int, "Bytes that it started with."),
        optional("plugged-memory", Int, "Bytes plugged since; always 0."),
    ]
);
choice!(
    DETECT_ZEROES,
    "BlockdevDetectZeroesOptions",
    "What becomes of zeroes that the guest writes.",
    [("off", "They are written."),]
);
object!(
    CACHE_INFO,
    "BlockdevCacheInfo",
    "How a disk is cached by the host.",
    [
        member(
            "writeback",
            Bool,
            "Always: a flush of the guest's is one of the host's."
        ),
        member("direct", Bool, "The VM file's `direct`."),
        member("no-flush", Bool, "Never."),
    ]
);
object!(
    BLOCK_DEVICE,
    "BlockDeviceInfo",
    "What is behind a disk.",
    [
        member("file", Str, "The file or block device."),
        member("drv", Str, "Its format: `raw`."),
        member("ro", Bool, "The guest may not write."),
        member("encrypted", Bool, "Never."),
        member("backing_file_depth", Int, "0: a raw image has none."),
        member(
            "detect_zeroes",
            OneOf(&DETECT_ZEROES),
            "What becomes of zeroes."
        ),
        member("cache", Of(&CACHE_INFO), "How it is cached."),
        member("node-name", Str, "Its name for `block_resize`."),
        member("image", Of(&IMAGE_INFO), "The image."),
    ]
);
object!(
    IMAGE_INFO,
    "ImageInfo",
    "A disk's image.",
    [
        member("filename", Str, "The file or block device."),
        member("format", Str, "`raw`."),
        member("virtual-size", Int, "Bytes that the guest sees."),
    ]
);
choice!(
    BLOCKDEV_DRIVER,
    "BlockdevDriver",
    "What kind of thing a node opens. Its bytes are the disk's: there are no image formats.",
    [
        ("file", "A regular file."),
        ("host_device", "A block device."),
    ]
);
object!(
    CACHE_OPTIONS,
    "BlockdevCacheOptions",
    "How a node is cached by the host.",
    [optional(
        "direct",
        Bool,
        "Open it with O_DIRECT; no if left out."
    )]
);
object!(
    BLOCKDEV_ADD,
    "q_obj_blockdev-add-arg",
    "Arguments of `blockdev-add`.",
    [
        member("driver", OneOf(&BLOCKDEV_DRIVER), "What it opens."),
        member(
            "node-name",
            Str,
            "Its name, of no other node and no disk of the VM file: 1 to 20 of `A-Z a-z 0-9 . _ -`."
        ),
        member(
            "filename",
            Str,
            "An absolute path, which policy has to grant under `disk`."
        ),
        optional(
            "read-only",
            Bool,
            "The guest may not write; no if left out."
        ),
        optional("cache", Of(&CACHE_OPTIONS), "How it is cached."),
    ]
);
object!(
    BLOCKDEV_DEL,
    "q_obj_blockdev-del-arg",
    "Arguments of `blockdev-del`.",
    [member("node-name", Str, "Which.")]
);
object!(
    DEVICE_ADD,
    "q_obj_device_add-arg",
    "Arguments of `device_add`.",
    [
        member("driver", Str, "`virtio-blk-pci` or `virtio-net-pci`."),
        member(
            "id",
            Str,
            "Its name, of no other device: a letter, then up to 19 of `A-Z a-z 0-9 . _ -`."
        ),
        optional(
            "drive",
            Str,
            "Of a disk: the node that it is made of; needed."
        ),
        optional(
            "netdev",
            Str,
            "Of a network interface: the netdev that it is made of; needed."
        ),
        optional(
            "mac",
            Str,
            "Of a network interface: the guest's address, as in `52:54:00:12:34:56`; needed."
        ),
        optional(
            "serial",
            Str,
            "Of a disk: what the guest reads as its serial number; none if left out."
        ),
        optional(
            "num-queues",
            Int,
            "Of a disk: how many queues, 1 to 8; 1 if left out. A network interface has as many as its netdev."
        ),
        optional("bus", Str, "`pci.0` or `pcie.0`: there is one."),
        optional(
            "addr",
            Str,
            "Its PCI device number, as in `0x5` or `5.0`; the first that is free if left out."
        ),
    ]
);
choice!(
    NET_CLIENT_DRIVER,
    "NetClientDriver",
    "What a netdev can be.",
    [("tap", "A tap of the host.")]
);
object!(
    NETDEV_ADD,
    "q_obj_netdev_add-arg",
    "Arguments of `netdev_add`.",
    [
        member("type", OneOf(&NET_CLIENT_DRIVER), "What it is."),
        member(
            "id",
            Str,
            "Its name, of no other netdev and no network interface of the VM file: 1 to 20 of `A-Z a-z 0-9 . _ -`."
        ),
        member(
            "ifname",
            Str,
            "The tap's name: one that is there, which policy has to grant under `net`."
        ),
        optional(
            "queues",
            Int,
            "How many queues of it, 1 to 8; 1 if left out. For more the tap has to have been made with `multi_queue`."
        ),
        optional("script", Str, "`no`: none is started."),
        optional("downscript", Str, "`no`: none is started."),
    ]
);
object!(
    NETDEV_DEL,
    "q_obj_netdev_del-arg",
    "Arguments of `netdev_del`.",
    [member("id", Str, "Which.")]
);
object!(
    DEVICE_DEL,
    "q_obj_device_del-arg",
    "Arguments of `device_del`.",
    [member("id", Str, "Which.")]
);
object!(
    DEVICE_DELETED_DATA,
    "q_obj_DEVICE_DELETED-arg",
    "Data of DEVICE_DELETED.",
    [
        optional("device", Str, "Its name."),
        member(
            "path",
            Str,
            "Its path in the object tree; made up, there is no tree."
        ),
    ]
);
object!(
    DEVICE_KEPT_DATA,
    "DeviceAndPath",
    "Data of DEVICE_UNPLUG_GUEST_ERROR.",
    [
        optional("device", Str, "Its name."),
        member(
            "path",
            Str,
            "Its path in the object tree; made up, there is no tree."
        ),
    ]
);
object!(
    BLOCK_RESIZE,
    "q_obj_block_resize-arg",
    "Arguments of `block_resize`.",
    [
        optional("device", Str, "The disk, by its `id` in the VM file."),
        optional("node-name", Str, "The disk, by its node's name."),
        member(
            "size",
            Int,
            "Bytes, a multiple of 512. What is beyond them is lost."
        ),
    ]
);
object!(
    BLOCK_INFO,
    "BlockInfo",
    "A disk.",
    [
        member(
            "device",
            Str,
            "Its `id` in the VM file; empty of one that was added."
        ),
        optional("qdev", Str, "The `id` of a device that was added."),
        member("type", Str, "`unknown`, as in QEMU."),
        member("removable", Bool, "Never."),
        member("locked", Bool, "Never: it has no tray."),
        optional("inserted", Of(&BLOCK_DEVICE), "What is behind it."),
    ]
);
object!(
    NAME_INFO,
    "NameInfo",
    "The VM's name.",
    [optional("name", Str, "The VM file's `name`.")]
);
object!(
    UUID_INFO,
    "UuidInfo",
    "The VM's identity.",
    [member(
        "UUID",
        Str,
        "128 random bits, chosen when the VM started; the same over all its workers."
    ),]
);

choice!(
    MIGRATION_STATUS,
    "MigrationStatus",
    "Where an upgrade is.",
    [
        (
            "none",
            "There was none. Never sent; `query-migrate` leaves `status` out."
        ),
        (
            "setup",
            "The new worker is built and rehearsed; the guest runs."
        ),
        (
            "active",
            "The guest stands still; or, before `pre-switchover`, is about to."
        ),
        (
            "pre-switchover",
            "Everything is ready, the guest runs, and `migrate-continue` is awaited (with capability `pause-before-switchover`), for at most ten minutes."
        ),
        ("device", "Its device state goes over."),
        ("completed", "The new worker runs the guest."),
        ("failed", "The old worker runs the guest, as before."),
        ("cancelling", "A client has cancelled it."),
        (
            "cancelled",
            "It was cancelled; the old worker runs the guest, as before."
        ),
    ]
);
object!(
    MIGRATION_STATS,
    "MigrationRAMStats",
    "What went over. RAM stays where it is, so all counts of pages are 0; QEMU's clients expect each of them.",
    [
        member("transferred", Int, "Bytes of device state."),
        member(
            "downtime-bytes",
            Int,
            "The same: all of it goes over in the pause."
        ),
        member("page-size", Int, "4096."),
        member("mbps", Number, "0."),
        member("total", Int, "0."),
        member("remaining", Int, "0."),
        member("duplicate", Int, "0."),
        member("normal", Int, "0."),
        member("normal-bytes", Int, "0."),
        member("dirty-pages-rate", Int, "0."),
        member("dirty-sync-count", Int, "0."),
        member("postcopy-requests", Int, "0."),
        member("multifd-bytes", Int, "0."),
        member("pages-per-second", Int, "0."),
        member("precopy-bytes", Int, "0."),
        member("postcopy-bytes", Int, "0."),
        member("dirty-sync-missed-zero-copy", Int, "0."),
    ]
);
object!(
    MIGRATION_INFO,
    "MigrationInfo",
    "The upgrade that is under way, or the last one. Empty if there was none.",
    [
        optional("status", OneOf(&MIGRATION_STATUS), "Where it is."),
        optional(
            "ram",
            Of(&MIGRATION_STATS),
            "What went over, when it is completed."
        ),
        optional(
            "blocked-reasons",
            List(&Str),
            "What is in the way of the mode that is set, if something is."
        ),
        optional(
            "total-time",
            Int,
            "Milliseconds from the request to the end, when it has ended."
        ),
        optional(
            "setup-time",
            Int,
            "Milliseconds before the pause, when it is completed."
        ),
        optional(
            "downtime",
            Int,
            "Milliseconds that the guest lost, rounded up: from the first vCPU's exit in the old worker to the last vCPU's first entry in the new one."
        ),
        optional(
            "error-desc",
            Str,
            "Why it failed: the reason of whoever failed, the new worker's own included."
        ),
        optional(
            "__org.baton_downtime-us",
            Int,
            "As `downtime`, in microseconds."
        ),
        optional(
            "__org.baton_failed-step",
            Str,
            "The step that failed, as in `baton status`."
        ),
        optional(
            "__org.baton_awaits",
            Str,
            "What is waited for, in words, on whichever side this is."
        ),
        optional(
            "__org.baton_awaits-ms",
            Int,
            "For how many milliseconds yet, if there is a deadline."
        ),
    ]
);

choice!(
    MIG_MODE,
    "MigMode",
    "How to migrate. `cpr-exec` is known, and refused when it is set.",
    [
        (
            "normal",
            "QEMU's default, which copies RAM. It can be set, and `migrate` refuses it."
        ),
        (
            "cpr-reboot",
            "The guest is stopped and goes into a file, out of which another broker makes it run again, later."
        ),
        (
            "cpr-transfer",
            "The worker is replaced under its guest, RAM stays where it is."
        ),
        (
            "cpr-exec",
            "Refused: a worker executes nothing. Use `cpr-transfer`."
        ),
    ]
);
object!(
    PARAMETERS,
    "MigrationParameters",
    "How migrations are done.",
    [optional(
        "mode",
        OneOf(&MIG_MODE),
        "The mode of the next `migrate`. An upgrade that is under way goes on in the mode in which it was begun. `normal` again after each completed upgrade."
    ),]
);

choice!(
    CAPABILITY,
    "MigrationCapability",
    "What can be switched on.",
    [
        ("events", "MIGRATION events are sent."),
        (
            "return-path",
            "Accepted, and always so: an upgrade is completed only when the new worker has said that it runs."
        ),
        (
            "pause-before-switchover",
            "`migrate` waits in `pre-switchover`, the guest still running, for `migrate-continue`."
        ),
        (
            "multifd",
            "Accepted, and of no effect: device state is some kilobytes."
        ),
        (
            "x-ignore-shared",
            "Accepted, and of no effect: RAM stays in place in every mode, but goes into the file in mode `cpr-reboot` if the VM file has no `memory.path`."
        ),
        ("postcopy-ram", "Can be set; `migrate` refuses it."),
        ("background-snapshot", "Can be set; `migrate` refuses it."),
        ("x-colo", "Can be set; `migrate` refuses it."),
        (
            "mapped-ram",
            "Of no effect in mode `cpr-reboot`, whose file has each page once; in the others `migrate` refuses it."
        ),
    ]
);
object!(
    CAPABILITY_STATUS,
    "MigrationCapabilityStatus",
    "Whether a capability is switched on.",
    [
        member("capability", OneOf(&CAPABILITY), "Which."),
        member("state", Bool, "It is."),
    ]
);
object!(
    SET_CAPABILITIES,
    "q_obj_migrate-set-capabilities-arg",
    "Arguments of `migrate-set-capabilities`.",
    [member(
        "capabilities",
        List(&Of(&CAPABILITY_STATUS)),
        "What to switch on or off; the others stay."
    ),]
);

choice!(
    CHANNEL_TYPE,
    "MigrationChannelType",
    "What a channel is for.",
    [("main", "Device state."), ("cpr", "Descriptors."),]
);
choice!(
    TRANSPORT,
    "MigrationAddressType",
    "How a channel is reached.",
    [
        ("socket", "A socket."),
        ("exec", "A command's standard streams."),
        ("rdma", "RDMA."),
        ("file", "A file."),
    ]
);
choice!(
    SOCKET_TYPE,
    "SocketAddressType",
    "The kind of a socket.",
    [
        ("inet", "TCP."),
        ("unix", "A path."),
        ("vsock", "Between guest and host."),
        ("fd", "A descriptor."),
    ]
);
object!(
    INET_ADDRESS,
    "InetSocketAddress",
    "A TCP address.",
    [
        member(
            "host",
            Str,
            "An IP address in digits, or `localhost`, which is 127.0.0.1."
        ),
        member("port", Str, "1 to 65535."),
        optional("numeric", Bool, "Of no effect: no name is looked up."),
        optional("to", Int, "Refused: the last port of a range to listen in."),
        optional(
            "ipv4",
            Bool,
            "IPv4 may be used; if IPv6 may not is all that is said, yes."
        ),
        optional("ipv6", Bool, "IPv6 may be used; likewise."),
        optional(
            "keep-alive",
            Bool,
            "`true` is refused: each step of a transfer has a deadline."
        ),
        optional(
            "mptcp",
            Bool,
            "`true` is refused: the connection is plain TCP."
        ),
    ]
);
object!(
    UNIX_ADDRESS,
    "UnixSocketAddress",
    "A unix socket.",
    [member("path", Str, "Its path.")]
);
object!(
    VSOCK_ADDRESS,
    "VsockSocketAddress",
    "A vsock address.",
    [
        member("cid", Str, "Context id."),
        member("port", Str, "Port."),
    ]
);
object!(
    FD_ADDRESS,
    "FdSocketAddress",
    "A descriptor.",
    [member(
        "str",
        Str,
        "Its number. Of `--incoming` alone: neither `migrate` nor `migrate-incoming` takes one."
    )]
);
object!(SOCKET_ADDRESS, "SocketAddress", "A socket.", [
    member("type", OneOf(&SOCKET_TYPE), "Its kind."),
], "type" => [
    ("inet", &INET_ADDRESS), ("unix", &UNIX_ADDRESS), ("vsock", &VSOCK_ADDRESS), ("fd", &FD_ADDRESS),
]);
object!(
    EXEC_ADDRESS,
    "MigrationExecCommand",
    "A command.",
    [member("args", List(&Str), "Its words.")]
);
object!(
    FILE_ADDRESS,
    "FileMigrationArgs",
    "A file.",
    [
        member("filename", Str, "Its absolute path."),
        member("offset", Int, "Where to begin, in bytes."),
    ]
);
object!(ADDRESS, "MigrationAddress", "Where a channel leads.", [
    member("transport", OneOf(&TRANSPORT), "How it is reached."),
], "transport" => [
    ("socket", &SOCKET_ADDRESS), ("exec", &EXEC_ADDRESS), ("rdma", &INET_ADDRESS), ("file", &FILE_ADDRESS),
]);
object!(
    CHANNEL,
    "MigrationChannel",
    "A channel to another VMM.",
    [
        member("channel-type", OneOf(&CHANNEL_TYPE), "What it is for."),
        member("addr", Of(&ADDRESS), "Where it leads."),
    ]
);
object!(
    MIGRATE,
    "q_obj_migrate-arg",
    "Arguments of `migrate`.",
    [
        optional(
            "uri",
            Str,
            "Where to: `file:PATH[,offset=BYTES]` in mode `cpr-reboot`; refused in mode `cpr-transfer`, as in QEMU."
        ),
        optional(
            "channels",
            List(&Of(&CHANNEL)),
            "Where to: a `main` and a `cpr` channel, unix sockets on which another broker of the same user listens (a relative path is one in the VM's directory; no symbolic links), `main` also a TCP port; in mode `cpr-reboot` a `main` channel alone, a file. Left out in mode `cpr-transfer`: the broker makes them, and the worker is replaced in place."
        ),
        optional(
            "detach",
            Bool,
            "Accepted, and of no effect: the answer never waits for the end."
        ),
        optional(
            "resume",
            Bool,
            "`true` is refused: there is no paused migration to resume."
        ),
    ]
);
object!(
    CONTINUE,
    "q_obj_migrate-continue-arg",
    "Arguments of `migrate-continue`.",
    [member(
        "state",
        OneOf(&MIGRATION_STATUS),
        "The state that it is expected to wait in: `pre-switchover`."
    ),]
);
object!(
    INCOMING,
    "q_obj_migrate-incoming-arg",
    "Arguments of `migrate-incoming`.",
    [
        optional(
            "uri",
            Str,
            "Where to listen: `unix:PATH` or `tcp:HOST:PORT`; or the file that the guest is in: `file:PATH[,offset=BYTES]`."
        ),
        optional(
            "channels",
            List(&Of(&CHANNEL)),
            "The same: one entry, of type `main`, a unix socket, a TCP port or a file."
        ),
        optional(
            "exit-on-error",
            Bool,
            "Accepted, and always so: a broker that cannot take the guest ends with the reason."
        ),
    ]
);

choice!(
    YANK_TYPE,
    "YankInstanceType",
    "What can be cut off.",
    [("migration", "The channels of an upgrade."),]
);
object!(
    YANK_INSTANCE,
    "YankInstance",
    "Something that can be cut off.",
    [member("type", OneOf(&YANK_TYPE), "What."),]
);
object!(
    YANK,
    "q_obj_yank-arg",
    "Arguments of `yank`.",
    [member(
        "instances",
        List(&Of(&YANK_INSTANCE)),
        "What to cut off."
    ),]
);

object!(
    HMP,
    "q_obj_human-monitor-command-arg",
    "Arguments of `human-monitor-command`.",
    [
        member(
            "command-line",
            Str,
            "`info status`, `info migrate`, `migrate_set_parameter mode MODE`, `migrate_set_capability NAME on|off`, `migrate [-d] [URI]`, `migrate_continue STATE`, `migrate_cancel`, `stop`, `cont`, `system_reset`, `system_powerdown`, `quit`."
        ),
        optional(
            "cpu-index",
            Int,
            "Accepted, and of no effect: no verb here is about one vCPU."
        ),
    ]
);

choice!(
    META_TYPE,
    "SchemaMetaType",
    "What an entity of the schema is.",
    [
        ("builtin", "A type of JSON's own."),
        ("enum", "One of some strings."),
        ("array", "An array."),
        ("object", "An object."),
        ("command", "A command."),
        ("event", "An event."),
    ]
);
object!(
    SCHEMA_INFO,
    "SchemaInfo",
    "An entity of the schema; its further members depend on `meta-type`, as in QEMU's `qapi/introspect.json`.",
    [
        member(
            "name",
            Str,
            "Its name. (QEMU numbers its types; these have their names.)"
        ),
        member("meta-type", OneOf(&META_TYPE), "What it is."),
        optional("json-type", Str, "Of a built-in type: which of JSON's."),
        optional("values", List(&Str), "Of an enum: its strings."),
        optional(
            "members",
            List(&Any),
            "Of an enum or an object: its members."
        ),
        optional("element-type", Str, "Of an array: its elements' type."),
        optional(
            "tag",
            Str,
            "Of an object: the member that says which variant it is."
        ),
        optional(
            "variants",
            List(&Any),
            "Of an object: its variants' cases and types."
        ),
        optional(
            "arg-type",
            Str,
            "Of a command or an event: the type of its arguments or data."
        ),
        optional("ret-type", Str, "Of a command: the type of its answer."),
        optional(
            "allow-oob",
            Bool,
            "Of a command: it may be executed out of band."
        ),
    ]
);

choice!(
    SHUTDOWN_CAUSE,
    "ShutdownCause",
    "Why the guest ended or was reset.",
    [
        ("guest-shutdown", "It powered itself off."),
        ("guest-reset", "It reset itself, or triple-faulted."),
        ("host-qmp-quit", "A QMP client sent `quit`."),
        ("host-qmp-system-reset", "An operator reset it."),
        ("host-signal", "An operator ended it in another way."),
        (
            "guest-panic",
            "Its kernel has panicked, and the VM file says `poweroff`."
        ),
    ]
);
object!(
    SHUTDOWN_DATA,
    "q_obj_SHUTDOWN-arg",
    "Data of SHUTDOWN.",
    [
        member("guest", Bool, "The guest did it itself."),
        member("reason", OneOf(&SHUTDOWN_CAUSE), "Why."),
    ]
);
object!(
    RESET_DATA,
    "q_obj_RESET-arg",
    "Data of RESET.",
    [
        member("guest", Bool, "The guest did it itself."),
        member("reason", OneOf(&SHUTDOWN_CAUSE), "Why."),
    ]
);
object!(
    BALLOON,
    "q_obj_balloon-arg",
    "Arguments of `balloon`.",
    [member(
        "value",
        Int,
        "Bytes that are to be left to the guest, in whole pages of 4 KiB; all of its memory empties the balloon."
    )]
);
object!(
    BALLOON_INFO,
    "BalloonInfo",
    "The balloon.",
    [member(
        "actual",
        Int,
        "Bytes that it leaves to the guest, as the guest says."
    )]
);
object!(
    BALLOON_DATA,
    "q_obj_BALLOON_CHANGE-arg",
    "Data of BALLOON_CHANGE.",
    [member(
        "actual",
        Int,
        "Bytes that it leaves to the guest, as the guest says."
    )]
);
choice!(
    PANIC_ACTION,
    "GuestPanicAction",
    "What follows a panic of the guest's.",
    [
        (
            "pause",
            "It stands still (`on_panic = \"pause\"`, the default)."
        ),
        ("poweroff", "It ends."),
        ("run", "It runs on."),
    ]
);
object!(
    PANICKED_DATA,
    "q_obj_GUEST_PANICKED-arg",
    "Data of GUEST_PANICKED.",
    [member("action", OneOf(&PANIC_ACTION), "What follows.")]
);
object!(
    CRASH_LOADED_DATA,
    "q_obj_GUEST_CRASHLOADED-arg",
    "Data of GUEST_CRASHLOADED.",
    [member("action", OneOf(&PANIC_ACTION), "`run`.")]
);
object!(
    MIGRATION_DATA,
    "q_obj_MIGRATION-arg",
    "Data of MIGRATION.",
    [member(
        "status",
        OneOf(&MIGRATION_STATUS),
        "Where the upgrade is now."
    ),]
);
object!(
    REPLACED_DATA,
    "q_obj___org.baton_WORKER_REPLACED-arg",
    "Data of __org.baton_WORKER_REPLACED.",
    [
        member("generation", Int, "The new worker's generation, from 1."),
        member("worker-digest", Str, "SHA-256 of its binary."),
        member("downtime-us", Int, "What the guest lost, in microseconds."),
    ]
);
object!(
    LOST_DATA,
    "q_obj___org.baton_VM_LOST-arg",
    "Data of __org.baton_VM_LOST.",
    [member("reason", Str, "What happened to it."),]
);
object!(
    OWN_EVENTS,
    "q_obj___org.baton_events-arg",
    "Arguments of `__org.baton_events`.",
    [member("enable", Bool, "Whether to be told.")]
);
