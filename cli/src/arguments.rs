//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;
use clap::builder::Styles;
use clap::builder::styling::AnsiColor;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  baton demo                              see it work on this host
  baton run web1.toml --detach            start a VM and leave it running
  baton upgrade web1 --worker ./worker    replace its worker under the guest
  baton upgrade --all --canary 2          replace every worker, two of them first

Exit status:
  0  done                   10  upgrade aborted, the old worker runs on
  1  findings               20  the VM is lost
  2  usage                  30  refused by policy
  3  host, file or VM is    75  busy
     not as needed";

/// Runs KVM guests in confined workers, and replaces a worker under its running guest
#[derive(Debug, Parser)]
#[command(
    name = "baton",
    version,
    styles = STYLES,
    max_term_width = 100,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = EXAMPLES
)]
pub(crate) struct Arguments {
    /// Print one JSON document on standard output
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Globals {
    /// Where the VMs' directories are [default: /run/baton, or $XDG_RUNTIME_DIR/baton if not root]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub(crate) run_dir: Option<PathBuf>,
}

/// What every command that starts a broker takes.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Starting {
    /// The worker to run [default: the VM file's, or baton-worker beside the broker]
    #[arg(long, value_name = "BIN")]
    pub(crate) worker: Option<PathBuf>,
    /// Show what the broker and its workers do, as it happens, on standard error
    #[arg(long)]
    pub(crate) log: bool,
    /// Give everything N times as long, on a host that is emulated
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) slow_host: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(Demo),
    Run(Run),
    /// List the VMs that run here
    #[command(after_help = "\
Examples:
  baton list
  baton list --json | jq -r '.[] | select(.generation == 1).name'")]
    List,
    /// Show how a VM is
    #[command(after_help = "\
Examples:
  baton status web1
  baton status web1 --json | jq .last_upgrade.blackout_us")]
    Status {
        /// The VM's name
        vm: String,
    },
    Upgrade(Upgrade),
    /// Attach this terminal to a VM's console
    #[command(after_help = "\
Ctrl-] detaches.

Examples:
  baton console web1
  baton console web1 --virtio
  baton console web1 < /dev/null | grep -m1 'login:'    wait for a line")]
    Console {
        /// The VM's name
        vm: String,
        /// The virtio console ([virtio_console] of the VM file) instead of the serial one
        #[arg(long)]
        virtio: bool,
    },
    /// Send one QMP command to a VM
    #[command(after_help = "\
Prints what the command returns. QMP clients and libraries connect to the socket
that `baton run --json` prints as `qmp`; docs/qmp.md lists the commands.

Examples:
  baton qmp web1 query-status
  baton qmp web1 '{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"mode\": \"cpr-transfer\"}}'")]
    Qmp {
        /// The VM's name
        vm: String,
        /// The command: a JSON object, or its name alone
        #[arg(value_name = "JSON")]
        command: String,
    },
    Audit(Audit),
    /// Stop a VM's vCPUs, until `baton resume`
    #[command(after_help = "Example:\n  baton pause web1")]
    Pause {
        /// The VM's name
        vm: String,
    },
    /// Let a paused VM's vCPUs run again
    #[command(after_help = "Example:\n  baton resume web1")]
    Resume {
        /// The VM's name
        vm: String,
    },
    /// Reset a VM's guest, as its reset button would
    #[command(after_help = "Example:\n  baton reset web1")]
    Reset {
        /// The VM's name
        vm: String,
    },
    /// End a VM: by its power button, or at once
    #[command(after_help = "\
Examples:
  baton stop web1            the guest shuts down by itself, within 180 s or it is ended
  baton stop web1 --force    at once; what it has not written is lost")]
    Stop {
        /// The VM's name
        vm: String,
        /// End it at once, also when its broker is dead
        #[arg(long)]
        force: bool,
    },
    /// Read a VM's audit log, and verify that nobody has changed it
    #[command(
        subcommand_required = true,
        after_help = "\
Examples:
  baton log show web1
  baton log verify web1
  baton log checkpoint web1 > web1.checkpoint    keep it elsewhere, or sign it"
    )]
    Log {
        #[command(subcommand)]
        command: LogCommand,
    },
    /// Read policies: what a worker may hold and do
    #[command(
        subcommand_required = true,
        after_help = "\
FILE is a policy, or `default` for the built-in one.

Examples:
  baton policy check my-policy.toml
  baton policy explain --syscall ioctl
  baton policy explain --vm web1.toml         before it runs
  baton policy diff default my-policy.toml    exit status 1 when it allows more
  baton policy dump --format bpf --role vcpu > vcpu.bpf"
    )]
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Look whether VMs can run on this host, and what to do if not
    #[command(after_help = "\
Exit status 0: VMs run here. 3: something that every VM needs is missing.

Examples:
  baton doctor
  baton doctor --json | jq -r '.checks[] | select(.level != \"ok\").remedy'")]
    Doctor,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LogCommand {
    /// What happened: grants, refusals, confirmations, upgrades, and who asked
    #[command(after_help = "\
Examples:
  baton log show web1
  baton log show web1 --event upgrade --last 1000
  baton log show web1 --json | jq '.[] | select(.severity_id > 2)'")]
    Show {
        #[command(flatten)]
        log: LogFiles,
        /// Only records of this event
        #[arg(long, value_name = "NAME")]
        event: Option<String>,
        /// How many records to show, of the last
        #[arg(long, value_name = "N", default_value_t = 50)]
        last: usize,
    },
    /// Whether a record was edited, removed, moved or cut short since it was written
    #[command(after_help = "\
Exit status 0: intact, as far as the chain, the running broker and the checkpoints
show. 1: there are findings.

The chain by itself does not show that its end was removed, or that the whole was
written anew. A running broker knows its log's end; for a VM that has ended, keep
checkpoints.

Examples:
  baton log verify web1
  baton log verify web1 --checkpoint web1.checkpoint
  baton log verify web1 --file ./shipped/web1.jsonl")]
    Verify {
        #[command(flatten)]
        log: LogFiles,
        /// What `baton log checkpoint` said earlier; may be given more than once
        #[arg(long, value_name = "FILE")]
        checkpoint: Vec<PathBuf>,
    },
    /// Where the chain stands: four lines to keep elsewhere, or to sign
    #[command(after_help = "\
Examples:
  baton log checkpoint web1 > web1.checkpoint
  ssh-keygen -Y sign -n baton-audit -f key web1.checkpoint
  minisign -Sm web1.checkpoint")]
    Checkpoint {
        #[command(flatten)]
        log: LogFiles,
    },
}

/// Which log.
#[derive(Debug, Args)]
pub(crate) struct LogFiles {
    /// The VM's name
    pub(crate) vm: String,
    /// Files to read instead of the run dir's, in the order of their records
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Whether a policy is fit for use, and what to think about
    #[command(after_help = "Example:\n  baton policy check my-policy.toml")]
    Check {
        /// The policy
        #[arg(default_value = "default")]
        file: PathBuf,
    },
    Explain(Explain),
    Lint(Lint),
    Learn(Learn),
    /// What one policy allows more or less than another
    #[command(after_help = "\
Exit status 0: NEW allows no more. 1: it allows more.

Example:
  baton policy diff default my-policy.toml
  baton policy diff /usr/libexec/baton-worker ./new/baton-worker    what the builds need")]
    Diff {
        /// The policy to compare with, or a worker's binary: what it declares that it needs
        old: PathBuf,
        /// The policy to judge, or a worker's binary
        new: PathBuf,
    },
    /// A policy's compiled filters
    #[command(after_help = "\
Examples:
  baton policy dump                                disassembled
  baton policy dump --format disasm                as seccomp-tools writes it
  baton policy dump --format json | jq .filters
  baton policy dump --format bpf --role vcpu > vcpu.bpf")]
    Dump {
        /// The policy
        #[arg(default_value = "default")]
        file: PathBuf,
        /// How
        #[arg(long, value_enum, default_value_t = DumpFormat::Text)]
        format: DumpFormat,
        /// Whose filter, for `bpf`
        #[arg(long, value_name = "ROLE")]
        role: Option<String>,
        /// Which of that role's filters, for `bpf`
        #[arg(long, value_name = "N", default_value_t = 0)]
        index: usize,
    },
}

/// A form of compiled filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DumpFormat {
    /// Disassembled, for people
    Text,
    /// Disassembled as seccomp-tools does
    Disasm,
    /// The policy and its filters in one document
    Json,
    /// One filter's bytes, as the kernel takes them
    Bpf,
}

/// What each kind of thread may do, and why; with --vm, what that VM would be granted
#[derive(Debug, Args)]
#[command(after_help = "\
With --vm, nothing is opened and nobody is asked but the policy: the VM's own, or
POLICY. Exit status 0: all that the VM file names would be granted. 30: policy
refuses some of it. 3: some of it is not there.

Examples:
  baton policy explain
  baton policy explain my-policy.toml --syscall mmap
  baton policy explain --vm web1.toml
  baton policy explain my-policy.toml --vm web1.toml    if it had this policy")]
pub(crate) struct Explain {
    /// The policy [default: the VM's, or `default`]
    #[arg(value_name = "POLICY")]
    pub(crate) file: Option<PathBuf>,
    /// What this VM would be granted
    #[arg(long, value_name = "VM.toml", conflicts_with = "syscall")]
    pub(crate) vm: Option<PathBuf>,
    /// Only this system call: who may make it, and with which arguments
    #[arg(long, value_name = "NAME", alias = "call")]
    pub(crate) syscall: Option<String>,
}

/// What could be left out of it: entries that others cover, rules that no test exercises
#[derive(Debug, Args)]
#[command(after_help = "\
Entries that others cover permit nothing by themselves. A rule is exercised if a
worker made a call that it lets through, in that role, in the run of Baton's own
tests that tests/exercise has recorded; of the rest, those that stay for a known
reason are no findings.

Exit status 0: nothing. 1: what is printed.

Examples:
  baton policy lint my-policy.toml
  baton policy lint --kept                             also what stays, and why
  baton policy lint my-policy.toml --exercised web1.jsonl
                                                       by what your workload calls")]
pub(crate) struct Lint {
    /// The policy
    #[arg(default_value = "default")]
    pub(crate) file: PathBuf,
    /// What was exercised, as `baton policy learn --record` writes it [default: what Baton's tests exercise]
    #[arg(long, value_name = "FILE")]
    pub(crate) exercised: Option<PathBuf>,
    /// Also print rules that stay though nothing exercises them
    #[arg(long)]
    pub(crate) kept: bool,
}

/// Run a VM without its filters, and say what its workers called that the policy does not permit, and what they had no use for
#[derive(Debug, Args)]
#[command(after_help = "\
The VM's policy has to have

  [learn]
  why = \"...\"

and a VM runs under such a policy in no other way. Its workers have everything
else that confines a worker: namespaces, Landlock, ids, limits. Every call is
reported and let through, which slows the guest down: pass --slow-host. What is
proposed has no reasons; a person gives them, or takes the call out of the worker.

Exit status 0: the policy permits all of it. 1: it does not. 30: it does not learn.

Examples:
  baton policy learn web1.toml --for 60
  baton policy learn web1.toml --slow-host 20 -- sh -c 'baton upgrade $BATON_VM'")]
pub(crate) struct Learn {
    /// The VM's description
    #[arg(value_name = "VM.toml")]
    pub(crate) file: PathBuf,
    /// Run it for so many seconds [default: until Ctrl-C, or the command's end]
    #[arg(long = "for", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub(crate) time: Option<u64>,
    /// Write what was observed to this file, one call a line
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) starting: Starting,
    /// What to do meanwhile; it finds the VM's name as BATON_VM and its run directory as BATON_RUN_DIR
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// Show on this host what Baton does, and leave nothing behind
#[derive(Debug, Args)]
#[command(after_help = "\
Boots a small guest in a confined worker, replaces the worker several times while
the guest counts and checks its memory, audits it, and says what happened.

Examples:
  baton demo
  baton demo --upgrades 100 --memory 1G
  baton demo --json | jq .blackout_us")]
pub(crate) struct Demo {
    /// How often to replace the worker
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub(crate) upgrades: usize,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub(crate) memory: String,
    /// The guest's vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) cpus: u8,
    #[command(flatten)]
    pub(crate) starting: Starting,
}

/// Start a VM: a broker, and the first worker under it
#[derive(Debug, Args)]
#[command(after_help = "\
Without --detach this command stays until the VM ends. Ctrl-C presses the
guest's power button; a second Ctrl-C ends the VM at once.

Examples:
  baton run web1.toml
  baton run web1.toml --detach --json | jq .worker_pid
  baton run web1.toml --worker target/release/baton-worker
  baton run web1.toml --detach --incoming unix:/run/web1.main \\
    --incoming cpr,addr.transport=socket,addr.type=unix,addr.path=/run/web1.cpr
                              wait for what `migrate` on the running side sends")]
pub(crate) struct Run {
    /// The VM's description
    #[arg(value_name = "VM.toml")]
    pub(crate) file: PathBuf,
    /// Leave the VM running and return
    #[arg(long)]
    pub(crate) detach: bool,
    /// Wait for the guest of another broker of this VM; once for each channel, in the words of QEMU's -incoming
    #[arg(long, value_name = "CHANNEL")]
    pub(crate) incoming: Vec<String>,
    /// Let the guest that came stand still, until `baton resume`
    #[arg(short = 'S', long, requires = "incoming")]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) starting: Starting,
}

/// Prove a running VM's confinement against its policy, from the kernel's own records
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status 0: everything was compared, and agrees. 1: there are findings.

Examples:
  baton audit web1
  baton audit web1 --json | jq .findings
  baton audit web1 --html web1.html       one page, for people
  baton audit --all --sarif audit.sarif   for tools that collect findings")]
pub(crate) struct Audit {
    /// The VM's name
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vm: Option<String>,
    /// Audit every VM that runs here
    #[arg(long)]
    pub(crate) all: bool,
    /// Write the findings as SARIF 2.1.0, too
    #[arg(long, value_name = "FILE")]
    pub(crate) sarif: Option<PathBuf>,
    /// Write a page for people, too
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// Replace a VM's worker while its guest runs
#[derive(Debug, Args)]
#[command(after_help = "\
An upgrade that fails ends with the old worker running on (exit status 10).
Ctrl-C cancels an upgrade that is not committed yet.

With --broker a new broker is started from the VM's file beside the old one, and
gets the guest with everything that belongs to it; the old broker then ends. What
fails before that leaves the VM to the old one, and nothing of the new.

With --all, the first --canary VMs are upgraded one by one, and the first that
is not committed is the last. Then come --parallel VMs at a time; a VM that is
lost stops all that have not begun.

Examples:
  baton upgrade web1                      to the worker that its file names
  baton upgrade web1 --worker ./baton-worker
  baton upgrade web1 --dry-run            all that comes before the pause
  baton upgrade web1 --broker             to the installed broker, and its worker
  baton upgrade --all --canary 2 --parallel 8 --worker ./baton-worker")]
pub(crate) struct Upgrade {
    /// The VM's name
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vm: Option<String>,
    /// The new worker [default: the one that the VM's description names, opened again]
    #[arg(long, value_name = "BIN")]
    pub(crate) worker: Option<PathBuf>,
    /// Replace the broker, too [default BIN: as `baton run` finds it]
    #[arg(long, value_name = "BIN", num_args = 0..=1, require_equals = true, conflicts_with_all = ["dry_run", "all"])]
    pub(crate) broker: Option<Option<PathBuf>>,
    /// Go through everything that comes before the pause, then let the new worker go
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Approve of a worker that may do more than the one before it, for this reason, which is recorded with who says it
    #[arg(long, value_name = "WHY", value_parser = clap::builder::NonEmptyStringValueParser::new(), conflicts_with = "broker")]
    pub(crate) approve: Option<String>,
    /// Upgrade every VM that runs here
    #[arg(long)]
    pub(crate) all: bool,
    /// How many VMs to upgrade at a time
    #[arg(long, value_name = "N", default_value_t = 4, conflicts_with = "vm", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) parallel: u16,
    /// How many VMs to upgrade first, one by one
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "vm")]
    pub(crate) canary: usize,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        let arguments = Arguments::command();
        for command in arguments
            .get_subcommands()
            .flat_map(|command| std::iter::once(command).chain(command.get_subcommands()))
        {
            let help = command.get_after_help().map(ToString::to_string);
            assert!(
                help.is_some_and(|help| help.contains("Example")),
                "{} has no example",
                command.get_name()
            );
        }
    }
}
