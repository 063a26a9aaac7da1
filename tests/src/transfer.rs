//! A guest's way from one broker to another, as its operator goes it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use serde_json::Value;
use serde_json::json;

use crate::Answer;
use crate::Qmp;
use crate::Vm;
use crate::until;

/// A broker that waits for a guest.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Its process.
    pub broker: i32,
    /// Where it listens for the main channel.
    pub main: PathBuf,
    /// Where it listens for the CPR state.
    pub cpr: PathBuf,
}

impl Waiting {
    /// The channels that lead there, as `migrate` takes them.
    #[must_use]
    pub fn channels(&self) -> Value {
        json!([channel("main", &self.main), channel("cpr", &self.cpr)])
    }
}

/// One channel.
#[must_use]
pub fn channel(kind: &str, path: &std::path::Path) -> Value {
    json!({"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}})
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Vm {
    /// Starts a broker from this VM's file, to wait for its guest.
    ///
    /// # Panics
    ///
    /// When it does not wait.
    pub fn wait_for_guest(&self) -> Waiting {
        self.wait_from("vm.toml", &[])
    }

    /// The same from another file, with these further arguments; one that is `--incoming` replaces the main channel.
    ///
    /// # Panics
    ///
    /// When it does not wait.
    pub fn wait_from(&self, file: &str, more: &[&str]) -> Waiting {
        let (answer, waiting) = self.try_to_wait(file, more);
        let started = answer.expect(0).json();
        let broker = started.get("broker_pid").and_then(Value::as_i64);
        let broker = broker.and_then(|pid| i32::try_from(pid).ok());
        Waiting {
            broker: broker.expect("a process"),
            ..waiting
        }
    }

    /// The same, whatever comes of it.
    pub fn try_to_wait(&self, file: &str, more: &[&str]) -> (Answer, Waiting) {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let waiting = Waiting {
            broker: 0,
            main: self.site.path(&format!("main-{number}")),
            cpr: self.site.path(&format!("cpr-{number}")),
        };
        let mut arguments: Vec<OsString> = ["run", "--detach"].map(OsString::from).into();
        arguments.push(self.site.path(file).into());
        if !more.contains(&"--incoming") {
            arguments.push("--incoming".into());
            arguments.push(format!("unix:{}", waiting.main.display()).into());
        }
        arguments.push("--incoming".into());
        arguments.push(
            format!(
                "cpr,addr.transport=socket,addr.type=unix,addr.path={}",
                waiting.cpr.display()
            )
            .into(),
        );
        arguments.extend(more.iter().map(OsString::from));
        (self.site.baton(arguments), waiting)
    }

    /// Hands the guest to a broker that waits. What the old side says of it in the end.
    pub fn migrate_to(&self, qmp: &mut Qmp, waiting: &Waiting) -> Value {
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        qmp.done("migrate", json!({"channels": waiting.channels()}));
        qmp.migrated()
    }

    /// A whole transfer, which has to succeed on the same guest (I1, I8).
    ///
    /// # Panics
    ///
    /// When it does not, or the guest was disturbed.
    pub fn assert_transfers(&mut self) {
        let (before, generation) = (self.witness(), self.generation());
        let waiting = self.wait_for_guest();
        let mut qmp = Qmp::connect(self);
        let info = self.migrate_to(&mut qmp, &waiting);
        assert_eq!(info.get("status"), Some(&json!("completed")), "{info}");
        assert_eq!(qmp.status(), "postmigrate");
        drop(qmp);
        self.assert_taken_over(&waiting);
        assert_eq!(self.generation(), generation + 1);
        self.assert_only_runner(self.worker());
        self.assert_goes_on(&before);
    }

    /// The broker that waited has the VM now, and the old one is gone.
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_taken_over(&mut self, by: &Waiting) {
        let old = self.broker;
        until("the old broker ends", || {
            (!crate::is_alive(old)).then_some(())
        });
        // If the old one died, its guest is an orphan until the other has found that out.
        until("the new broker has the name", || {
            let status = self.ask("status");
            let has_it = status.code == Some(0)
                && status.json().get("broker_pid") == Some(&json!(by.broker));
            has_it.then_some(())
        });
        self.broker = by.broker;
        // Also that of an old broker that was killed.
        self.cgroup = until("the old cgroup is gone", || {
            match self.site.cgroups().as_slice() {
                [one] => Some(one.clone()),
                _ => None,
            }
        });
        let mine = format!("-{}", by.broker);
        assert!(
            self.cgroup.to_string_lossy().ends_with(&mine),
            "{:?}",
            self.cgroup
        );
    }

    /// Nobody waits for the guest any more.
    ///
    /// # Panics
    ///
    /// When somebody does.
    pub fn assert_nobody_waits(&self, waiting: &Waiting) {
        until("the waiting broker ends", || {
            (!crate::is_alive(waiting.broker)).then_some(())
        });
    }
}
