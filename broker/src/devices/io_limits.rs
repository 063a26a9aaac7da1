//! Whether a device is limited as policy demands. What a VM file says of it is what it gets: nothing is lowered in silence.

use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_policy::Limit;
use baton_policy::Policy;

use crate::refusal::Result;
use crate::refusal::refused;

/// Asks policy whether the guest may have a device with these limits.
pub(crate) fn check(policy: &Policy, config: &VirtioConfig) -> Result<()> {
    let io = &policy.io;
    let (what, limits, most) = match &config.device {
        VirtioKind::Block(disk) => {
            let what = format!("disk {}", disk.serial);
            (what, disk.limits, [io.disk_bytes, io.disk_operations])
        }
        VirtioKind::Net(net) => {
            let bytes = net.mac.map(|byte| format!("{byte:02x}"));
            let what = format!("network interface {}", bytes.join(":"));
            (what, net.limits, [io.net_bytes, io.net_operations])
        }
        _ => return Ok(()),
    };
    let DeviceLimits { bytes, operations } = limits;
    for (name, own, most) in [
        ("bytes", bytes, most[0]),
        ("operations", operations, most[1]),
    ] {
        let own = own.map(|limit| limit.per_second);
        if let (false, Limit::At(most)) = (most.covers(own), most) {
            let own = own.map_or_else(
                || "not limited".to_owned(),
                |own| format!("limited to {own}"),
            );
            return Err(refused(
                format_args!(
                    "policy {} lets {what} have {most} {name} a second, and it is {own}",
                    policy.name
                ),
                format_args!(
                    "give it limit.{name} in the VM file; what comes by QMP has no limit and cannot be had under this policy"
                ),
            ));
        }
    }
    Ok(())
}
