//! A disk keeps its work, its lock and its grant, whatever happens to the workers.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use baton_guest::CommandLine;
use baton_tests::Builder;
use baton_tests::until;
use nix::fcntl::FcntlArg;
use nix::fcntl::fcntl;

fn busy() -> Builder {
    Builder::release()
        .line(CommandLine::new().disk_irq().console().period_ms(50))
        .disk("data", 4, "")
}

#[test]
fn every_request_is_completed_once_over_twenty_upgrades() {
    let vm = busy().start();
    let mut done = 0;
    for _ in 0..20 {
        let before = vm.until_disk("requests", |disk| disk.done > done + 100);
        done = before.done;
        vm.assert_upgrades();
        vm.until_disk("interrupts", |disk| disk.interrupts > before.interrupts);
    }
    vm.until_disk("requests", |disk| disk.done > done + 100);
    vm.assert_disk_is_whole("data.img");
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    for (field, name) in [
        ("threads", "io"),
        ("descriptors", "disk#1"),
        ("descriptors", "kick#32"),
    ] {
        let listed = audit[field].as_array().unwrap();
        let is = |one: &serde_json::Value| one["role"] == name || one["grant"] == name;
        assert!(listed.iter().any(is), "{name}: {audit}");
    }
}

#[test]
fn a_writable_disk_is_one_vms_alone_until_that_ends() {
    let vm = busy().start();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = text.replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1);
    vm.site.write("other.toml", other);
    for _ in 0..2 {
        let refusal = vm.site.run("other.toml").expect(3);
        let said = refusal.stdout + &refusal.stderr;
        assert!(
            said.contains("disk data") && said.contains("is locked"),
            "{said}"
        );
        vm.assert_upgrades();
    }
    vm.assert_disk_is_whole("data.img");
    vm.end().expect(0);
    vm.site.run("other.toml").expect(0);
    let other = format!("{}-other", vm.site.name);
    vm.site.baton(["stop", &other, "--force"]).expect(0);
}

/// What somebody of another process can see of a disk's lock, all the time.
struct Looker {
    over: Arc<AtomicBool>,
    thread: JoinHandle<(u64, u64)>,
}

/// Whether nobody has any lock on this file.
fn is_free(file: &File) -> bool {
    let mut lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    i32::from(lock.l_type) == libc::F_UNLCK
}

impl Looker {
    fn at(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let (mut looks, mut free) = (0, 0);
            while !end.load(Ordering::Relaxed) {
                looks += 1;
                free += u64::from(is_free(&file));
                std::thread::yield_now();
            }
            (looks, free)
        });
        Self { over, thread }
    }

    /// How often it has looked, and how often nobody had the lock.
    fn finish(self) -> (u64, u64) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[test]
fn somebody_has_the_lock_at_every_instant_of_a_vms_life() {
    let mut vm = busy().start();
    let path = vm.site.path("data.img");
    let looker = Looker::at(&path);
    for round in 0..30 {
        vm.assert_upgrades();
        if round % 10 == 5 {
            vm.assert_transfers();
        }
        if round % 10 == 9 {
            let refused = vm.baton("upgrade", ["--worker", "/bin/true"]);
            assert_ne!(refused.code, Some(0), "{refused:?}");
        }
    }
    let (looks, free) = looker.finish();
    assert_eq!(free, 0, "of {looks} looks");
    assert!(looks > 1_000, "{looks}");
    vm.assert_disk_is_whole("data.img");
    vm.end().expect(0);
    // It can be seen when nobody has it.
    let file = File::options().write(true).open(&path).unwrap();
    until("the lock to be let go", || is_free(&file).then_some(()));
}

#[test]
fn a_disk_that_policy_does_not_grant_is_refused() {
    let vm = busy().start();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let policy = vm.site.write_policy(&[&vm.site.binaries().worker()]);
    let granted = std::fs::read_to_string(&policy).unwrap();
    let (before, disk) = granted.split_once("name = \"disk\"").unwrap();
    let disk = disk.replacen("\"/**\"", "\"/srv/disks/**\"", 1);
    std::fs::write(&policy, format!("{before}name = \"disk\"{disk}")).unwrap();
    let other = text
        .replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1)
        .replacen(
            "\"default\"",
            &format!("{:?}", policy.display().to_string()),
            1,
        );
    vm.site.write("other.toml", other);
    let refusal = vm.site.run("other.toml").expect(30);
    let said = refusal.stdout + &refusal.stderr;
    assert!(said.contains("does not grant the disk data"), "{said}");
}
