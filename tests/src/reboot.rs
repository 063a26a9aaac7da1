//! A guest's way into a file and out of it again, as its operator goes it (mode `cpr-reboot`).

use std::path::Path;
use std::path::PathBuf;

use serde_json::Value;
use serde_json::json;

use crate::Answer;
use crate::Builder;
use crate::Qmp;
use crate::Ram;
use crate::Vm;
use crate::is_alive;
use crate::until;

impl Builder {
    /// Under the built-in policy, with the directories of tests as places for state files.
    #[must_use]
    pub fn state_files(self) -> Self {
        let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policy/default.toml");
        let text = std::fs::read_to_string(builtin).expect("the built-in policy");
        let place = "\"/var/lib/baton/**\"";
        assert!(text.contains(place), "the built-in policy names another");
        let tests = format!("\"{}/baton-e2e-*/**\"", std::env::temp_dir().display());
        self.policy(&text.replace(place, &tests))
    }
}

impl Vm {
    /// Puts the guest into a file. What `query-migrate` says of it in the end.
    pub fn save_to(&self, qmp: &mut Qmp, file: &Path) -> Value {
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
        qmp.done(
            "migrate",
            json!({"uri": format!("file:{}", file.display())}),
        );
        qmp.migrated()
    }

    /// The same, to the end of every process of the VM; where it is.
    ///
    /// # Panics
    ///
    /// When the guest does not go there.
    pub fn save_and_quit(&self) -> PathBuf {
        let file = self.site.path("state");
        let mut qmp = Qmp::connect(self);
        let info = self.save_to(&mut qmp, &file);
        assert_eq!(info.get("status"), Some(&json!("completed")), "{info}");
        qmp.done("quit", json!({}));
        self.assert_over();
        file
    }

    /// Nobody of this VM is left.
    ///
    /// # Panics
    ///
    /// When somebody is.
    pub fn assert_over(&self) {
        until("the broker ends", || (!is_alive(self.broker)).then_some(()));
        self.site.assert_nothing_left();
    }

    /// `baton run --detach VM.toml` with these further arguments.
    pub fn run_again(&self, more: &[&str]) -> Answer {
        let mut arguments = vec!["run", "--detach"];
        let file = self.site.path("vm.toml").display().to_string();
        arguments.push(&file);
        arguments.extend(more);
        self.site.baton(arguments)
    }

    /// A broker was started anew: from now on it is this VM's.
    ///
    /// # Panics
    ///
    /// When it was not.
    pub fn is_now(&mut self, started: &Value) {
        let broker = started.get("broker_pid").and_then(Value::as_i64);
        self.broker = broker
            .and_then(|pid| i32::try_from(pid).ok())
            .expect("a process");
        self.ram = Ram::of(self.broker).expect("the broker holds guest RAM");
        self.cgroup = self.site.cgroups().first().expect("a cgroup").clone();
    }
}
