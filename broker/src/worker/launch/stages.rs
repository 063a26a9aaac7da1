//! The two stages themselves; see the module above. Errors go back over the socket, so nothing here prints.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::process::Command;

use baton_ipc::Channel;
use baton_ipc::Received;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_policy::Confinement;
use nix::mount::MntFlags;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::unistd::Gid;
use nix::unistd::Uid;
use rustix::fd::AsFd;

use super::LaunchOrder;
use super::LaunchReport;
use super::Program;

/// The namespaces that a worker has of its own.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWCGROUP);

type Socket = Channel<LaunchReport, LaunchOrder>;
type StageResult = Result<(), (&'static str, String)>;

/// Names the step that an error belongs to.
trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, (&'static str, String)>;
}

impl<T, E: std::fmt::Display> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, (&'static str, String)> {
        self.map_err(|error| (step, error.to_string()))
    }
}

/// Stage 1. Exits 0 when stage 2 runs.
pub(crate) fn unshare() -> std::process::ExitCode {
    let failed = |socket: Socket, step, reason| {
        let _ = socket.send(&LaunchReport::Failed { step, reason });
    };
    let stage = |socket: &mut Socket| {
        begin(socket)?;
        nix::sched::unshare(NAMESPACES).step("unshare the namespaces")?;
        socket.send(&LaunchReport::Unshared).step("report")?;
        expect(socket, |order| matches!(order, LaunchOrder::Mapped))?;
        // An ordinary user's namespace forbids setgroups; its broker has said so in the id map's denial.
        if std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|word| word.trim() == "allow")
        {
            nix::unistd::setgroups(&[]).step("drop supplementary groups")?;
        }
        let (group, user) = (Gid::from_raw(0), Uid::from_raw(0));
        nix::unistd::setresgid(group, group, group).step("become the VM's group")?;
        nix::unistd::setresuid(user, user, user).step("become the VM's user")?;
        let child = Command::new("/proc/self/exe")
            .args(["launch", "--confine"])
            .env_clear()
            .spawn()
            .step("start the second stage")?;
        let pid = i32::try_from(child.id()).step("start the second stage")?;
        socket.send(&LaunchReport::Spawned(pid)).step("report")
    };
    report(stage, failed)
}

/// Cgroups that a process joins, at the most: one for each controller that policy has limits of.
const MAX_DOORS: usize = 3;

/// Waits for the order to begin, and joins the cgroups that come with it.
fn begin(socket: &mut Socket) -> StageResult {
    let (order, descriptors) = receive(socket)?;
    if !matches!(order, LaunchOrder::Begin) || descriptors.len() > MAX_DOORS {
        return Err(("follow the broker", format!("unexpected {order:?}")));
    }
    for door in descriptors {
        // 0 is the process that writes (Documentation/admin-guide/cgroup-v2.rst, "Processes").
        rustix::io::write(&door, b"0").step("join the VM's cgroup")?;
    }
    Ok(())
}

/// Stage 2. Does not return when all went well.
pub(crate) fn confine() -> std::process::ExitCode {
    // The broker already hears this socket as the worker's. (The QMP front's says nothing like it, and is hung up on.)
    let failed = |socket: Socket, step, reason| {
        let socket: Channel<Report, Order> = Channel::new(OwnedFd::from(socket).into());
        let _ = socket.send(&Report::Failed { step, reason });
    };
    let stage = |socket: &mut Socket| {
        let (order, descriptors) = receive(socket)?;
        let LaunchOrder::Confine(program, confinement) = order else {
            return Err(("receive the confinement", "another order".to_owned()));
        };
        let [binary] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|got| {
            (
                "receive the worker's binary",
                format!("{} descriptors", got.len()),
            )
        })?;
        put_in_place(program, &confinement)?;
        let name = CString::from(match program {
            Program::Worker => c"baton-worker",
            Program::Front => c"baton-qmp",
        });
        nix::unistd::execveat(
            binary.as_fd(),
            c"",
            &[name],
            &[] as &[CString],
            nix::fcntl::AtFlags::AT_EMPTY_PATH,
        )
        .map(drop)
        .step("execute the worker")
    };
    report(stage, failed)
}

fn put_in_place(program: Program, confinement: &Confinement) -> StageResult {
    rustix::process::setsid().step("start a session")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    nix::unistd::sethostname("baton").step("name the host")?;
    empty_root().step("empty the root")?;
    baton_policy::kernel::close_range_cloexec(3).step("close descriptors")?;
    // The broker's death continues a stopped worker, which then decides by what is in its socket. The ids are final, and
    // losing capabilities does not clear it (prctl(2), PR_SET_PDEATHSIG).
    let at_brokers_death = match program {
        Program::Worker => Signal::SIGCONT,
        Program::Front => Signal::SIGKILL,
    };
    nix::sys::prctl::set_pdeathsig(at_brokers_death).step("set the parent-death signal")?;
    // Of its first thread alone, which parks, saves and loads; without it a busy host's guest waits longer, and is none the less safe.
    let _ = baton_policy::kernel::shorten_slice();
    confinement.enter().map(drop).step("confine the process")
}

/// Makes an empty, read-only file system the root, and detaches all others.
fn empty_root() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    // /proc is where a broker is certain to have a directory; nothing of it stays visible.
    nix::mount::mount(
        Some("empty"),
        "/proc",
        Some("tmpfs"),
        MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("size=4k,nr_inodes=1,mode=0555"),
    )?;
    nix::unistd::chdir("/proc")?;
    // The new root on top of the old one in the same place, then the old one away from under it: pivot_root(2).
    nix::unistd::pivot_root(".", ".")?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")
}

fn report(
    stage: impl FnOnce(&mut Socket) -> StageResult,
    failed: impl FnOnce(Socket, String, String),
) -> std::process::ExitCode {
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else {
        return std::process::ExitCode::FAILURE;
    };
    let mut socket = Socket::new(socket.into());
    match stage(&mut socket) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err((step, reason)) => {
            failed(socket, step.to_owned(), reason);
            std::process::ExitCode::FAILURE
        }
    }
}

fn expect(socket: &mut Socket, expected: fn(&LaunchOrder) -> bool) -> StageResult {
    match receive(socket)? {
        (order, descriptors) if expected(&order) && descriptors.is_empty() => Ok(()),
        (order, _) => Err(("follow the broker", format!("unexpected {order:?}"))),
    }
}

/// Waits for the next order. The broker bounds the whole launch in time, and closes the socket to end it.
fn receive(socket: &mut Socket) -> Result<(LaunchOrder, Vec<OwnedFd>), (&'static str, String)> {
    loop {
        match socket.receive().step("hear the broker")? {
            Received::Message(order, descriptors) => return Ok((order, descriptors)),
            Received::HungUp => return Err(("hear the broker", "it has hung up".to_owned())),
            Received::Empty => {
                let mut poll = [rustix::event::PollFd::new(
                    &*socket,
                    rustix::event::PollFlags::IN,
                )];
                match rustix::event::poll(&mut poll, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(("hear the broker", e.to_string())),
                }
            }
        }
    }
}
