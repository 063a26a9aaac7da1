//! Confines itself by the built-in policy as a launcher would, executes a sealed copy of itself, and there does one
//! thing: what `tests/confinement.rs` asks for. Its end (exit status or signal) is the answer.
#![expect(
    unsafe_code,
    reason = "attempts system calls that no safe function would make"
)]

use std::error::Error;
use std::ffi::{CString, c_long};
use std::io::Write;
use std::os::fd::IntoRawFd;
use std::sync::mpsc;
use std::time::Duration;

use baton_policy::{Policy, Role, Syscall};
use rustix::fs::MemfdFlags;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    match words.as_slice() {
        ["inside", rest @ ..] => inside(rest),
        rest => confined(rest),
    }
}

/// The launcher's part.
fn confined(rest: &[&str]) -> Result<(), Box<dyn Error>> {
    let memfd = rustix::fs::memfd_create(
        "worker",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::EXEC,
    )?;
    let mut copy = std::fs::File::from(memfd);
    std::io::copy(&mut std::fs::File::open("/proc/self/exe")?, &mut copy)?;
    let mut argv = vec![CString::new("subject")?, CString::new("inside")?];
    for word in rest {
        argv.push(if *word == "kvm" {
            // Without close-on-exec, and left open: the word becomes its number.
            let (flags, mode) = (rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty());
            let kvm = rustix::fs::open("/dev/kvm", flags, mode)?;
            CString::new(kvm.into_raw_fd().to_string())?
        } else {
            CString::new(*word)?
        });
    }
    let confinement = Policy::builtin()?.confinement(2)?;
    confinement.enter()?;
    let flags = if rest.first() == Some(&"exec-flags") {
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW
    } else {
        nix::fcntl::AtFlags::empty()
    };
    nix::unistd::execveat(
        &copy,
        c"",
        &argv,
        &[] as &[CString],
        nix::fcntl::AtFlags::AT_EMPTY_PATH | flags,
    )?;
    Ok(())
}

/// The worker's part.
fn inside(words: &[&str]) -> Result<(), Box<dyn Error>> {
    match *words {
        ["start"] => {
            let threads: Vec<_> = (0..4_usize)
                .map(|n| {
                    std::thread::Builder::new()
                        .name(format!("t{n}"))
                        .spawn(move || vec![n; 1 << 20].len())
                })
                .collect::<Result<_, _>>()?;
            for thread in threads {
                assert_eq!(thread.join().ok(), Some(1 << 20));
            }
            println!("started");
        }
        ["build", call, ref arguments @ ..] => report(attempt(call, arguments)?),
        [role, "steady"] => return steady(role_named(role)?),
        [role, call, ref arguments @ ..] => {
            // In a thread of its own, as in a worker: the main thread keeps the build phase's filters.
            let (role, call) = (role_named(role)?, call.to_owned());
            let arguments: Vec<String> = arguments.iter().map(|one| (*one).to_owned()).collect();
            let program = Policy::builtin()?
                .compile()?
                .roles
                .remove(&role)
                .ok_or("no such role")?;
            let outcome = std::thread::spawn(move || {
                let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
                program.install().map_err(|error| error.to_string())?;
                attempt(&call, &words).map_err(|error| error.to_string())
            });
            report(outcome.join().map_err(|_| "the thread panicked")??);
        }
        _ => return Err("unknown words".into()),
    }
    Ok(())
}

/// A settled worker: the main thread is control, two more are vCPUs, one is I/O; then waits to be killed.
fn steady(main: Role) -> Result<(), Box<dyn Error>> {
    let compiled = Policy::builtin()?.compile()?;
    let (ready, readies) = mpsc::channel();
    for role in [Role::Vcpu, Role::Vcpu, Role::Io] {
        let (ready, program) = (
            ready.clone(),
            compiled.roles.get(&role).ok_or("no such role")?.clone(),
        );
        std::thread::spawn(move || {
            let _ = ready.send(program.install().map_err(|error| error.to_string()));
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        });
    }
    for _ in 0..3 {
        readies.recv()??;
    }
    compiled.roles.get(&main).ok_or("no such role")?.install()?;
    let mut out = std::io::stdout();
    out.write_all(b"steady\n")?;
    out.flush()?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn role_named(name: &str) -> Result<Role, Box<dyn Error>> {
    Role::ALL
        .into_iter()
        .find(|role| role.name() == name)
        .ok_or_else(|| "unknown role".into())
}

/// One system call with these arguments, the rest 0: its result, or the error number as a negative one.
fn attempt(call: &str, arguments: &[&str]) -> Result<c_long, Box<dyn Error>> {
    let number = match call.parse::<u32>() {
        Ok(number) => number,
        Err(_) => Syscall::from_name(call).ok_or("unknown call")?.number(),
    };
    let mut registers = [0_u64; 6];
    for (register, word) in registers.iter_mut().zip(arguments) {
        *register = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16)?,
            None => word.parse()?,
        };
    }
    let [a, b, c, d, e, f] = registers;
    // SAFETY: the tests choose calls and arguments that either are not executed or harm nothing: null pointers, closed
    // descriptors.
    let outcome = unsafe { libc::syscall(c_long::from(number), a, b, c, d, e, f) };
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    Ok(if outcome == -1 {
        -c_long::from(errno)
    } else {
        outcome
    })
}

fn report(outcome: c_long) {
    println!("{outcome}");
}
