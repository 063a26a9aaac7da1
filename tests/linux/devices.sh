#!/bin/sh
# Runs inside the SVM host, on busybox: a stock Linux guest uses the devices that have no scenario of their own, before and after its
# worker is replaced. Prints a line `PASS ...` or `FAIL ...` for each.
#
#   devices.sh CPUS UPGRADES SLOWNESS
cpus=$1 upgrades=$2 slowness=$3
vm=linux console=/tmp/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

# ask COMMAND: what the guest's shell prints, in `said`, on one line.
asked=0
ask() {
    asked=$((asked + 1))
    order "sh echo answer $asked \$($1) end"
    patiently 120 "the guest's answer to: $1" answers $asked
    said=$(tr -d '\r' <"$console" | sed -n "s/^.*answer $asked \(.*\)end\$/\1/p" | sed 's/ *$//')
}
answers() { tr -d '\r' <"$console" | grep -q "answer $1 .*end\$"; }
# expect WHAT COMMAND ANSWER
expect() {
    ask "$2"
    if [ "$said" = "$3" ]; then pass "$1"; else fail "$1: $said, not $3"; fi
}
# within WHAT NUMBER LEAST MOST
within() {
    if [ "$2" -ge "$3" ] && [ "$2" -le "$4" ]; then pass "$1 ($2)"; else fail "$1: $2, not $3 to $4"; fi
}
blocks() { stat -c %b /tmp/discard.img; }
status_is() { baton status $vm | grep -q "$1"; }

# 8 MiB of ones.
tr '\0' '\377' </dev/zero | dd of=/tmp/discard.img bs=1M count=8 iflag=fullblock 2>/dev/null
describe <<TABLES
[[disk]]
id = "holes"
path = "/tmp/discard.img"
[[net]]
id = "net0"
tap = "tap0"
mac = "52:54:00:00:00:01"
queues = 2
TABLES
sed -i 's/^size = .*/&\nballoon = true/' /tmp/vm.toml
start
patiently 240 "the guest reaches user space" has_ticks 1 5
# Its kernel's messages would fall into what it answers.
order 'sh dmesg -n 1'

address() { ip address add "10.$1.0.1/24" dev "$2" && order "sh ip link set $3 up; ip address add 10.$1.0.2/24 dev $3"; }
reaches() { ping -c 1 -W 5 "10.$1.0.2" >/dev/null; }
address 97 tap0 eth0
patiently 120 "the guest answers on eth0" reaches 97

# round NAME: everything that can be asked again.
round() {
    expect "$1: eth0 has two pairs of queues" 'ls /sys/class/net/eth0/queues' 'rx-0 rx-1 tx-0 tx-1'
    patiently 120 "$1: eth0" reaches 97
    expect "$1: the kernel draws from the entropy device" 'cat /sys/class/misc/hw_random/rng_current' virtio_rng.0
    expect "$1: it gives what is asked for" 'dd if=/dev/hwrng bs=512 count=4 iflag=fullblock 2>/dev/null | wc -c' 2048
    # Of a machine that is the one that it was, nobody's random numbers are drawn anew.
    expect "$1: the machine is the same" 'dmesg | grep -c "virtual machine fork"' 0
    balloon 251658240
    expect "$1: the guest has let 16 MiB go" "$pages" 4096
    [ "$2" != while ] || upgrade 1 while
    balloon 268435456
    expect "$1: the guest has them again" "$pages" 0
}
# What the guest's balloon holds, in pages.
# shellcheck disable=SC2016 # the guest's awk expands it
pages='awk "/^balloon_inflate/ { n += \$2 } /^balloon_deflate/ { n -= \$2 } END { print n }" /proc/vmstat'
balloon() {
    qmp balloon "{\"value\": $1}"
    patiently 240 "the balloon leaves $1 bytes" left "$1"
}
# A question now and then: the host has one processor, and the guest needs it.
left() { sleep 2 && qmp query-balloon && grep -q "\"actual\": *$1\b" /tmp/qmp; }

expect "the generation id has its driver" 'ls /sys/bus/platform/drivers/vmgenid | grep -c QEMUVGID' 1
round before once
number=1
while [ $number -le "$upgrades" ]; do
    upgrade 1 $number
    number=$((number + 1))
done
round "after $upgrades upgrades" while

# The first half is let go, then the rest; what is let go reads as zeroes.
expect "the guest may discard" 'cat /sys/block/vda/queue/discard_max_bytes | grep -c -v -x 0' 1
within "the disk is whole, in sectors" "$(blocks)" 16384 16384
expect "the guest discards half of it" 'blkdiscard -l 4194304 /dev/vda && echo done' 'done'
within "half of it is let go" "$(blocks)" 8192 8192
upgrade 1 between
expect "the guest discards the rest" 'blkdiscard /dev/vda && echo done' 'done'
within "all of it is let go" "$(blocks)" 0 0
expect "it reads zeroes" 'tr -d "\0" </dev/vda | wc -c' 0

is_confined

# Its kernel panics: it stands, in another worker too, until somebody lets it go on; then it reboots, as it was told to.
order 'sh echo c >/proc/sysrq-trigger'
patiently 120 "the panic" status_is guest-panicked
replace panicked
if status_is guest-panicked; then pass "a guest that has panicked stands, in another worker too"; else fail "it stands no more"; fi
baton resume $vm || fail "it is not let go on"
patiently 240 "boot 2" has_ticks 2 3
pass "it reboots when it is let go on"
is_confined
end_by_its_button
[ $failed = 0 ] || give_up "the scenario"
