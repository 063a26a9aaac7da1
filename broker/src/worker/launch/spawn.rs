//! The broker's side of a launch.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_policy::Confinement;

use super::LaunchOrder;
use super::LaunchReport;
use super::Program;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::worker::cgroup::Cgroup;
use crate::worker::ids::HostIds;
use crate::worker::launcher::Launcher;

/// Stage 1 on its way: it joins its cgroup and leaves all namespaces, whatever it is to become. Dropped, it is ended.
#[derive(Debug)]
pub(crate) struct Begun {
    launcher: Rc<Launcher>,
    stage1: u32,
    socket: Option<Channel<LaunchOrder, LaunchReport>>,
    diagnostics: OwnedFd,
    standard: [u64; 2],
    ids: HostIds,
    program: Program,
}

/// A launch under way. Dropped, its stages see a hang-up and exit.
#[derive(Debug)]
pub(crate) struct Launch {
    begun: Begun,
    confinement: Confinement,
    binary: OwnedFd,
    /// Where it is written down what a learning process calls.
    lessons: Option<OwnedFd>,
}

/// A process that has been started and is on its way to executing the worker.
#[derive(Debug)]
pub(crate) struct Launched {
    /// Its number in the broker's pid namespace.
    pub(crate) pid: i32,
    /// The broker's end of what becomes the control socket.
    pub(crate) socket: FdSocket,
    /// The read end of what it prints.
    pub(crate) diagnostics: OwnedFd,
    /// The host ids that it runs under.
    pub(crate) ids: HostIds,
    /// Its own ends of both: inodes (a pipe's ends have one).
    pub(crate) standard: [u64; 2],
}

impl Begun {
    /// Starts stage 1 of what is to run under `ids`, the ids that id 0 of its namespace stands for.
    ///
    /// It moves itself into the cgroup: the kernel may wait many milliseconds for that, and this process must not.
    pub(crate) fn start(
        launcher: &Rc<Launcher>,
        program: Program,
        ids: HostIds,
        cgroup: Option<&Cgroup>,
    ) -> Result<Self> {
        let (ours, theirs) = FdSocket::pair().doing("cannot make a control socket")?;
        let (diagnostics, output) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .doing("cannot make a pipe")?;
        rustix::io::ioctl_fionbio(&diagnostics, true).doing("cannot make a pipe")?;
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| stat.st_ino);
        let standard = [
            inode(theirs.as_fd()).doing("cannot examine a control socket")?,
            inode(output.as_fd()).doing("cannot examine a pipe")?,
        ];
        let doors = cgroup.map(Cgroup::doors).transpose()?.unwrap_or_default();
        let stage1 = launcher.begin(ids, [theirs.as_fd(), output.as_fd()])?;
        drop((theirs, output));
        let begun = Self {
            launcher: Rc::clone(launcher),
            stage1,
            socket: Some(Channel::new(ours)),
            diagnostics,
            standard,
            ids,
            program,
        };
        let doors: Vec<_> = doors.iter().map(AsFd::as_fd).collect();
        begun.send(&LaunchOrder::Begin, &doors)?;
        Ok(begun)
    }

    /// Says what it becomes: the sealed memfd to execute, and what stage 2 puts in place first.
    pub(crate) fn become_of(
        self,
        binary: BorrowedFd<'_>,
        confinement: Confinement,
        lessons: Option<BorrowedFd<'_>>,
    ) -> Result<Launch> {
        let binary = binary
            .try_clone_to_owned()
            .doing("cannot hold the worker's binary")?;
        let lessons = lessons
            .map(|file| file.try_clone_to_owned())
            .transpose()
            .doing("cannot hold the file of lessons")?;
        Ok(Launch {
            begun: self,
            confinement,
            binary,
            lessons,
        })
    }

    fn send(&self, order: &LaunchOrder, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        self.socket
            .as_ref()
            .ok_or_else(|| unfit("the launch is over", ""))?
            .send_with(order, descriptors)
            .doing("cannot reach the launcher")
    }
}

impl Launch {
    /// Goes on with what the stages have said; the process once it runs.
    pub(crate) fn advance(&mut self) -> Result<Option<Launched>> {
        loop {
            let Some(socket) = &mut self.begun.socket else {
                return Ok(None);
            };
            match socket.receive().doing("cannot hear the launcher")? {
                Received::Empty => return Ok(None),
                Received::HungUp => {
                    return Err(unfit(
                        "the launcher ended without a word",
                        "its diagnostics are in the log",
                    ));
                }
                Received::Message(LaunchReport::Unshared, _) => {
                    self.begun.launcher.map(self.begun.stage1)?;
                    self.begun.send(&LaunchOrder::Mapped, &[])?;
                }
                Received::Message(LaunchReport::Spawned(pid), _) => {
                    // Its child belongs to this process then, a subreaper, and the signal that stage 2 asks for at its parent's
                    // death is for this one's. Nor may the worker speak on this socket before stage 1's last word.
                    self.begun.launcher.end(self.begun.stage1)?;
                    let order = LaunchOrder::Confine(self.begun.program, self.confinement.clone());
                    self.begun.send(&order, &[self.binary.as_fd()])?;
                    if let Some(file) = &self.lessons {
                        let launcher = &self.begun.launcher;
                        launcher.learn(pid.unsigned_abs(), file.as_fd())?;
                    }
                    return self.spawned(pid).map(Some);
                }
                Received::Message(LaunchReport::Failed { step, reason }, _) => {
                    return Err(unfit(
                        format_args!("cannot confine the worker: {step}: {reason}"),
                        "`baton doctor` says what this host lacks",
                    ));
                }
            }
        }
    }

    fn spawned(&mut self, pid: i32) -> Result<Launched> {
        let begun = &mut self.begun;
        let socket = begun
            .socket
            .take()
            .ok_or_else(|| unfit("the launch is over", ""))?;
        Ok(Launched {
            pid,
            socket: FdSocket::from(OwnedFd::from(socket)),
            diagnostics: begun
                .diagnostics
                .try_clone()
                .doing("cannot hold the diagnostics pipe")?,
            ids: begun.ids,
            standard: begun.standard,
        })
    }
}

impl AsFd for Launch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.begun.socket {
            Some(socket) => socket.as_fd(),
            None => self.begun.diagnostics.as_fd(),
        }
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.socket.take().is_some() {
            // Not handed over: stage 1 may wait for an order. Its child, if there is one, sees the hang-up.
            let _ = self.launcher.end(self.stage1);
        }
    }
}
