//! A worker's process, executed under the filters of the policy, and what is said to it and by it.

use super::PATIENCE;
use super::filters;
use super::vm::Vm;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::cpr;
use baton_ipc::cpr::CprHeader;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::Order;
use baton_ipc::worker::PROTOCOL;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use baton_policy::Program;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

/// A worker's process. Killed when dropped.
pub(crate) struct Worker {
    pub(crate) child: Child,
    control: Option<Channel<Order, Report>>,
    cpr: Option<FdSocket>,
}

impl Worker {
    /// Executes the worker as a launcher does: from a descriptor, without arguments and environment, under the build
    /// filters.
    pub(crate) fn spawn() -> Self {
        let (ours, theirs) = FdSocket::pair().unwrap();
        let binary = File::open(env!("CARGO_BIN_EXE_baton-worker")).unwrap();
        let name = CString::new("baton-worker").unwrap();
        let mut command = Command::new("/nonexistent");
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        command.stdout(Stdio::null());
        let install: Vec<Program> = filters().build.clone();
        // SAFETY: the closure runs in the forked child. It installs filters and executes; both use memory of their own.
        // No other thread of the test holds a lock that it needs: it allocates, which glibc makes safe after fork.
        unsafe {
            command.pre_exec(move || {
                baton_policy::no_new_privs()?;
                for filter in &install {
                    filter.install()?;
                }
                let (argv, envp) = (
                    [name.as_ptr(), std::ptr::null()],
                    [std::ptr::null::<libc::c_char>()],
                );
                libc::syscall(
                    libc::SYS_execveat,
                    binary.as_raw_fd(),
                    c"".as_ptr(),
                    argv.as_ptr(),
                    envp.as_ptr(),
                    libc::AT_EMPTY_PATH,
                );
                Err(io::Error::last_os_error())
            });
        }
        let child = command.spawn().unwrap();
        Self {
            child,
            control: Some(Channel::new(ours)),
            cpr: None,
        }
    }

    #[track_caller]
    pub(crate) fn order(&self, order: &Order) {
        self.control.as_ref().unwrap().send(order).unwrap();
    }

    /// Sends an order to a worker that may be slow to read.
    #[track_caller]
    pub(crate) fn order_when_possible(&self, order: &Order) {
        let begun = Instant::now();
        while self.control.as_ref().unwrap().send(order).is_err() {
            assert!(begun.elapsed() < PATIENCE, "the worker does not read");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next report, or `None` when the worker has closed.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Option<Report> {
        let begun = Instant::now();
        let control = self.control.as_mut().unwrap();
        loop {
            match control.receive().unwrap() {
                Received::Message(report, descriptors) => {
                    assert!(descriptors.is_empty());
                    return Some(report);
                }
                Received::HungUp => return None,
                Received::Empty => {
                    assert!(begun.elapsed() < PATIENCE, "the worker says nothing");
                    let mut fds = [PollFd::new(control, PollFlags::IN)];
                    let _ = rustix::event::poll(
                        &mut fds,
                        Some(&Timespec {
                            tv_sec: 1,
                            tv_nsec: 0,
                        }),
                    );
                }
            }
        }
    }

    /// The next report, which must be as `take` wants it.
    #[track_caller]
    pub(crate) fn expect<T>(
        &mut self,
        what: &str,
        take: impl FnOnce(Report) -> Result<T, Report>,
    ) -> T {
        match self.next() {
            None => panic!(
                "expected {what}, the worker has closed: {:?}",
                self.child.wait()
            ),
            Some(report) => match take(report) {
                Ok(value) => value,
                Err(other) => panic!("expected {what}, got {other:?}"),
            },
        }
    }

    #[track_caller]
    pub(crate) fn expect_hello(&mut self) {
        self.expect("hello", |report| match report {
            Report::Hello {
                protocol: PROTOCOL, ..
            } => Ok(()),
            other => Err(other),
        });
    }

    #[track_caller]
    pub(crate) fn expect_failed(&mut self, wanted: &str) -> String {
        self.expect("failed", |report| match report {
            Report::Failed { step, reason } if step == wanted => Ok(reason),
            other => Err(other),
        })
    }

    /// "Running", and then "first run".
    #[track_caller]
    pub(crate) fn expect_running(&mut self) -> u64 {
        self.expect("running", |report| {
            if report == Report::Running {
                Ok(())
            } else {
                Err(report)
            }
        });
        self.expect("first run", |report| match report {
            Report::FirstRun { last_run_ns } => Ok(last_run_ns),
            other => Err(other),
        })
    }

    #[track_caller]
    pub(crate) fn expect_resumed(&mut self) {
        self.expect("resumed", |report| {
            if report == Report::Resumed {
                Ok(())
            } else {
                Err(report)
            }
        });
    }

    /// Sends the configuration, with the cpr socket and, of a new worker, the main channel.
    pub(crate) fn configure(&mut self, config: WorkerConfig, main: Option<&OwnedFd>) {
        let (ours, theirs) = FdSocket::pair().unwrap();
        let mut descriptors = vec![theirs.as_fd()];
        descriptors.extend(main.map(|main| main.as_fd()));
        let order = Order::Configure(Box::new(config));
        self.control
            .as_ref()
            .unwrap()
            .send_with(&order, &descriptors)
            .unwrap();
        self.cpr = Some(ours);
    }

    /// Hands the descriptors over.
    pub(crate) fn hand_over(&self, header: &CprHeader, registry: &Registry) {
        cpr::send(self.cpr.as_ref().unwrap(), header, registry).unwrap();
    }

    /// Hands over what belongs to the worker of `generation`.
    pub(crate) fn hand_over_to(&self, vm: &Vm, generation: u32) {
        self.hand_over(&vm.header(generation), &vm.registry());
    }

    /// Whether the worker lives and says nothing for a while.
    pub(crate) fn says_nothing(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(100));
        let silent = matches!(
            self.control.as_mut().unwrap().receive(),
            Ok(Received::Empty)
        );
        silent && self.child.try_wait().unwrap().is_none()
    }

    /// Waits until all threads of the worker are stopped.
    pub(crate) fn wait_stopped(&self) {
        let begun = Instant::now();
        let tasks = format!("/proc/{}/task", self.child.id());
        let stopped = |entry: io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(entry.unwrap().path().join("stat")).unwrap();
            let state = stat.rsplit(')').next().unwrap().trim_start();
            state.starts_with('T')
        };
        while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            assert!(begun.elapsed() < PATIENCE, "the worker does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// "Ready", and then the hang-up.
    #[track_caller]
    pub(crate) fn expect_ready(&mut self) -> BuildTimes {
        let times = self.expect("ready", |report| match report {
            Report::Ready(times) => Ok(times),
            other => Err(other),
        });
        let cpr = self.cpr.take().unwrap();
        let mut buffer = Vec::new();
        let begun = Instant::now();
        loop {
            match cpr.receive(&mut buffer).unwrap() {
                Received::HungUp => return times,
                Received::Empty => assert!(begun.elapsed() < PATIENCE),
                Received::Message((), _) => panic!("the worker speaks on the cpr channel"),
            }
        }
    }

    #[track_caller]
    pub(crate) fn build_cold(&mut self, vm: &Vm) -> BuildTimes {
        self.configure(vm.config(1), None);
        self.hand_over(&vm.header(1), &vm.registry());
        self.expect_ready()
    }

    /// The worker is to take this channel's place, in an upgrade's step S3.
    pub(crate) fn transfer(&self, main: &OwnedFd) {
        self.control
            .as_ref()
            .unwrap()
            .send_with(&Order::Transfer { elsewhere: false }, &[main.as_fd()])
            .unwrap();
    }

    /// Sends bytes that are no order.
    pub(crate) fn send_raw(&self, bytes: &[u8]) {
        let control = self
            .control
            .as_ref()
            .unwrap()
            .as_fd()
            .try_clone_to_owned()
            .unwrap();
        FdSocket::from(control).send(bytes, &[]).unwrap();
    }

    /// The broker dies, as far as this worker sees.
    pub(crate) fn abandon(&mut self) {
        self.control = None;
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the worker does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the worker has ended without a signal, and with what status.
    pub(crate) fn exit_code(&mut self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| panic!("ended by signal {:?}", status.signal()))
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: signals a child that has not been waited for, so the number is still its own.
        unsafe { libc::kill(i32::try_from(self.child.id()).unwrap(), signal) };
    }

    /// A number out of `/proc/<pid>/status`, in its own unit.
    pub(crate) fn status_field(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}
