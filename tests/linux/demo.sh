#!/bin/sh
# Runs inside the SVM host, on busybox: the embedded guest under `baton demo`, which counts, checks every page of its memory and
# its clock, and says if an upgrade was more to it than a pause.
#
#   demo.sh CPUS UPGRADES SLOWNESS
if baton demo --log --slow-host "$3" --cpus "$1" --upgrades "$2" --memory 64M --json >/tmp/demo.json 2>/tmp/demo.err &&
    [ "$(grep -o '"outcome": *"committed"' /tmp/demo.json | wc -l)" = "$2" ] &&
    grep -q '"aborts": *\[\]' /tmp/demo.json && grep -q '"verdict": *"proven"' /tmp/demo.json; then
    echo "PASS the embedded guest is undisturbed by $2 upgrades, and its worker proven confined"
else
    echo "FAIL the embedded guest is undisturbed by $2 upgrades, and its worker proven confined"
    cat /tmp/demo.json /tmp/demo.err
fi
if [ -z "$(ls /run/baton)" ] && [ -z "$(ls -d /sys/fs/cgroup/baton/*/ 2>/dev/null)" ]; then
    echo "PASS nothing of it is left"
else
    echo "FAIL nothing of it is left: $(ls /run/baton) $(ls -d /sys/fs/cgroup/baton/*/)"
fi
