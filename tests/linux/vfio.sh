#!/bin/sh
# Runs inside the SVM host, on busybox: a Linux guest has the host's edu device, whose DMA and interrupts go on while the worker is
# replaced. Prints a line `PASS ...` or `FAIL ...` for each check.
#
#   vfio.sh CPUS UPGRADES SLOWNESS
# shellcheck disable=SC3043,SC3045 # busybox has local, and ulimit -l
cpus=$1 upgrades=$2 slowness=$3
vm=linux console=/tmp/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

device=$(dirname "$(grep -l 0x11e8 /sys/bus/pci/devices/*/device)")
address=$(basename "$device")
megabytes=128

# describe POLICY
describe() {
    cat >/tmp/vm.toml <<VM
schema = 1
name = "$vm"
policy = "$1"
[cpus]
count = $cpus
[memory]
size = "${megabytes}M"
[boot]
kernel = "/guest/bzImage"
initrd = "/guest/initrd.cpio"
cmdline = "console=ttyS0 panic=-1 quiet"
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
[[vfio]]
id = "edu"
device = "$address"
VM
}
: >$console
dd if=/dev/zero of=/tmp/data.img bs=1M count=4 2>/dev/null
dd if=/edu of=/tmp/program.img bs=4096 conv=sync 2>/dev/null
sed "s|^paths = \[\]|paths = [\"$device\"]|" /policy.toml >/tmp/policy.toml

# is_refused CODE TEXT WHAT: the VM does not start, and says why.
is_refused() {
    local code=0
    baton run /tmp/vm.toml --detach --slow-host "$slowness" >/tmp/refused 2>&1 || code=$?
    if [ "$code" = "$1" ] && grep -q "$2" /tmp/refused; then
        pass "$3"
    else
        fail "$3: exit $code, $(cat /tmp/refused)"
    fi
}
describe default
is_refused 30 "does not grant the host's PCI device $address" "policy grants no device of the host by itself"
describe /tmp/policy.toml
ulimit -l 8192
is_refused 3 RLIMIT_MEMLOCK "a limit of locked memory below guest RAM is named"
# What policy, the limit and the driver are to keep apart, each by itself.
ulimit -l unlimited
is_refused 3 "its driver is none, not vfio-pci" "a device that is not VFIO's is named"
echo vfio-pci >"$device/driver_override"
echo "$address" >/sys/bus/pci/drivers_probe
is_refused 3 "load the module vfio_iommu_type1" "a host without VFIO's IOMMU driver is told of it"
modprobe vfio_iommu_type1

baton run /tmp/vm.toml --detach --slow-host "$slowness" || give_up "the VM does not start"

# The last round that the guest has reported as right.
rounds() { awk '/^edu [0-9]+ interrupts [0-9]+\r?$/ { round = $2 } END { print round + 0 }' "$console"; }
has_rounds() {
    ! grep -q EDU-ERROR "$console" || give_up "the guest's DMA: $(grep EDU-ERROR "$console")"
    [ "$(rounds)" -ge "$1" ]
}
patiently 400 "the guest drives its device" has_rounds 3
pass "a guest's DMA goes through the host's IOMMU, and MSIs come back"

# KiB that all processes have locked, as the kernel counts them; workers alone lock any here.
locked() { cat /proc/[0-9]*/status 2>/dev/null | awk '/^VmLck:/ { sum += $2 } END { print sum + 0 }'; }
worker() { baton status $vm --json | sed -n 's/.*"worker_pid": *\([0-9]*\).*/\1/p'; }
locked_by() { awk '/^VmLck:/ { print $2 }' "/proc/$1/status"; }
# The least that was locked, sampled while the worker is replaced.
watch_locked() {
    local least='' sum
    while ! [ -e /tmp/replaced ]; do
        sum=$(locked)
        [ "$least" ] && [ "$least" -le "$sum" ] || least=$sum
        echo "$least" >/tmp/least
        sleep 0.1
    done
}
ram=$((megabytes * 1024))
number=1
pinned=0
while [ $number -le "$upgrades" ]; do
    old=$(worker) round=$(rounds)
    before=$(locked_by "$old")
    rm -f /tmp/replaced /tmp/least
    watch_locked &
    replace $number
    : >/tmp/replaced
    wait
    new=$(worker)
    after=$(locked_by "$new") least=$(cat /tmp/least)
    patiently 240 "upgrade $number: DMA goes on" has_rounds $((round + 4))
    echo "  upgrade $number: $(took) rounds $round..$(rounds) locked KiB: $before by $old, then at least $least, then $after by $new"
    [ "$before" -ge $ram ] && [ "$least" -ge $ram ] && [ "$after" -ge $ram ] && [ "$old" != "$new" ] && pinned=$((pinned + 1))
    number=$((number + 1))
done
if [ $pinned = "$upgrades" ]; then
    pass "guest RAM stays pinned, and is the new worker's afterwards"
else
    fail "guest RAM stays pinned, and is the new worker's afterwards: $pinned of $upgrades"
fi
# An upgrade whose new worker stands still when it is to load what the old one has saved: the old one, which has given its
# addresses up by then, goes on. A new worker that was quicker has the guest; then it is tried again.
others() {
    for exe in /proc/[0-9]*/exe; do
        case $(readlink "$exe") in
            /memfd:*) pid=${exe#/proc/} && pid=${pid%/exe} && [ "$pid" = "$1" ] || echo "$pid" ;;
        esac
    done
}
state_of() {
    local line=''
    read -r line 2>/dev/null <"/proc/$1/stat"
    line=${line##*) }
    state=${line%% *}
}
rolled_back=0 try=1
while [ $rolled_back = 0 ] && [ $try -le 8 ]; do
    old=$(worker) round=$(rounds)
    before=$(others "$old")
    baton upgrade $vm --json >/tmp/upgrade.json 2>/tmp/upgrade.err &
    new=''
    until [ "$new" ] || ! kill -0 $! 2>/dev/null; do
        sleep 0.2
        for pid in $(others "$old"); do case " $before " in *" $pid "*) ;; *) new=$pid ;; esac; done
    done
    state=''
    until [ "$state" = T ] || ! kill -0 $! 2>/dev/null; do
        state_of "$old"
        sleep 0.01
    done
    kill -STOP "$new" 2>/dev/null
    wait $!
    code=$?
    # One that has the guest by then was stopped too late.
    kill -CONT "$new" 2>/dev/null
    [ $code = 10 ] && [ "$(worker)" = "$old" ] && rolled_back=1
    patiently 240 "DMA goes on after an upgrade that ended with $code" has_rounds $((round + 4))
    echo "  try $try: exit $code, rounds $round..$(rounds), $(locked_by "$(worker)") KiB locked by $(worker), which was $old"
    try=$((try + 1))
done
if [ $rolled_back = 1 ] && [ "$(locked_by "$old")" -ge $ram ]; then
    pass "an upgrade that is rolled back leaves DMA, interrupts and pinned memory as they were"
else
    fail "an upgrade that is rolled back: $(cat /tmp/upgrade.json /tmp/upgrade.err)"
fi
replace "after it"
round=$(rounds)
patiently 240 "DMA goes on in the next worker" has_rounds $((round + 4))
# Two transfers a round, one MSI each.
if awk '/^edu [0-9]+ interrupts [0-9]+\r?$/ { if ($2 != last + 1 || $4 + 0 != 2 * $2) wrong++; last = $2 } END { exit wrong || !last }' "$console"; then
    pass "every DMA is right and interrupts once, over $upgrades upgrades"
else
    fail "every DMA is right and interrupts once: $(grep '^edu' "$console" | tail -n 5)"
fi
is_confined
baton qmp $vm '{"execute": "migrate-set-parameters", "arguments": {"mode": "cpr-reboot"}}' >/dev/null
baton qmp $vm '{"execute": "query-migrate"}' >/tmp/qmp 2>&1
if grep -q "VFIO device only supports cpr-reboot for runstate suspended" /tmp/qmp; then
    pass "such a guest goes into no file"
else
    fail "such a guest goes into no file: $(cat /tmp/qmp)"
fi
if baton stop $vm >/tmp/stop 2>&1; then obeyed_its_button; else fail "ends by its power button: $(cat /tmp/stop)"; fi
patiently 60 "the VM's directory goes" is_gone
[ $failed = 0 ] || give_up "the scenario"
