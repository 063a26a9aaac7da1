#!/bin/sh
# Runs inside the SVM host, on busybox: a Linux guest gets a disk while it runs, sees its size change, and lets it go. Its kernel
# speaks of each in the midst of what its ticker says, so nobody judges this console. Prints a line `PASS ...` or `FAIL ...`.
#
#   hotplug.sh CPUS SLOWNESS
cpus=$1 slowness=$2
vm=linux console=/tmp/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

disks /disk | describe
start
patiently 240 "the guest reaches user space" has_ticks 1 5

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
end_by_its_button
[ $failed = 0 ] || give_up "the scenario"
