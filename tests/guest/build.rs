//! Compiles the guest program in `program/` to a static ELF64 image, with the same `rustc` that builds the host side.
//!
//! The image is freestanding, but it is compiled for the host's own target, so that no other toolchain, standard
//! library or assembler is needed than those that every build of this workspace needs already.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

fn variable(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set; run this through cargo").into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let root = variable("CARGO_MANIFEST_DIR")?;
    let program = root.join("program");
    println!("cargo::rerun-if-changed={}", program.display());
    println!("cargo::rerun-if-changed=build.rs");

    let image = variable("OUT_DIR")?.join("guest.elf");
    compile(&program, &image)
}

fn compile(program: &Path, image: &Path) -> Result<(), Box<dyn Error>> {
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        .arg(program.join("main.rs"))
        .args(["--crate-name", "baton_guest_program", "--crate-type", "bin"])
        .args(["--edition", "2024", "--target", "x86_64-unknown-linux-gnu"])
        // Always optimised: rates and sweep times must not depend on the profile of the tests.
        .args([
            "-C",
            "opt-level=2",
            "-C",
            "codegen-units=1",
            "-C",
            "panic=abort",
        ])
        .args([
            "-C",
            "debuginfo=0",
            "-C",
            "strip=symbols",
            "-C",
            "overflow-checks=off",
        ])
        // Linked below 2 GiB at a fixed address; no vDSO, loader or libc to relocate it.
        .args([
            "-C",
            "relocation-model=static",
            "-C",
            "target-feature=+crt-static",
        ])
        // Nothing saves the guest's vector state across a call to CPL0; scalar SSE2 is all that `core` needs.
        .args([
            "-C",
            "target-cpu=x86-64",
            "-C",
            "no-vectorize-loops",
            "-C",
            "no-vectorize-slp",
        ])
        .arg("-C")
        .arg(format!(
            "link-arg=-Wl,-T,{}",
            program.join("link.ld").display()
        ))
        .args(
            ["-nostdlib", "-nostartfiles", "-static", "-no-pie"]
                .map(|flag| format!("-Clink-arg={flag}")),
        )
        .args(
            [
                "--build-id=none",
                "--no-eh-frame-hdr",
                "-z,max-page-size=4096",
                "-z,norelro",
            ]
            .map(|flag| format!("-Clink-arg=-Wl,{flag}")),
        )
        // The image holds no path of the machine that built it.
        .arg("--remap-path-prefix")
        .arg(format!("{}=program", program.display()))
        .arg("-o")
        .arg(image);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("-Clinker=");
        option.push(linker);
        rustc.arg(option);
    }
    // Flags meant for the host's binaries must not reach a freestanding image.
    rustc
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");

    let status = rustc.status()?;
    if !status.success() {
        return Err(format!("the guest program did not compile: {status}: {rustc:?}").into());
    }
    Ok(())
}
