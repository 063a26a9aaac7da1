//! The packages that this project was asked to stand on are direct dependencies of shipped crates and are called there; and
//! nothing that it depends on needs a newer compiler than the workspace promises.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// The crates whose binaries and libraries are shipped, with their folders.
const SHIPPED: [(&str, &str); 6] = [
    ("baton-audit", "audit"),
    ("baton-ipc", "ipc"),
    ("baton-policy", "policy"),
    ("baton-broker", "broker"),
    ("baton-worker", "vmm-worker"),
    ("baton", "cli"),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--offline", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Packages by name.
fn package<'a>(metadata: &'a Value, name: &str) -> &'a Value {
    let packages = metadata["packages"].as_array().unwrap();
    let found = packages.iter().find(|package| package["name"] == name);
    found.unwrap_or_else(|| panic!("no package {name}"))
}

/// Whether a package depends on another one for more than its tests or its build.
fn depends(package: &Value, on: &str) -> bool {
    let dependencies = package["dependencies"].as_array().unwrap();
    dependencies
        .iter()
        .any(|dependency| dependency["name"] == on && dependency["kind"].is_null())
}

/// The lines of a folder's sources that are no comments and no unit tests.
fn code(folder: &Path, lines: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if name != "tests" {
                code(&path, lines);
            }
        } else if path.extension().is_some_and(|kind| kind == "rs") && name != "tests.rs" {
            let text = std::fs::read_to_string(&path).unwrap();
            let tested = text.find("#[cfg(test)]").unwrap_or(text.len());
            let shipped = text[..tested].lines().map(str::trim);
            lines.extend(
                shipped
                    .filter(|line| !line.starts_with("//"))
                    .map(str::to_owned),
            );
        }
    }
}

#[test]
fn every_named_package_is_depended_on_and_called_by_a_shipped_crate() {
    let metadata = metadata();
    for name in [
        "kvm-ioctls",
        "vm-memory",
        "seccompiler",
        "landlock",
        "caps",
        "nix",
        "sendfd",
        "postcard",
        "clap",
    ] {
        let path = format!("{}::", name.replace('-', "_"));
        let users: Vec<_> = SHIPPED
            .into_iter()
            .filter(|(crate_name, _)| depends(package(&metadata, crate_name), name))
            .filter(|(_, folder)| {
                let mut lines = Vec::new();
                code(&workspace().join(folder).join("src"), &mut lines);
                lines.iter().any(|line| line.contains(&path))
            })
            .map(|(crate_name, _)| crate_name)
            .collect();
        assert!(
            !users.is_empty(),
            "no shipped crate depends on {name} and calls it"
        );
    }
}

#[test]
fn only_the_worker_links_kvm_and_maps_guest_memory() {
    let metadata = metadata();
    for name in ["kvm-ioctls", "kvm-bindings", "vm-memory"] {
        let users: Vec<_> = SHIPPED
            .into_iter()
            .filter(|(crate_name, _)| depends(package(&metadata, crate_name), name))
            .collect();
        assert_eq!(users, [("baton-worker", "vmm-worker")], "{name}");
    }
}

#[test]
fn no_dependency_needs_a_newer_compiler_than_the_workspace_promises() {
    let version = |text: &str| -> Vec<u32> {
        let mut parts: Vec<u32> = text.split('.').map(|part| part.parse().unwrap()).collect();
        parts.resize(3, 0);
        parts
    };
    let metadata = metadata();
    let promised = package(&metadata, "baton-broker")["rust_version"]
        .as_str()
        .unwrap();
    let used: Vec<&Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| &node["id"])
        .collect();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "the metadata are not the workspace's");
    for package in packages
        .iter()
        .filter(|package| used.contains(&&package["id"]))
    {
        if let Some(needed) = package["rust_version"].as_str() {
            assert!(
                version(needed) <= version(promised),
                "{} needs {needed}, the workspace promises {promised}",
                package["name"]
            );
        }
    }
}

#[test]
fn the_broker_and_the_wire_forbid_unsafe_code() {
    for root in ["broker/src/main.rs", "ipc/src/lib.rs"] {
        let text = std::fs::read_to_string(workspace().join(root)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{root}");
    }
}
