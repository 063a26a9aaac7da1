#!/bin/sh
# Runs inside the SVM host, on busybox: a Linux guest writes numbered lines to /dev/hvc0, and says there what is typed there, while
# its worker is replaced. Prints a line `PASS ...` or `FAIL ...`.
#
#   hvc.sh CPUS UPGRADES SLOWNESS
cpus=$1 upgrades=$2 slowness=$3
vm=linux console=/tmp/console.log hvc=/tmp/hvc.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

describe <<TABLES
[virtio_console]
kind = "file"
path = "$hvc"
TABLES
: >$hvc
start
patiently 240 "the guest reaches user space" has_ticks 1 5

written() { awk '$1 == "line" { n = $2 } END { print n + 0 }' $hvc; }
beyond() { [ "$(written)" -gt "$1" ]; }
says() { tr -d '\r' <$hvc | grep -q -x "$1"; }

# Somebody at that console, through all upgrades.
mkfifo /tmp/keys
baton console $vm --virtio </tmp/keys >/dev/null &
session=$!
exec 3>/tmp/keys

# shellcheck disable=SC2016 # the guest's shell expands it
order 'sh stty -F /dev/hvc0 -echo; (while read -r word; do echo "heard $word"; done </dev/hvc0 >/dev/hvc0 2>&1 &)'
# shellcheck disable=SC2016 # likewise
order 'sh (n=0; while :; do echo line $((n += 1)); sleep 0.1; done >/dev/hvc0 2>&1 &)'
patiently 120 "the guest writes to /dev/hvc0" beyond 20
pass "the guest finds /dev/hvc0, beside its serial port"
number=1
while [ $number -le "$upgrades" ]; do
    upgrade 1 $number
    before=$(written)
    patiently 120 "upgrade $number: lines go on" beyond $((before + 5))
    echo "word $number" >&3
    patiently 120 "upgrade $number: what is typed is heard" says "heard word $number"
    number=$((number + 1))
done
if kill -0 $session; then
    pass "what is typed there is heard, by one session over $upgrades upgrades"
else
    fail "the session at the virtio console ends"
fi
if wrong=$(tr -d '\r' <$hvc | awk '$1 == "line" && $2 != ++n { print "line " NR ": " $2 " instead of " n; exit 1 }'); then
    pass "$(written) lines on /dev/hvc0 over $upgrades upgrades, each once and in order"
else
    fail "the lines on /dev/hvc0: $wrong"
fi
is_confined
end_by_its_button
[ $failed = 0 ] || give_up "the scenario"
