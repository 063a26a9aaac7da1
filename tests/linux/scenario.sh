#!/bin/sh
# Runs inside the SVM host, on busybox: boots /guest under Baton, replaces its worker again and again while it counts, reboots
# it in between, and ends it with its power button. Prints a line `PASS ...` or `FAIL ...` for each promise.
#
#   scenario.sh KERNEL CPUS UPGRADES SLOWNESS
#
# KERNEL is a file of /guest (vmlinux is entered by PVH, bzImage by the Linux boot protocol). SLOWNESS multiplies every
# deadline: the host is emulated.
# shellcheck disable=SC3043 # busybox has local
kernel=$1 cpus=$2 upgrades=$3 slowness=$4
vm=linux console=/tmp/console.log failed=0

pass() { echo "PASS $*"; }
fail() {
    echo "FAIL $*"
    failed=1
}

# What the worker's threads do: twice, so that those which run and those which wait can be told apart.
threads() {
    for thread in /proc/"$1"/task/*; do
        echo "$(cat "$thread/comm") $(cut -d' ' -f3,14,15 "$thread/stat") $(cat "$thread/syscall")"
    done
    sleep 1
}

# Ends the scenario: what follows could not hold.
give_up() {
    fail "$*"
    running=$(sed -n 's/.*"worker_pid": *\([0-9]*\).*/\1/p' /run/baton/$vm/state.json 2>/dev/null)
    if [ "$running" ]; then
        echo "--- the worker's threads: state, user and system time, system call"
        threads "$running" && threads "$running"
        echo "--- KVM's counts of the VM"
        grep -s . /sys/kernel/debug/kvm/*/exits /sys/kernel/debug/kvm/*/io_exits /sys/kernel/debug/kvm/*/halt_exits
    fi
    echo "--- the console's end" && tail -n 60 "$console"
    echo "--- the audit log's end" && tail -n 30 /run/baton/.audit/$vm.jsonl
    exit 1
}

# patiently SECONDS WHAT TEST...: repeats the test until it holds.
patiently() {
    local seconds="$1" what="$2" started
    shift 2
    started=$(date +%s)
    until "$@"; do
        [ $(($(date +%s) - started)) -lt "$seconds" ] || give_up "$what: not within $seconds s"
        sleep 0.2
    done
}

# The ticks of boot N, as a number; 0 before it. Only whole lines count.
ticks() {
    awk -v boot="$1" '/^guest: up, / { n++ } n == boot && /^tick [0-9]+ .*\r$/ { tick = $2 } END { print tick + 0 }' $console
}
has_ticks() { [ "$(ticks "$1")" -ge "$2" ]; }
is_gone() { ! [ -e /run/baton/$vm ]; }

# order COMMAND: types a line for the ticker. A console stays until it is left: on a busy emulator 3 s were seen to end it
# before it had typed.
order() { echo "$1" | timeout 15 baton console $vm >/dev/null; }

# upgrade BOOT NUMBER: replaces the worker, and sees the guest go on.
upgrade() {
    local before after
    before=$(ticks "$1")
    baton upgrade $vm --json >/tmp/upgrade.json 2>/tmp/upgrade.err || {
        cat /tmp/upgrade.json /tmp/upgrade.err
        give_up "upgrade $2: exit status not 0"
    }
    grep -q '"outcome": *"committed"' /tmp/upgrade.json || give_up "upgrade $2: $(cat /tmp/upgrade.json)"
    after=$(ticks "$1")
    patiently 120 "upgrade $2: the guest counts on" has_ticks "$1" $((after + 3))
    echo "  upgrade $2: $(grep -o '"\(blackout_us\|total_ms\)": *[0-9]*' /tmp/upgrade.json | tr -d '"' | xargs) ticks $before..$(ticks "$1")"
}

cat >/tmp/vm.toml <<VM
schema = 1
name = "$vm"
[cpus]
count = $cpus
[memory]
size = "256M"
[boot]
kernel = "/guest/$kernel"
initrd = "/guest/initrd.cpio"
cmdline = "console=ttyS0 panic=-1"
[console]
kind = "file"
path = "$console"
[[disk]]
id = "data"
path = "/tmp/data.img"
queues = $cpus
[[disk]]
id = "program"
path = "/tmp/program.img"
readonly = true
VM
: >$console
dd if=/dev/zero of=/tmp/data.img bs=1M count=4 2>/dev/null
dd if=/disk of=/tmp/program.img bs=4096 conv=sync 2>/dev/null

baton run /tmp/vm.toml --detach --slow-host "$slowness" || give_up "the VM does not start"
patiently 240 "boot 1 reaches user space" has_ticks 1 5
pass "boots to user space"
cgroup=$(echo /sys/fs/cgroup/baton/$vm-*)
worker=$(sed -n 's/.*"worker_pid": *\([0-9]*\).*/\1/p' /run/baton/$vm/state.json)
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
if baton audit $vm >/tmp/audit 2>&1; then
    pass "the last worker is proven confined"
else
    fail "the last worker is proven confined: $(cat /tmp/audit)"
fi
# The console's own delay and the hardware clock's whole seconds are in this, too.
here=$(date +%s)
there=$(awk '/^tick .*\r$/ { clock = $6 } END { print int(clock) }' $console)
if [ $((here - there)) -ge -3 ] && [ $((here - there)) -le 5 ]; then
    pass "the guest's clock is the host's"
else
    fail "the guest's clock is the host's: here $here, there $there"
fi

order reboot
patiently 240 "boot 2 reaches user space" has_ticks 2 3
pass "reboots in a worker that came by an upgrade"
upgrade 2 $number
number=$((number + 1))
order reboot
patiently 240 "boot 3 reaches user space" has_ticks 3 3
pass "reboots after another upgrade"
upgrade 3 $number

if baton stop $vm >/tmp/stop 2>&1; then
    pass "ends by its power button"
else
    fail "ends by its power button: $(cat /tmp/stop)"
fi
patiently 60 "the VM's directory goes" is_gone
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
if grep -q '"event_code":"power-off-timeout"' /run/baton/.audit/$vm.jsonl; then
    fail "the guest obeys its power button: the broker had to end it"
fi
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
