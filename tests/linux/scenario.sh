#!/bin/sh
# Runs inside the SVM host, on busybox: boots /guest under Baton, replaces its worker again and again while it counts, reboots
# it in between, and ends it with its power button. Prints a line `PASS ...` or `FAIL ...` for each promise.
#
#   scenario.sh KERNEL CPUS UPGRADES SLOWNESS
#
# KERNEL is a file of /guest: vmlinux is entered by PVH, bzImage by the Linux boot protocol.
cpus=$2 upgrades=$3 slowness=$4
vm=linux console=/tmp/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh
kernel=$1

# What the worker's threads do: twice, so that those which run and those which wait can be told apart.
threads() {
    for thread in /proc/"$1"/task/*; do
        echo "$(cat "$thread/comm") $(cut -d' ' -f3,14,15 "$thread/stat") $(cat "$thread/syscall")"
    done
    sleep 1
}

# What a scenario that cannot go on says of the worker.
aftermath() {
    running=$(sed -n 's/.*"worker_pid": *\([0-9]*\).*/\1/p' /run/baton/$vm/state.json 2>/dev/null)
    if [ "$running" ]; then
        echo "--- the worker's threads: state, user and system time, system call"
        threads "$running" && threads "$running"
        echo "--- KVM's counts of the VM"
        grep -s . /sys/kernel/debug/kvm/*/exits /sys/kernel/debug/kvm/*/io_exits /sys/kernel/debug/kvm/*/halt_exits
    fi
}

disks /disk "$cpus" | describe
start
patiently 240 "boot 1 reaches user space" has_ticks 1 5
pass "boots to user space"
cgroup=$(echo /sys/fs/cgroup/baton/$vm-*)
worker=$(worker)
if grep -qx "$worker" "$cgroup/cgroup.procs" && grep -qx "0::${cgroup#/sys/fs/cgroup}" "/proc/$worker/cgroup"; then
    pass "the worker is in the VM's cgroup"
else
    fail "the worker is in the VM's cgroup: $worker is not in $cgroup"
fi

blocks() { /disk check /tmp/data.img "$1" >/tmp/blocks 2>&1; }
patiently 120 "the guest finds its disk and writes" blocks 50
pass "finds its disks without being told"

number=1
while [ $number -le "$upgrades" ]; do
    upgrade 1 $number
    number=$((number + 1))
done
pass "$upgrades upgrades are committed, and the guest counts on after each"
is_confined
clock_is_the_hosts

order reboot
patiently 240 "boot 2 reaches user space" has_ticks 2 3
pass "reboots in a worker that came by an upgrade"
upgrade 2 $number
number=$((number + 1))
order reboot
patiently 240 "boot 3 reaches user space" has_ticks 3 3
pass "reboots after another upgrade"
upgrade 3 $number

end_by_its_button
if [ -e "$cgroup" ]; then
    fail "the cgroup goes: $(cat "$cgroup/cgroup.procs")"
else
    pass "nothing of it is left"
fi
last=$(tail -n 1 /run/baton/.audit/$vm.jsonl)
case $last in
    *'"event_code":"vm-end"'*) ;;
    *) fail "the audit log ends with the VM: $last" ;;
esac
if verdict=$(/disk check /tmp/data.img $((50 + upgrades * 10)) 2>&1); then
    pass "the disk: ${verdict#ok: }"
else
    fail "the disk: $verdict"
fi
if verdict=$(/console "$console" "$cpus" 3 $((upgrades * 3)) 2>&1); then
    pass "the console: ${verdict#ok: }"
else
    fail "the console: $verdict"
    line=${verdict#line }
    line=${line%%:*}
    echo "--- the console there"
    sed -n "$((line > 10 ? line - 10 : 1)),$((line + 40))p" "$console"
fi
[ $failed = 0 ] || give_up "the scenario"
