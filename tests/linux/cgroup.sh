#!/bin/sh
# Runs inside the SVM host, on busybox: a VM's cgroup of version 2 has the limits of its policy, and those of the policy of each
# upgrade; the audit reads them back, and finds one that somebody has raised. Prints a line `PASS ...` or `FAIL ...` for each.
#
#   cgroup.sh CPUS SLOWNESS
# shellcheck disable=SC3043 # busybox has local
cpus=$1 slowness=$2
vm=limited console=/tmp/console.log
# shellcheck source-path=SCRIPTDIR source=common.sh
. /common.sh

# limit CPU MEMORY: processors beyond vCPUs, and bytes beyond RAM.
limit() {
    sed -e "s/^cpu_headroom = \"unlimited\"/cpu_headroom = $1/" -e "s/^memory_headroom = [0-9_]*/memory_headroom = $2/" \
        /default.toml >/tmp/policy.toml
}
policy=policy.toml
describe </dev/null

# has FILE VALUE: the VM's cgroup says so.
has() { [ "$(cat /sys/fs/cgroup/baton/$vm-*/"$1")" = "$2" ]; }
# is_limited MEMORY PROCESSORS: to these, and two workers' tasks.
is_limited() {
    has memory.max "$1" && has pids.max $((2 * (cpus + 16))) && has cpu.max "$(((cpus + $2) * 100000)) 100000"
}
# audits STATUS WORDS: `baton audit` ends so, and says so.
audits() {
    local code=0
    baton audit $vm --json >/tmp/audit 2>&1 || code=$?
    [ $code = "$1" ] && grep -q "$2" /tmp/audit
}
# promise TEXT TEST...
promise() {
    local text="$1"
    shift
    if "$@"; then pass "$text"; else fail "$text: $(head /sys/fs/cgroup/baton/$vm-*/*.max) $(cat /tmp/audit)"; fi
}

: >/tmp/audit
limit 2 536870912
start
promise "the worker is in the VM's cgroup" grep -qx "$(worker)" /sys/fs/cgroup/baton/$vm-*/cgroup.procs
promise "memory, tasks and processors are limited as the policy says" is_limited 805306368 2
promise "the audit reads the limits back" audits 0 "memory.max 805306368, cpu.max $(((cpus + 2) * 100000)) 100000"
limit 1 402653184
replace 1
promise "an upgrade limits them as its policy says" is_limited 671088640 1
promise "the audit reads those back" audits 0 "memory.max 671088640, cpu.max $(((cpus + 1) * 100000)) 100000"
for file in memory.max pids.max cpu.max; do
    before=$(cat /sys/fs/cgroup/baton/$vm-*/$file)
    echo max >"$(echo /sys/fs/cgroup/baton/$vm-*/$file)"
    promise "the audit finds that somebody has raised $file" audits 1 "$file says"
    echo "$before" >"$(echo /sys/fs/cgroup/baton/$vm-*/$file)"
done
is_confined
baton stop $vm --force >/tmp/stop 2>&1 || fail "it ends: $(cat /tmp/stop)"
patiently 60 "the VM's directory goes" is_gone
if [ -z "$(ls -d /sys/fs/cgroup/baton/*/ 2>/dev/null)" ]; then
    pass "its cgroup is gone with it"
else
    fail "its cgroup is gone with it: $(ls -d /sys/fs/cgroup/baton/*/)"
fi
[ $failed = 0 ] || give_up "the scenario"
