#!/bin/sh
# Runs inside the SVM host, on busybox, once before and once after the host boots: a Linux guest goes into a file on a disk that
# outlives the host, and out of it again (mode cpr-reboot). Prints a line `PASS ...` or `FAIL ...` for each promise.
#
#   reboot.sh save|load CPUS SLOWNESS
#
# /dev/vda is that disk; /guest has the guest's kernel and initramfs.
act=$1 cpus=$2 slowness=$3
place=/var/lib/baton
vm=linux console=$place/console.log
state=$place/$vm.state
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

mkdir -p $place
mount /dev/vda $place || give_up "the disk that outlives the host cannot be mounted"

if [ "$act" = save ]; then
    cat >$place/vm.toml <<VM
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
path = "$place/data.img"
[[disk]]
id = "program"
path = "$place/program.img"
readonly = true
VM
    : >$console
    dd if=/dev/zero of=$place/data.img bs=1M count=4 2>/dev/null
    dd if=/disk of=$place/program.img bs=4096 conv=sync 2>/dev/null
    baton run $place/vm.toml --detach --slow-host "$slowness" || give_up "the VM does not start"
    patiently 240 "the guest reaches user space" has_ticks 1 20
    upgrade 1 1
    cp /proc/sys/kernel/random/boot_id $place/boot_id
    baton qmp $vm '{"execute": "migrate-set-parameters", "arguments": {"mode": "cpr-reboot"}}' >/dev/null || give_up "the mode is refused"
    baton qmp $vm "{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"file:$state\"}}" >/dev/null || give_up "migrate is refused"
    # shellcheck disable=SC2317 # for `patiently`
    is_saved() { baton qmp "$vm" query-migrate | grep -q '"status": *"completed"'; }
    patiently 120 "the guest goes into its file" is_saved
    baton qmp $vm quit >/dev/null
    patiently 60 "the VM's directory goes" is_gone
    umount $place || give_up "the disk is still in use"
    pass "the guest goes into its file"
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
if baton stop $vm >/tmp/stop 2>&1; then obeyed_its_button; else fail "ends by its power button: $(cat /tmp/stop)"; fi
patiently 60 "the VM's directory goes" is_gone
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
umount $place || give_up "nothing holds the disk"
