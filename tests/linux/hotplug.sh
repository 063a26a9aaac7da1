#!/bin/sh
# Runs inside the SVM host, on busybox: a Linux guest gets a disk while it runs, sees its size change, and lets it go. Its kernel
# speaks of each in the midst of what its ticker says, so nobody judges this console. Prints a line `PASS ...` or `FAIL ...`.
#
#   hotplug.sh CPUS SLOWNESS
cpus=$1 slowness=$2
vm=linux console=/tmp/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

cat >/tmp/vm.toml <<VM
schema = 1
name = "$vm"
[cpus]
count = $cpus
[memory]
size = "256M"
[boot]
kernel = "/guest/bzImage"
initrd = "/guest/initrd.cpio"
cmdline = "console=ttyS0 panic=-1"
[console]
kind = "file"
path = "$console"
[[disk]]
id = "data"
path = "/tmp/data.img"
[[disk]]
id = "program"
path = "/tmp/program.img"
readonly = true
VM
: >$console
dd if=/dev/zero of=/tmp/data.img bs=1M count=4 2>/dev/null
dd if=/disk of=/tmp/program.img bs=4096 conv=sync 2>/dev/null
baton run /tmp/vm.toml --detach --slow-host "$slowness" || give_up "the VM does not start"
patiently 240 "the guest reaches user space" has_ticks 1 5

# qmp COMMAND [ARGUMENTS]: what it returns is in /tmp/qmp.
qmp() {
    baton qmp $vm "{\"execute\": \"$1\"${2:+, \"arguments\": $2}}" >/tmp/qmp 2>&1 || give_up "$1: $(cat /tmp/qmp)"
}
shows() { grep -q "$1" "$console"; }
has_let_go() { qmp query-block && ! grep -q '"qdev"' /tmp/qmp; }

dd if=/dev/zero of=/tmp/spare.img bs=1M count=4 2>/dev/null
qmp blockdev-add '{"driver": "file", "node-name": "spare", "filename": "/tmp/spare.img"}'
qmp device_add '{"driver": "virtio-blk-pci", "id": "late", "drive": "spare", "num-queues": 2}'
patiently 240 "the guest finds a disk that comes" shows '\[vdc\] 8192 512-byte'
upgrade 1 1
qmp block_resize '{"node-name": "spare", "size": 8388608}'
patiently 240 "the guest sees its size change" shows '\[vdc\] new size: 16384 512-byte'
qmp device_del '{"id": "late"}'
patiently 240 "the guest lets it go" has_let_go
qmp blockdev-del '{"node-name": "spare"}'
pass "a disk comes, changes its size and goes while the guest runs"
is_confined
if baton stop $vm >/tmp/stop 2>&1; then obeyed_its_button; else fail "ends by its power button: $(cat /tmp/stop)"; fi
patiently 60 "the VM's directory goes" is_gone
[ $failed = 0 ] || give_up "the scenario"
