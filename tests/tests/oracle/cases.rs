//! The questions.

use crate::qemu::Memory;

/// How Baton's answer differs.
pub(crate) struct Here {
    pub(crate) says: &'static str,
    pub(crate) why: &'static str,
}

/// One question, in messages to a fresh VM.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Whether `qmp_capabilities` comes first.
    pub(crate) negotiated: bool,
    /// Messages that are only to succeed.
    pub(crate) before: &'static [&'static str],
    /// Messages whose answers are compared.
    pub(crate) asks: &'static [&'static str],
    /// Where its machine's memory is, if it can be elsewhere.
    pub(crate) memory: Memory,
    pub(crate) here: Option<Here>,
}

const fn same(
    name: &'static str,
    before: &'static [&'static str],
    asks: &'static [&'static str],
) -> Case {
    Case {
        name,
        negotiated: true,
        before,
        asks,
        memory: Memory::Shared,
        here: None,
    }
}

const fn differs(
    name: &'static str,
    before: &'static [&'static str],
    asks: &'static [&'static str],
    says: &'static str,
    why: &'static str,
) -> Case {
    Case {
        name,
        negotiated: true,
        before,
        asks,
        memory: Memory::Shared,
        here: Some(Here { says, why }),
    }
}

const fn greeted(name: &'static str, asks: &'static [&'static str]) -> Case {
    Case {
        name,
        negotiated: false,
        before: &[],
        asks,
        memory: Memory::Shared,
        here: None,
    }
}

const fn greeted_and_differs(
    name: &'static str,
    asks: &'static [&'static str],
    says: &'static str,
    why: &'static str,
) -> Case {
    Case {
        name,
        negotiated: false,
        before: &[],
        asks,
        memory: Memory::Shared,
        here: Some(Here { says, why }),
    }
}

const fn with_memory(memory: Memory, case: Case) -> Case {
    Case { memory, ..case }
}

const CPR: &[&str] = &[r#"migrate-set-parameters {"mode": "cpr-transfer"}"#];

const REBOOT: &str = r#"migrate-set-parameters {"mode": "cpr-reboot"}"#;
const TO_FILE: &str = r#"migrate {"uri": "file:$dir/state"}"#;

/// A capability is switched on, and a transfer asked for.
macro_rules! with_capability {
    ($name:literal) => {
        same(
            $name,
            CPR,
            &[
                concat!(
                    r#"migrate-set-capabilities {"capabilities": [{"capability": ""#,
                    $name,
                    r#"", "state": true}]}"#
                ),
                r#"migrate {"channels": [$main, $cpr]}"#,
            ],
        )
    };
}

pub(crate) const CASES: &[Case] = &[
    greeted("a command before the negotiation", &["query-status {}"]),
    greeted(
        "the negotiation, twice",
        &["qmp_capabilities {}", "qmp_capabilities {}"],
    ),
    greeted_and_differs(
        "a capability that nobody has",
        &[r#"qmp_capabilities {"enable": ["bogus"]}"#],
        "GenericError: Parameter 'enable[0]' does not accept value 'bogus'",
        "the parameter has a name, and which of a list's elements it is",
    ),
    differs(
        "no JSON",
        &[],
        &[r#"{"execute": }"#],
        "GenericError: JSON parse error, expected value at line 1 column 13",
        "says where",
    ),
    same("JSON, and no object", &[], &["[1]"]),
    same("nothing to execute", &[], &[r#"{"arguments": {}}"#]),
    same("a number to execute", &[], &[r#"{"execute": 5}"#]),
    same(
        "a member that nobody knows",
        &[],
        &[r#"{"execute": "query-status", "x": 1}"#],
    ),
    same(
        "arguments that are no object",
        &[],
        &[r#"{"execute": "query-status", "arguments": 1}"#],
    ),
    same(
        "out of band, not agreed on",
        &[],
        &[r#"{"exec-oob": "query-status"}"#],
    ),
    same(
        "an id comes back",
        &[],
        &[r#"{"execute": "query-status", "id": {"a": [1]}} => /id /status"#],
    ),
    same("a command that nobody knows", &[], &["fly {}"]),
    same(
        "an argument that nobody knows",
        &[],
        &[r#"query-status {"x": 1}"#],
    ),
    same(
        "an argument that is missing",
        &[],
        &["human-monitor-command {}"],
    ),
    same(
        "an argument of another type",
        &[],
        &[r#"human-monitor-command {"command-line": 1}"#],
    ),
    same(
        "stop, stop, cont, cont",
        &[],
        &[
            "stop {}",
            "query-status {} => /status /running",
            "stop {}",
            "cont {}",
            "query-status {} => /status /running",
            "cont {}",
        ],
    ),
    same(
        "an unknown mode",
        &[],
        &[r#"migrate-set-parameters {"mode": "bogus"}"#],
    ),
    same(
        "the mode is shown",
        CPR,
        &["query-migrate-parameters {} => /mode"],
    ),
    same(
        "the mode is normal at first",
        &[],
        &["query-migrate-parameters {} => /mode"],
    ),
    differs(
        "cpr-exec",
        &[],
        &[r#"migrate-set-parameters {"mode": "cpr-exec"}"#],
        "GenericError: mode 'cpr-exec' is not supported by this VMM: use 'cpr-transfer', which replaces the worker under its guest, or 'cpr-reboot', which puts the guest into a file",
        "a mode of 10.2 on, known by name: a worker executes nothing",
    ),
    same(
        "cpr-reboot",
        &[],
        &[r#"migrate-set-parameters {"mode": "cpr-reboot"}"#],
    ),
    same(
        "a parameter that nobody knows",
        &[],
        &[r#"migrate-set-parameters {"x": 1}"#],
    ),
    differs(
        "a downtime limit past the end",
        &[],
        &[r#"migrate-set-parameters {"downtime-limit": 99999999}"#],
        "GenericError: Parameter 'downtime-limit' is unexpected",
        "no parameter but the mode has an effect, so no other is taken",
    ),
    differs(
        "a capability of migration that nobody knows",
        &[],
        &[r#"migrate-set-capabilities {"capabilities": [{"capability": "bogus", "state": true}]}"#],
        "GenericError: Parameter 'capabilities[0].capability' does not accept value 'bogus'",
        "says which of a list's elements it is",
    ),
    same(
        "neither uri nor channels, mode normal",
        &[],
        &["migrate {}"],
    ),
    differs(
        "neither uri nor channels, mode cpr-transfer",
        CPR,
        &["migrate {}"],
        "done",
        "without channels the worker is replaced in place",
    ),
    same(
        "uri and channels",
        CPR,
        &[r#"migrate {"uri": "unix:$dir/x", "channels": [$main, $cpr]}"#],
    ),
    same(
        "uri, mode cpr-transfer",
        CPR,
        &[r#"migrate {"uri": "unix:$dir/x"}"#],
    ),
    same(
        "channels without cpr",
        CPR,
        &[r#"migrate {"channels": [$main]}"#],
    ),
    differs(
        "channels without main",
        CPR,
        &[r#"migrate {"channels": [$cpr]}"#],
        "GenericError: Channel list has no main entry",
        "QEMU means to say so, and dies of SIGSEGV with its guest",
    ),
    same(
        "main twice",
        CPR,
        &[r#"migrate {"channels": [$main, $main]}"#],
    ),
    same("cpr twice", CPR, &[r#"migrate {"channels": [$cpr, $cpr]}"#]),
    differs(
        "a channel of no known type",
        CPR,
        &[r#"migrate {"channels": [{"channel-type": "x", "addr": {}}]}"#],
        "GenericError: Parameter 'channels[0].channel-type' does not accept value 'x'",
        "says which of a list's elements it is",
    ),
    same(
        "main is a file",
        CPR,
        &[
            r#"migrate {"channels": [{"channel-type": "main", "addr": {"transport": "file", "filename": "$dir/f", "offset": 0}}, $cpr]}"#,
        ],
    ),
    differs(
        "cpr is no unix socket",
        CPR,
        &[
            r#"migrate {"channels": [$main, {"channel-type": "cpr", "addr": {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "44444"}}]}"#,
            "query-migrate {} => /status",
        ],
        "GenericError: bad cpr channel address; must be unix; -",
        "what was refused has not begun, and so has not failed",
    ),
    differs(
        "nobody listens on cpr",
        CPR,
        &[
            r#"migrate {"channels": [$main, $cpr]}"#,
            "query-migrate {} => /status",
            "query-status {} => /status",
        ],
        "GenericError: Failed to connect to 'DIR/cpr.sock': No such file or directory; -; \"running\"",
        "what was refused has not begun, and so has not failed",
    ),
    same(
        "resume in a cpr mode",
        CPR,
        &[r#"migrate {"channels": [$main, $cpr], "resume": true}"#],
    ),
    with_capability!("postcopy-ram"),
    with_capability!("background-snapshot"),
    with_capability!("x-colo"),
    with_capability!("mapped-ram"),
    with_capability!("multifd"),
    with_capability!("return-path"),
    with_capability!("x-ignore-shared"),
    same(
        "postcopy-ram, mode cpr-reboot",
        &[REBOOT],
        &[
            r#"migrate-set-capabilities {"capabilities": [{"capability": "postcopy-ram", "state": true}]}"#,
            TO_FILE,
        ],
    ),
    same(
        "background-snapshot, mode cpr-reboot",
        &[REBOOT],
        &[
            r#"migrate-set-capabilities {"capabilities": [{"capability": "background-snapshot", "state": true}]}"#,
            TO_FILE,
        ],
    ),
    same(
        "x-colo, mode cpr-reboot",
        &[REBOOT],
        &[
            r#"migrate-set-capabilities {"capabilities": [{"capability": "x-colo", "state": true}]}"#,
            TO_FILE,
        ],
    ),
    same(
        "mapped-ram, mode cpr-reboot",
        &[REBOOT],
        &[
            r#"migrate-set-capabilities {"capabilities": [{"capability": "mapped-ram", "state": true}]}"#,
            TO_FILE,
        ],
    ),
    same(
        "x-ignore-shared, mode cpr-reboot",
        &[REBOOT],
        &[
            r#"migrate-set-capabilities {"capabilities": [{"capability": "x-ignore-shared", "state": true}]}"#,
            TO_FILE,
        ],
    ),
    differs(
        "mapped-ram and a socket, mode cpr-reboot",
        &[
            REBOOT,
            r#"migrate-set-capabilities {"capabilities": [{"capability": "mapped-ram", "state": true}]}"#,
        ],
        &[r#"migrate {"uri": "unix:$dir/x"}"#],
        "GenericError: mode 'cpr-reboot' takes a file here: file:PATH[,offset=BYTES]",
        "whatever the capabilities, a file is all that there is in this mode",
    ),
    differs(
        "both channels, mode normal",
        &[],
        &[
            r#"migrate {"channels": [$main, $cpr]}"#,
            "query-status {} => /status",
        ],
        r#"GenericError: mode 'normal', which copies RAM, is not supported by this VMM: set mode 'cpr-transfer' or 'cpr-reboot'; "running""#,
        "QEMU migrates by its main channel; only the cpr modes are offered here",
    ),
    with_memory(
        Memory::Private,
        differs(
            "memory that nobody shares",
            CPR,
            &[
                r#"migrate {"channels": [$main, $cpr]}"#,
                "query-migrate {} => /blocked-reasons/0",
                "query-status {} => /status",
            ],
            r#"GenericError: Memory region ram is not compatible with CPR. share=on is required for memory-backend objects, and aux-ram-share=on is required. (leave memory.share out of the VM file); "Memory region ram is not compatible with CPR. share=on is required for memory-backend objects, and aux-ram-share=on is required."; "running""#,
            "the memory's name is another, and the refusal says what to do",
        ),
    ),
    with_memory(
        Memory::NoBackend,
        differs(
            "memory without a backend",
            CPR,
            &[
                r#"migrate {"channels": [$main, $cpr]}"#,
                "query-migrate {} => /blocked-reasons/0",
            ],
            "GenericError: Failed to connect to 'DIR/cpr.sock': No such file or directory; -",
            "memory is always the broker's, and can always go",
        ),
    ),
    with_memory(
        Memory::NoAuxShare,
        differs(
            "aux-ram-share is off",
            CPR,
            &[
                r#"migrate {"channels": [$main, $cpr]}"#,
                "query-migrate {} => /blocked-reasons/0",
            ],
            "GenericError: Failed to connect to 'DIR/cpr.sock': No such file or directory; -",
            "it is always on, and cannot be switched off",
        ),
    ),
    same(
        "set the mode while nothing is under way, by the human monitor",
        &[],
        &[
            r#"human-monitor-command {"command-line": "migrate_set_parameter mode cpr-transfer"}"#,
            "query-migrate-parameters {} => /mode",
            r#"human-monitor-command {"command-line": "migrate_set_parameter mode bogus"}"#,
            r#"human-monitor-command {"command-line": "migrate_cancel"}"#,
        ],
    ),
    same(
        "the human monitor: nothing, and spaces",
        &[],
        &[
            r#"human-monitor-command {"command-line": ""}"#,
            r#"human-monitor-command {"command-line": "  info   status "}"#,
            r#"human-monitor-command {"command-line": "info fly"}"#,
            r#"human-monitor-command {"command-line": "migrate_continue pre-switchover"}"#,
            r#"human-monitor-command {"command-line": "migrate_set_capability events on"}"#,
        ],
    ),
    same(
        "migrate-incoming where nothing is awaited",
        &[],
        &[r#"migrate-incoming {"uri": "unix:$dir/x"}"#],
    ),
    same(
        "migrate-incoming with two channels",
        &[],
        &[r#"migrate-incoming {"channels": [$main, $cpr]}"#],
    ),
    same(
        "migrate_cancel with nothing under way",
        &[],
        &["migrate_cancel {}", "query-migrate {} => /status"],
    ),
    same(
        "migrate-continue with nothing under way",
        &[],
        &[r#"migrate-continue {"state": "pre-switchover"}"#],
    ),
    same(
        "migrate-continue to no such state",
        &[],
        &[r#"migrate-continue {"state": "bogus"}"#],
    ),
    same("query-migrate at first", &[], &["query-migrate {}"]),
    differs(
        "nothing to yank",
        &[],
        &["query-yank {} => /0/type"],
        "-",
        "the monitor itself cannot be yanked",
    ),
    same(
        "yank what is not there",
        &[],
        &[r#"yank {"instances": [{"type": "migration"}]}"#],
    ),
    differs(
        "yank of no known type",
        &[],
        &[r#"yank {"instances": [{"type": "bogus"}]}"#],
        "GenericError: Parameter 'instances[0].type' does not accept value 'bogus'",
        "says which of a list's elements it is",
    ),
    same(
        "devices that nobody knows",
        &[],
        &[
            r#"device_del {"id": "x"}"#,
            r#"blockdev-del {"node-name": "x"}"#,
            r#"block_resize {"device": "x", "size": 512}"#,
            r#"block_resize {"node-name": "x", "size": 512}"#,
            r#"device_add {"driver": "fly", "id": "x", "drive": "x"}"#,
        ],
    ),
    same(
        "the human monitor: status",
        &[],
        &[r#"human-monitor-command {"command-line": "info status"}"#],
    ),
    same(
        "the human monitor: a verb that nobody knows",
        &[],
        &[r#"human-monitor-command {"command-line": "fly"}"#],
    ),
    same(
        "the human monitor: migrate in cpr-transfer",
        CPR,
        &[r#"human-monitor-command {"command-line": "migrate -d unix:$dir/x"}"#],
    ),
    same(
        "reset",
        &[],
        &["system_reset {}", "query-status {} => /status"],
    ),
    same(
        "processors",
        &[],
        &["query-cpus-fast {} => /0/cpu-index /0/target"],
    ),
    same(
        "memory",
        &[],
        &["query-memory-size-summary {} => /plugged-memory"],
    ),
];
