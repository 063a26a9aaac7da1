# What the scenarios have in common. Each sets `vm`, the VM's name; `console`, the file of its console; `cpus`, its processors; and
# `slowness`, which multiplies every deadline: the host is emulated. It may set the variables that are set here, too, and have an
# `aftermath` that says more of a scenario that cannot go on.
# shellcheck shell=sh disable=SC3043 # busybox has local
# shellcheck disable=SC2154,SC2034 # the scenario sets these, and reads `failed`
failed=0
# Where the VM file and the images of its disks lie.
place=/tmp
# The guest's memory, its kernel (a file of /guest), and what more that one is told.
memory=256M kernel=bzImage words=''
# The file that its memory is in, if it is in one.
ram=
policy=default

pass() { echo "PASS $*"; }
fail() {
    echo "FAIL $*"
    failed=1
}

# Ends the scenario: what follows could not hold.
give_up() {
    fail "$*"
    ! type aftermath >/dev/null 2>&1 || aftermath
    echo "--- the console's end" && tail -n 120 "$console"
    echo "--- the audit log's end" && tail -n 10 "/run/baton/.audit/$vm.jsonl"
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

is_gone() { ! [ -e "/run/baton/$vm" ]; }

# describe: writes the VM file, whose further tables are on standard input.
describe() {
    local in_file=
    [ -z "$ram" ] || in_file="path = \"$ram\""
    cat >"$place/vm.toml" <<VM
schema = 1
name = "$vm"
policy = "$policy"
[cpus]
count = $cpus
[memory]
size = "$memory"
$in_file
[boot]
kernel = "/guest/$kernel"
initrd = "/guest/initrd.cpio"
cmdline = "console=ttyS0 panic=-1 $words"
[console]
kind = "file"
path = "$console"
VM
    cat >>"$place/vm.toml"
    : >"$console"
}

# disks PROGRAM [QUEUES]: makes the images of two disks, and prints their tables. The guest runs the program on the second, which
# drives the first.
disks() {
    dd if=/dev/zero of="$place/data.img" bs=1M count=4 2>/dev/null
    dd if="$1" of="$place/program.img" bs=4096 conv=sync 2>/dev/null
    cat <<TABLES
[[disk]]
id = "data"
path = "$place/data.img"
queues = ${2:-1}
[[disk]]
id = "program"
path = "$place/program.img"
readonly = true
TABLES
}

start() { baton run "$place/vm.toml" --detach --slow-host "$slowness" || give_up "the VM does not start"; }

worker() { baton status "$vm" --json | sed -n 's/.*"worker_pid": *\([0-9]*\).*/\1/p'; }

# qmp COMMAND [ARGUMENTS]: what it returns is in /tmp/qmp.
qmp() {
    baton qmp "$vm" "{\"execute\": \"$1\"${2:+, \"arguments\": $2}}" >/tmp/qmp 2>&1 || give_up "$1: $(cat /tmp/qmp)"
}

# is_migration STATUS: the last upgrade, or what is like one, has got there.
is_migration() { qmp query-migrate && grep -q "\"status\": *\"$1\"" /tmp/qmp; }

# order COMMAND: types a line on the console. A console stays until it is left: on a busy emulator 3 s were seen to end it
# before it had typed.
order() { echo "$1" | timeout 15 baton console "$vm" >/dev/null; }

# replace NUMBER: replaces the worker; /tmp/upgrade.json says how it went.
replace() {
    baton upgrade "$vm" --json >/tmp/upgrade.json 2>/tmp/upgrade.err || {
        cat /tmp/upgrade.json /tmp/upgrade.err
        give_up "upgrade $1: exit status not 0"
    }
    grep -q '"outcome": *"committed"' /tmp/upgrade.json || give_up "upgrade $1: $(cat /tmp/upgrade.json)"
}
took() { grep -o '"\(blackout_us\|total_ms\)": *[0-9]*' /tmp/upgrade.json | tr -d '"' | xargs; }

# The ticks of boot N of a guest with the ticker, as a number; 0 before it. Only whole lines count.
ticks() {
    awk -v boot="$1" '/^guest: up, / { n++ } n == boot && /^tick [0-9]+ .*\r$/ { tick = $2 } END { print tick + 0 }' "$console"
}
has_ticks() { [ "$(ticks "$1")" -ge "$2" ]; }

# upgrade BOOT NUMBER: replaces the worker, and sees the ticker go on.
upgrade() {
    local before after
    before=$(ticks "$1")
    replace "$2"
    after=$(ticks "$1")
    patiently 120 "upgrade $2: the guest counts on" has_ticks "$1" $((after + 3))
    echo "  upgrade $2: $(took) ticks $before..$(ticks "$1")"
}

# The console's own delay and the hardware clock's whole seconds are in this, too.
clock_is_the_hosts() {
    local here there
    here=$(date +%s)
    there=$(awk '/^tick .*\r$/ { clock = $6 } END { print int(clock) }' "$console")
    if [ $((here - there)) -ge -3 ] && [ $((here - there)) -le 5 ]; then
        pass "the guest's clock is the host's"
    else
        fail "the guest's clock is the host's: here $here, there $there"
    fi
}

is_confined() {
    if baton audit "$vm" >/tmp/audit 2>&1; then
        pass "the last worker is proven confined"
    else
        fail "the last worker is proven confined: $(cat /tmp/audit)"
    fi
}

# obeyed_its_button: once it has ended.
obeyed_its_button() {
    if grep -q '"event_code":"power-off-timeout"' "/run/baton/.audit/$vm.jsonl"; then
        fail "the guest obeys its power button: the broker had to end it"
    else
        pass "ends by its power button"
    fi
}

end_by_its_button() {
    if baton stop "$vm" >/tmp/stop 2>&1; then obeyed_its_button; else fail "ends by its power button: $(cat /tmp/stop)"; fi
    patiently 60 "the VM's directory goes" is_gone
}
