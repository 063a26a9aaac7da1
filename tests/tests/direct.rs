//! A disk with direct I/O has the blocks that its host needs, as long as its guest lives.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use baton_guest::CommandLine;
use baton_tests::Builder;
use baton_tests::LoopDevice;
use baton_tests::Mount;
use baton_tests::Qmp;
use baton_tests::Vm;
use serde_json::json;

const MIB: u64 = 1 << 20;
/// Of x86-64 (asm-generic/fcntl.h).
const O_DIRECT: i32 = 0o40000;

fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn busy() -> Builder {
    Builder::release().line(CommandLine::new().disk_irq().console().period_ms(50))
}

/// With the disk that lies there, read and written directly.
fn on(path: &Path) -> Builder {
    let (id, direct) = ("data", "direct = true");
    busy().tables(&format!(
        "[[disk]]\nid = {id:?}\npath = {path:?}\n{direct}\n"
    ))
}

/// A file without holes, for which a kernel looks at no alignment.
fn blank(path: &Path, bytes: u64) {
    let file = File::create(path).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    file.write_all_at(&[1; 3 * 4096], 0).unwrap();
}

/// Whether the kernel takes direct reads of so many bytes of this file.
fn takes(path: &Path, bytes: usize) -> bool {
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(O_DIRECT)
        .open(path)
        .unwrap();
    let mut memory = vec![0; 3 * 4096];
    let start = memory.as_ptr().align_offset(4096);
    let buffer = memory.get_mut(start..start + bytes).unwrap();
    file.read_exact_at(buffer, bytes as u64).is_ok()
}

/// The worker's descriptor of this file is one for direct I/O, by the kernel's own word.
#[track_caller]
fn assert_direct(vm: &Vm, path: &Path) {
    let process = Path::new("/proc").join(vm.worker().to_string());
    let mut descriptors = std::fs::read_dir(process.join("fd")).unwrap();
    let there = path.canonicalize().unwrap();
    let found = descriptors.find_map(|entry| {
        let entry = entry.unwrap();
        let same = std::fs::read_link(entry.path()).is_ok_and(|target| target == there);
        same.then(|| entry.file_name())
    });
    let info = process
        .join("fdinfo")
        .join(found.expect("the disk's descriptor"));
    let info = std::fs::read_to_string(info).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
    assert_eq!(flags & O_DIRECT, O_DIRECT, "{info}");
}

/// A guest is told of these blocks, does its work by them, and is never told of others.
fn keeps_its_blocks(path: &Path, block_size: u64) {
    let mut vm = on(path).start();
    vm.until_disk("requests", |disk| disk.done > 100);
    assert_eq!(vm.ram.disk().block_size, block_size);
    assert_direct(&vm, path);
    let mut done = 0;
    for round in 0..3 {
        if round < 2 {
            vm.assert_upgrades();
        } else {
            vm.assert_transfers();
        }
        vm.until_disk("requests", |disk| disk.done > done + 100);
        done = vm.ram.disk().done;
        assert_direct(&vm, path);
    }
    if path.is_file() {
        let mut qmp = Qmp::connect(&vm);
        let resize = |bytes: u64| json!({"device": "data", "size": bytes});
        if block_size == 4096 {
            let refusal = qmp.refused("block_resize", resize(8 * MIB + 512));
            assert!(
                refusal.contains("a multiple of 4096 bytes there"),
                "{refusal}"
            );
        }
        qmp.done("block_resize", resize(8 * MIB));
        // It reads both anew.
        vm.until_disk("the guest to be told", |disk| disk.bytes == 8 * MIB);
        assert_eq!(vm.ram.disk().block_size, block_size);
    }
    vm.assert_disk_is_whole(path.to_str().unwrap());
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    vm.end().expect(0);
}

#[test]
fn a_file_has_the_blocks_that_direct_io_on_it_needs() {
    for (bytes, expected) in [(4096, 4096), (512, 512)] {
        let mount = Mount::with_blocks(target(), bytes);
        let path = mount.path().join("data.img");
        blank(&path, 4 * MIB);
        assert_eq!(
            (takes(&path, 512), takes(&path, 4096)),
            (bytes == 512, true)
        );
        keeps_its_blocks(&path, expected);
    }
}

#[test]
fn a_file_system_that_does_not_tell_is_tried() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("data.img");
    blank(&path, 4 * MIB);
    keeps_its_blocks(&path, 512);
}

#[test]
fn a_block_device_has_its_own_blocks() {
    let directory = tempfile::tempdir_in(target()).unwrap();
    let backing = directory.path().join("backing.img");
    blank(&backing, 4 * MIB);
    let device = LoopDevice::with_blocks(&backing, 4096);
    keeps_its_blocks(device.path(), 4096);
}

#[test]
fn what_is_no_whole_number_of_blocks_is_refused() {
    let mount = Mount::with_blocks(target(), 4096);
    let (good, path) = (mount.path().join("good.img"), mount.path().join("odd.img"));
    blank(&good, 4 * MIB);
    blank(&path, 4 * MIB + 512);
    let vm = on(&good).start();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = text
        .replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1)
        .replacen("good.img", "odd.img", 1);
    vm.site.write("other.toml", other);
    let refusal = vm.site.run("other.toml").expect(3);
    let said = refusal.stdout + &refusal.stderr;
    assert!(said.contains("a multiple of 4096 bytes there"), "{said}");
    // By QMP just so.
    let mut qmp = Qmp::connect(&vm);
    let node = json!({
        "driver": "file",
        "node-name": "other",
        "filename": path,
        "cache": {"direct": true},
    });
    let refusal = qmp.refused("blockdev-add", node);
    assert!(
        refusal.contains("a multiple of 4096 bytes there"),
        "{refusal}"
    );
}

#[test]
fn a_guest_does_not_come_back_to_a_disk_of_other_blocks() {
    let (fine, coarse) = (
        Mount::with_blocks(target(), 512),
        Mount::with_blocks(target(), 4096),
    );
    let (here, there) = (fine.path().join("data.img"), coarse.path().join("data.img"));
    blank(&here, 4 * MIB);
    let mut vm = on(&here).state_files().start();
    vm.until_disk("requests", |disk| disk.done > 100);
    let state = vm.save_and_quit();
    std::fs::copy(&here, &there).unwrap();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let moved = text.replacen(here.to_str().unwrap(), there.to_str().unwrap(), 1);
    vm.site.write("vm.toml", moved);
    let incoming = format!("file:{}", state.display());
    let refusal = vm.run_again(&["--incoming", &incoming]).expect(3);
    let said = format!("{refusal:?}");
    assert!(said.contains("block_size is 0x200"), "{said}");
    vm.assert_over();
    vm.site.write("vm.toml", text);
    let started = vm.run_again(&["--incoming", &incoming]).expect(0).json();
    vm.is_now(&started);
    let done = vm.ram.disk().done;
    vm.until_disk("requests", |disk| disk.done > done + 100);
    vm.assert_disk_is_whole(here.to_str().unwrap());
    vm.end().expect(0);
}
