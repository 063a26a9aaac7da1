#!/bin/sh
# Runs inside the SVM host: boots a whole Debian under Baton, logs in on its console and over the network, and replaces its
# worker again and again while disk, network, vsock, console, processors and memory are busy. Prints a line `PASS ...` or
# `FAIL ...` for each promise.
#
#   server.sh CPUS UPGRADES SLOWNESS
#
# /dev/vda is the guest's root file system. /dev/vdb, the same image, is the other end: a Debian that has ssh and fsck.
# /server has the guest's kernel and initramfs.
cpus=$1 upgrades=$2 slowness=$3
vm=server console=/tmp/console.log guest=10.99.0.2

# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

shows() { grep -q "$1" "$console"; }
debian() { chroot /debian "$@"; }
in_guest() { debian ssh -o StrictHostKeyChecking=no -o LogLevel=ERROR -o ConnectTimeout=120 root@$guest "$@"; }
# The highest number of the lines `WORD N` of a file.
highest() { awk -v word="$1" '$1 == word { n = $2 } END { print n + 0 }' "$2"; }
beyond() { [ "$(highest "$1" "$2")" -gt "$3" ]; }
# in_order WORD FILE: the lines `WORD N` have every number from 1 on once.
in_order() { tr -d '\r' <"$2" | awk -v word="$1" '$1 == word && $2 != ++n { print "line " NR ": " $2 " instead of " n; exit 1 } END { if (!n) exit 1 }'; }

mkdir -p /debian
mount -o ro,noload /dev/vdb /debian || give_up "the other end's file system is not to be had"
for directory in proc dev tmp; do mount -o bind /$directory /debian/$directory; done
mount -t tmpfs tmpfs /debian/run

cat >/tmp/vm.toml <<VM
schema = 1
name = "$vm"
[cpus]
count = $cpus
[memory]
size = "512M"
[boot]
kernel = "/server/bzImage"
initrd = "/server/initrd.img"
cmdline = "root=/dev/vda rw console=ttyS0 panic=-1"
[console]
kind = "file"
path = "$console"
[[disk]]
id = "root"
path = "/dev/vda"
queues = $cpus
[[disk]]
id = "data"
path = "/tmp/data.img"
[[net]]
id = "net0"
tap = "tap0"
mac = "52:54:00:00:00:01"
[vsock]
cid = 3
socket = "/tmp/vsock"
VM
: >$console
dd if=/dev/zero of=/tmp/data.img bs=1M count=4 2>/dev/null

baton run /tmp/vm.toml --detach --slow-host "$slowness" || give_up "the VM does not start"
ip address add 10.99.0.1/24 dev tap0 || give_up "the broker has made no tap"
patiently 600 "systemd's login" shows '^guest login: '
pass "Debian boots from its disk to a login"
patiently 300 "the guest's services" shows 'traffic: serving on'
patiently 120 "the network" ping -c 1 -W 5 $guest >/dev/null
[ "$(in_guest nproc)" = "$cpus" ] || give_up "ssh: the guest has $(in_guest nproc) processors"
pass "ssh reaches it over the tap, and it has $cpus processors"
# An emulated host gets fewer pings: one that is as fast as its hardware, 1,000 a second.
pace=$(((slowness + 1) / 2))
# At boot Linux may well choose another one; from now on it has no reason to.
clocksource=/sys/devices/system/clocksource/clocksource0/current_clocksource
clock=$(in_guest cat $clocksource)

# A session on the console, one over ssh, streams both ways on TCP and vsock, and pings: all through every upgrade.
order root
patiently 120 "a shell on the console" shows 'root@guest:'
# A kernel's message in the middle of a line is none of ours; all of them are looked at in the end.
order 'dmesg -n 1; echo; n=0; while [ ! -e /tmp/stop ]; do echo line $((n += 1)); sleep 0.2; done'
rm -f /tmp/stop
in_guest 'n=0; while [ ! -e /tmp/stop ]; do echo far $((n += 1)); sleep 0.2; done' >/tmp/ssh.log 2>&1 &
session=$!
/traffic stream $guest:7000 /tmp/stop >/tmp/tcp.log 2>&1 &
tcp=$!
/traffic stream /tmp/vsock /tmp/stop >/tmp/vsock.log 2>&1 &
vsock=$!
/traffic echo $guest:7001 /tmp/stop $pace >/tmp/echo.log 2>&1 &
echo=$!
patiently 120 "the console's session" beyond line $console 3
patiently 120 "the session over ssh" beyond far /tmp/ssh.log 3

number=1
while [ $number -le "$upgrades" ]; do
    replace $number
    lines=$(highest line $console) far=$(highest far /tmp/ssh.log)
    [ $((number % 10)) -ne 0 ] ||
        echo "  upgrade $number: $(took) console line $lines ssh line $far"
    patiently 120 "upgrade $number: the console goes on" beyond line $console "$lines"
    patiently 120 "upgrade $number: ssh goes on" beyond far /tmp/ssh.log "$far"
    number=$((number + 1))
done
pass "$upgrades upgrades are committed, and the console and ssh go on after each"

touch /tmp/stop
for stream in "tcp $tcp" "vsock $vsock" "echo $echo"; do
    name=${stream% *}
    if wait "${stream#* }"; then
        pass "$name: $(sed 's/^ok: //' /tmp/$name.log)"
    else
        fail "$name: $(cat /tmp/$name.log)"
    fi
done
in_guest touch /tmp/stop || fail "a new session over ssh, at the end"
wait $session || fail "the session over ssh ends well: $(tail -n 1 /tmp/ssh.log)"
for lines in "far /tmp/ssh.log" "line $console"; do
    # shellcheck disable=SC2086 # two words
    if wrong=$(in_order $lines); then pass "$lines: $(highest $lines) lines, each once and in order"; else fail "$lines: $wrong"; fi
done
if [ "$(in_guest cat $clocksource)" = "$clock" ]; then
    pass "the clocksource is $clock, before and after"
else
    fail "the clocksource was $clock and is $(in_guest cat $clocksource)"
fi
in_guest 'journalctl --boot --no-pager --output=cat --dmesg' >/tmp/dmesg
if grep -E 'Oops|BUG:|WARNING:|Call Trace|soft lockup|hard LOCKUP|rcu: INFO|blocked for more than|timekeeping watchdog|I/O error|nobody cared|tx timeout|EXT4-fs error' /tmp/dmesg; then
    fail "the guest's kernel is content"
else
    pass "the guest's kernel is content ($(wc -l </tmp/dmesg) lines)"
fi
if grep 'traffic: WRONG' $console; then fail "memory is what was written"; else pass "memory is what was written"; fi
if states=$(in_guest systemctl is-system-running); then pass "systemd: $states"; else fail "systemd: $states: $(in_guest systemctl --failed)"; fi
is_confined

# All of systemd's services end first; `baton stop` does not wait for as long as that takes here.
baton stop $vm >/tmp/stop.log 2>&1
patiently 600 "its end by its power button: $(cat /tmp/stop.log)" is_gone
obeyed_its_button
if checked=$(debian fsck.ext4 -f -n /dev/vda 2>&1); then
    pass "its file system is clean: $(echo "$checked" | tail -n 1)"
else
    fail "its file system is clean: $checked"
fi
if verdict=$(/disk check /tmp/data.img "$upgrades" 2>&1); then pass "the disk: ${verdict#ok: }"; else fail "the disk: $verdict"; fi
[ $failed = 0 ] || give_up "the scenario"
