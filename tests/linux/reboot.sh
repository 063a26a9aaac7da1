#!/bin/sh
# Runs inside the SVM host, on busybox, once before and once after the host boots: a Linux guest goes into a file on a disk that
# outlives the host, and out of it again (mode cpr-reboot); where the host has persistent memory, the guest's memory is in that, and
# stays there. Prints a line `PASS ...` or `FAIL ...` for each promise.
#
#   reboot.sh save|load CPUS SLOWNESS
#
# /dev/vda is that disk; /guest has the guest's kernel and initramfs.
act=$1 cpus=$2 slowness=$3
vm=linux console=/var/lib/baton/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh
place=/var/lib/baton
state=$place/$vm.state

mkdir -p $place
mount /dev/vda $place || give_up "the disk that outlives the host cannot be mounted"
if [ -e /dev/pmem0 ]; then
    ram=/var/lib/ram/$vm policy=granting.toml
    mkdir /var/lib/ram
    mount -o dax=always /dev/pmem0 /var/lib/ram || give_up "the persistent memory cannot be mounted"
    sed 's|"/dev/hugepages/\*\*"|&, "/var/lib/ram/**"|' /policy.toml >$place/$policy
fi

# is_unmounted: nobody holds what is to outlive the host.
is_unmounted() {
    umount $place || give_up "the disk is still in use"
    [ -z "$ram" ] || umount /var/lib/ram || give_up "the persistent memory is still in use"
}

if [ "$act" = save ]; then
    disks /disk | describe
    start
    patiently 240 "the guest reaches user space" has_ticks 1 20
    upgrade 1 1
    cp /proc/sys/kernel/random/boot_id $place/boot_id
    qmp migrate-set-parameters '{"mode": "cpr-reboot"}'
    qmp migrate "{\"uri\": \"file:$state\"}"
    patiently 120 "the guest goes into its file" is_migration completed
    qmp quit
    patiently 60 "the VM's directory goes" is_gone
    size=$(stat -c %s $state)
    is_unmounted
    if [ -z "$ram" ]; then
        pass "the guest goes into its file"
    elif [ "$size" -lt 1000000 ]; then
        pass "the guest goes into its file of $size bytes, and its memory stays where it is"
    else
        fail "its memory stays where it is: the file has $size bytes"
    fi
    exit "$failed"
fi

if [ "$(cat $place/boot_id)" = "$(cat /proc/sys/kernel/random/boot_id)" ]; then give_up "the host has not booted"; fi
last=$(ticks 1)
before=$(wc -l <$console)
uptime=$(cut -d. -f1 /proc/uptime)
baton run $place/vm.toml --detach --incoming "file:$state" --slow-host "$slowness" || give_up "the guest does not come out of its file"
patiently 120 "the guest counts on" has_ticks 1 $((last + 20))
pass "the guest counts on in the next boot of its host, which was up for $uptime s: ticks $last..$(ticks 1)"
clock_is_the_hosts
# Its clocks have gone forward by as long as it was away, once, and never back.
tail -n +$((before + 1)) $console | tr -d '\r' >/tmp/since
sed -n 's/^CLOCK-ERROR //p' /tmp/since | head -n 20 | sort | uniq -c | sort -rn | head -n 6
if grep -q '^CLOCK-ERROR .*back' /tmp/since; then
    fail "no clock goes back: $(grep '^CLOCK-ERROR .*back' /tmp/since | head -n 3)"
else
    pass "no clock goes back"
fi
jumps=$(grep -c '^CLOCK-ERROR monotonic jumped' /tmp/since)
if [ "$jumps" = 1 ]; then
    pass "its clocks went forward once: $(sed -n 's/^CLOCK-ERROR //p' /tmp/since | xargs)"
else
    fail "its clocks went forward once, not $jumps times"
fi
for number in 1 2 3; do upgrade 1 $number; done
pass "its worker is replaced there, too"
is_confined
end_by_its_button
if wrong=$(tr -d '\r' <$console | awk '/^tick [0-9]+ / && $2 != ++n { print $2 " instead of " n; exit 1 }'); then
    pass "every tick once and in order: $(ticks 1)"
else
    fail "every tick once and in order: $wrong"
fi
# Up to its button: a kernel that goes down takes the disk from under a program that still writes.
sed '/guest: power button/,$d' $console >/tmp/up
if grep -E -B 5 -A 5 'Oops|BUG:|WARNING:|Call Trace|soft lockup|hard LOCKUP|rcu: INFO|blocked for more than|timekeeping watchdog|I/O error|nobody cared' /tmp/up; then
    fail "the guest's kernel is content"
else
    pass "the guest's kernel is content"
fi
if verdict=$(/disk check $place/data.img 50 2>&1); then pass "the disk: ${verdict#ok: }"; else fail "the disk: $verdict"; fi
[ $failed = 0 ] || give_up "the scenario"
is_unmounted
