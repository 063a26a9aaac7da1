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
memory=128M words=quiet
{
    disks /edu
    cat <<TABLES
[[vfio]]
id = "edu"
device = "$address"
TABLES
} >/tmp/tables
sed "s|^paths = \[\]|paths = [\"$device\"]|" /policy.toml >/tmp/granting.toml

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
describe </tmp/tables
is_refused 30 "does not grant the host's PCI device $address" "policy grants no device of the host by itself"
policy=granting.toml
describe </tmp/tables
ulimit -l 8192
is_refused 3 RLIMIT_MEMLOCK "a limit of locked memory below guest RAM is named"
# What policy, the limit and the driver are to keep apart, each by itself.
ulimit -l unlimited
is_refused 3 "its driver is none, not vfio-pci" "a device that is not VFIO's is named"
echo vfio-pci >"$device/driver_override"
echo "$address" >/sys/bus/pci/drivers_probe
is_refused 3 "load the module vfio_iommu_type1" "a host without VFIO's IOMMU driver is told of it"
modprobe vfio_iommu_type1

start

# The last round that the guest has reported as right.
rounds() { awk '/^edu [0-9]+ interrupts [0-9]+\r?$/ { round = $2 } END { print round + 0 }' "$console"; }
has_rounds() {
    ! grep -q EDU-ERROR "$console" || give_up "the guest's DMA: $(grep EDU-ERROR "$console")"
    [ "$(rounds)" -ge "$1" ]
}
patiently 400 "the guest drives its device" has_rounds 3
pass "a guest's DMA goes through the host's IOMMU, and MSIs come back"

# KiB that all processes have locked, as the kernel counts them; workers alone lock any here. In the order in which they began: what
# one has no more when it is looked at, its successor has already.
locked() {
    ls /proc | grep '^[0-9]' | sort -n | sed 's,.*,/proc/&/status,' | xargs cat 2>/dev/null |
        awk '/^VmLck:/ { sum += $2 } END { print sum + 0 }'
}
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
ram=$((${memory%M} * 1024))
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
# addresses up by then, goes on.
hold() { qmp migrate-set-capabilities "{\"capabilities\": [{\"capability\": \"pause-before-switchover\", \"state\": $1}]}"; }
# executing: the processes that execute what the broker has sealed, in a line: workers, and the one that serves QMP.
executing() {
    local exe
    for exe in /proc/[0-9]*/exe; do
        case $(readlink "$exe") in /memfd:*) echo "$exe" | cut -d / -f 3 ;; esac
    done | xargs
}
# new_worker: the one that was not `there` before.
new_worker() {
    local pid
    for pid in $(executing); do
        case " $there " in *" $pid "*) ;; *) echo "$pid" ;; esac
    done
}
stands_still() { grep -q '^State:.T (stopped)' "/proc/$new/status"; }
old=$(worker) round=$(rounds)
before=$(locked_by "$old")
hold true
qmp migrate-set-parameters '{"mode": "cpr-transfer"}'
there=$(executing)
qmp migrate
patiently 120 "the upgrade waits before its pause" is_migration pre-switchover
new=$(new_worker)
kill -STOP "$new" || give_up "no new worker, or more than one: $(executing) instead of $there"
patiently 10 "the new worker stands still" stands_still
qmp migrate-continue '{"state": "pre-switchover"}'
patiently 120 "the upgrade fails" is_migration failed
why=$(sed -n 's/.*"error-desc": *"\([^"]*\)".*/\1/p' /tmp/qmp)
patiently 240 "DMA goes on after it" has_rounds $((round + 4))
after=$(locked_by "$old")
echo "  $why: rounds $round..$(rounds), locked KiB: $before, then $after by $old"
# S8 comes after the addresses were given up (docs/architecture.md).
if [ "${why#S8}" != "$why" ] && [ "$(worker)" = "$old" ] && [ "$after" = "$before" ] && [ "$before" -ge $ram ] && [ "$(executing)" = "$there" ]; then
    pass "an upgrade that is rolled back leaves DMA, interrupts and pinned memory as they were"
else
    fail "an upgrade that is rolled back ($why): $before KiB by $old, then $after, and the worker is $(worker); there are $(executing) instead of $there"
fi
hold false
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
qmp migrate-set-parameters '{"mode": "cpr-reboot"}'
qmp query-migrate
if grep -q "VFIO device only supports cpr-reboot for runstate suspended" /tmp/qmp; then
    pass "such a guest goes into no file"
else
    fail "such a guest goes into no file: $(cat /tmp/qmp)"
fi
end_by_its_button
[ $failed = 0 ] || give_up "the scenario"
