//! The commands that change what the guest has for devices.

use baton_ipc::control::NewDevice;
use baton_ipc::control::NewInterface;
use baton_ipc::control::NewNetdev;
use baton_ipc::control::NewNode;
use baton_ipc::control::Request;
use baton_ipc::control::VmState;
use serde_json::Value;

use crate::commands::with_status;
use crate::failure::Class;
use crate::failure::Failure;
use crate::schema::Object;
use crate::shared::Answer;
use crate::shared::Shared;

fn text(arguments: &Object, name: &str) -> String {
    let text = arguments.get(name).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn flag(arguments: &Object, name: &str) -> bool {
    arguments.get(name).and_then(Value::as_bool) == Some(true)
}

pub(crate) fn blockdev_add(_: &mut Shared, arguments: &Object) -> Answer {
    let cache = arguments.get("cache").and_then(Value::as_object);
    Answer::order(Request::AddNode(NewNode {
        name: text(arguments, "node-name"),
        path: text(arguments, "filename"),
        device: text(arguments, "driver") == "host_device",
        readonly: flag(arguments, "read-only"),
        direct: cache.is_some_and(|cache| flag(cache, "direct")),
    }))
}

pub(crate) fn blockdev_del(_: &mut Shared, arguments: &Object) -> Answer {
    Answer::order(Request::DeleteNode {
        name: text(arguments, "node-name"),
    })
}

pub(crate) fn netdev_add(_: &mut Shared, arguments: &Object) -> Answer {
    // Scripts that QEMU would start: a broker starts nothing.
    for script in ["script", "downscript"] {
        if arguments
            .get(script)
            .and_then(Value::as_str)
            .is_some_and(|name| name != "no")
        {
            return Answer::failed(Failure::generic(format_args!(
                "Parameter '{script}' expects 'no'"
            )));
        }
    }
    match queues(arguments, "queues") {
        Ok(pairs) => Answer::order(Request::AddNetdev(NewNetdev {
            id: text(arguments, "id"),
            tap: text(arguments, "ifname"),
            pairs,
        })),
        Err(failure) => Answer::failed(failure),
    }
}

pub(crate) fn netdev_del(_: &mut Shared, arguments: &Object) -> Answer {
    Answer::order(Request::DeleteNetdev {
        id: text(arguments, "id"),
    })
}

pub(crate) fn device_add(_: &mut Shared, arguments: &Object) -> Answer {
    match new_device(arguments) {
        Ok(request) => unless_migrating("device_add", request),
        Err(failure) => Answer::failed(failure),
    }
}

/// As QEMU says it (system/qdev-monitor.c).
fn migrating(command: &str) -> Answer {
    Answer::failed(Failure::generic(format_args!(
        "{command} not allowed while migrating"
    )))
}

fn unless_migrating(command: &'static str, request: Request) -> Answer {
    with_status(move |_, status| match status.state {
        VmState::Upgrading => migrating(command),
        _ => Answer::order(request),
    })
}

/// So many queues, or pairs of them.
fn queues(arguments: &Object, name: &str) -> Result<u8, Failure> {
    let queues = arguments.get(name).and_then(Value::as_i64);
    u8::try_from(queues.unwrap_or(1)).map_err(|_| {
        Failure::generic(format_args!(
            "Parameter '{name}' expects a number from 1 to 8"
        ))
    })
}

fn new_device(arguments: &Object) -> Result<Request, Failure> {
    let driver = text(arguments, "driver");
    let members: &[&str] = match driver.as_str() {
        "virtio-blk-pci" => &["drive", "serial", "num-queues"],
        "virtio-net-pci" => &["netdev", "mac"],
        _ => {
            return Err(Failure::generic(format_args!(
                "'{driver}' is not a valid device model name"
            )));
        }
    };
    for foreign in ["drive", "serial", "num-queues", "netdev", "mac"] {
        if arguments.contains_key(foreign) && !members.contains(&foreign) {
            return Err(Failure::generic(format_args!(
                "Property '{driver}.{foreign}' not found"
            )));
        }
    }
    let needed: &[&str] = match driver.as_str() {
        "virtio-net-pci" => &["netdev", "mac"],
        _ => &["drive"],
    };
    if let Some(missing) = needed.iter().find(|name| !arguments.contains_key(**name)) {
        return Err(Failure::generic(format_args!(
            "{driver}: the property '{missing}' is needed"
        )));
    }
    let bus = arguments.get("bus").and_then(Value::as_str);
    if let Some(bus) = bus.filter(|bus| !matches!(*bus, "pci.0" | "pcie.0")) {
        return Err(Failure::generic(format_args!("Bus '{bus}' not found")));
    }
    let addr = arguments.get("addr").and_then(Value::as_str);
    let slot = addr.map(|addr| slot(&driver, addr)).transpose()?;
    if driver == "virtio-net-pci" {
        return Ok(Request::AddInterface(NewInterface {
            id: text(arguments, "id"),
            netdev: text(arguments, "netdev"),
            mac: text(arguments, "mac"),
            slot,
        }));
    }
    let serial = arguments.get("serial").and_then(Value::as_str);
    Ok(Request::AddDevice(NewDevice {
        id: text(arguments, "id"),
        node: text(arguments, "drive"),
        serial: serial
            .filter(|serial| !serial.is_empty())
            .map(str::to_owned),
        queues: queues(arguments, "num-queues")?,
        slot,
    }))
}

/// A PCI device number as QEMU writes it: hexadecimal, perhaps with function 0 (`set_pci_devfn`, hw/core/qdev-properties-system.c).
fn slot(driver: &str, addr: &str) -> Result<u8, Failure> {
    let device = addr.strip_suffix(".0").unwrap_or(addr);
    let digits = device.strip_prefix("0x").unwrap_or(device);
    let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let slot = u8::from_str_radix(digits, 16).ok();
    slot.filter(|slot| plain && *slot < 32).ok_or_else(|| {
        Failure::generic(format_args!(
            "Property '{driver}.addr' doesn't take value '{addr}'"
        ))
    })
}

pub(crate) fn device_del(_: &mut Shared, arguments: &Object) -> Answer {
    let id = text(arguments, "id");
    with_status(move |_, status| {
        let mut disks = status.disks.iter();
        let mut netdevs = status.netdevs.iter();
        if disks.any(|disk| disk.added.as_ref() == Some(&id))
            || netdevs.any(|netdev| netdev.added.as_ref() == Some(&id))
        {
            return match status.state {
                VmState::Upgrading => migrating("device_del"),
                _ => Answer::order(Request::DeleteDevice { id }),
            };
        }
        if status.disks.iter().any(|disk| disk.id == id) {
            return Answer::failed(Failure::generic(format_args!(
                "Device '{id}' is the VM file's: it stays as long as the VM"
            )));
        }
        Answer::failed(Failure::of(
            Class::DeviceNotFound,
            format!("Device '{id}' not found"),
        ))
    })
}

pub(crate) fn block_resize(_: &mut Shared, arguments: &Object) -> Answer {
    let (device, node) = (text(arguments, "device"), text(arguments, "node-name"));
    let size = arguments.get("size").and_then(Value::as_i64);
    with_status(move |_, status| {
        let known = |name: &String| status.disks.iter().any(|disk| disk.id == *name);
        // As QEMU looks (`bdrv_lookup_bs`, block.c).
        let Some(disk) = [&device, &node].into_iter().find(|name| known(name)) else {
            return Answer::failed(Failure::generic(format_args!(
                "Cannot find device='{device}' nor node-name='{node}'"
            )));
        };
        match size.and_then(|size| u64::try_from(size).ok()) {
            None => Answer::failed(Failure::generic("Parameter 'size' expects a >0 size")),
            Some(bytes) => Answer::order(Request::Resize {
                disk: disk.clone(),
                bytes,
            }),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_written_as_qemu_writes_it() {
        for (addr, expected) in [("5", 5), ("0x5", 5), ("1f", 31), ("0x1f.0", 31)] {
            assert_eq!(slot("", addr).unwrap(), expected, "{addr}");
        }
        for addr in ["", "0x", "20", "5.1", "+5", "0x5.0.0", "five"] {
            assert!(slot("", addr).is_err(), "{addr}");
        }
    }
}
