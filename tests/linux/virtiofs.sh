#!/bin/sh
# Runs inside the SVM host, on busybox and what virtiofsd is linked with: boots /guest under Baton with a file system that virtiofsd
# implements, has it write numbered files there while its worker is replaced again and again, and reads them from here.
# Prints a line `PASS ...` or `FAIL ...` for each promise.
#
#   virtiofs.sh CPUS UPGRADES SLOWNESS
cpus=$1 upgrades=$2 slowness=$3
vm=virtiofs console=/tmp/console.log share=/tmp/share

# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

mkdir $share
/virtiofsd --shared-dir $share --socket-path /tmp/share.sock --sandbox chroot --log-level warn &
backend=$!
patiently 30 "virtiofsd listens" test -S /tmp/share.sock
kernel=vmlinux words=quiet
describe <<TABLES
[[vhost_user]]
id = "share"
kind = "fs"
socket = "/tmp/share.sock"
TABLES
start
patiently 600 "the guest reaches user space" has_ticks 1 1
# What it writes is what is judged here, and each character that it prints is an exit.
order quiet

# shellcheck disable=SC2016 # the guest's shell expands it
order 'sh mount -t virtiofs share /mnt && echo "mounted $(cat /proc/uptime)" >/mnt/mounted'
patiently 300 "the guest mounts what virtiofsd shares" test -s $share/mounted
pass "mounts what virtiofsd shares"

# Files of a page and a little, one after the other, until there is a file `stop`: which the guest sees when it is made here.
cat >$share/writer <<'WRITER'
n=0
while ! [ -e /mnt/stop ]; do
    n=$((n + 1))
    seq "$n" $((n + 900)) >/mnt/file.new && mv /mnt/file.new "/mnt/file.$n" || echo "$n" >>/tmp/errors
done
cp /tmp/errors /mnt/errors 2>/dev/null
echo "$n" >/mnt/done
WRITER
order 'sh sh /mnt/writer >/dev/null 2>&1 &'
written() { [ -e "$share/file.$1" ]; }
patiently 300 "the guest writes" written 5

number=1
while [ $number -le "$upgrades" ]; do
    replace $number
    echo "  upgrade $number: $(took)"
    # It goes on writing after each.
    last=$(find $share -name 'file.[0-9]*' | wc -l)
    patiently 300 "upgrade $number: the guest writes on" written $((last + 3))
    number=$((number + 1))
done
if kill -0 $backend; then
    pass "$upgrades upgrades are committed, the guest writes on after each, and virtiofsd is the same process"
else
    fail "virtiofsd is gone"
fi
is_confined

: >$share/stop
patiently 300 "the guest sees a file that is made here" test -s $share/done
last=$(cat $share/done) n=0 wrong=''
while [ $n -lt "$last" ]; do
    n=$((n + 1))
    seq $n $((n + 900)) | cmp -s - "$share/file.$n" || wrong="$wrong $n"
done
if [ "$last" -ge 5 ] && ! [ "$wrong" ] && ! [ -e $share/errors ]; then
    pass "$last files are whole"
else
    fail "of $last files these are not whole:$wrong; these could not be written: $(cat $share/errors 2>/dev/null)"
fi
end_by_its_button
[ "$failed" = 0 ] || give_up "the scenario"
