# shellcheck shell=bash
# What the SVM host takes from Debian: the packages it runs with, and kernels unpacked into the cache.
# shellcheck disable=SC2034 # what the sourcing scripts use
# Sourced by `run` and `linux-guest`. Kernels come through apt, which checks their signatures, and are never installed.

# A failure inside $(…) fails the script, too.
shopt -s inherit_errexit
# The output of apt and dpkg is read.
export LC_ALL=C.UTF-8

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly here
readonly repository=${here%/tests/svm-host}
readonly cache=${SVM_HOST_CACHE:-${CARGO_TARGET_DIR:-$repository/target}/svm-host-cache}
readonly packages=(busybox-static cpio gcc kmod libc6-dev lz4 util-linux xz-utils zstd)
readonly backports_file=/etc/apt/sources.list.d/baton-svm-host.sources

say() { printf 'svm-host: %s\n' "$*" >&2; }

# Exit 3 is ours: the command inside did not run to its end.
die() {
    say "error: $*"
    exit 3
}

installed() {
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# Nested paging is what we need QEMU's emulator for. With several processors, 10.0.2 and (less often) 11.1 break what they emulate
# once guests run: the host's kernel was given an interrupt at the instruction after VMRUN, where GIF is 0 and GS the guest's;
# a processor got no interrupt any more. With one processor neither was seen.
readonly oldest_qemu=11

# Runs that QEMU: this machine's own if it is new enough, otherwise Debian 13's from its backports, in a root directory.
if dpkg --compare-versions "$(dpkg-query --show --showformat='${Version}' qemu-system-x86 2>/dev/null)" ge "1:$oldest_qemu"; then
    qemu=(qemu-system-x86_64)
else
    qemu=("$here/../qemu-in-debian-13" trixie-backports "$cache")
fi

get() {
    apt-get --quiet --quiet -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >&2 || die "'apt-get $*' failed"
}

# Debian 12 has Linux 6.12 in its backports only; where they are not a source yet they become one, in a file of its own.
add_backports() {
    [[ $(apt-cache policy) != *"n=$1-backports"* ]] || return 0
    say "adding $1-backports as $backports_file"
    cat >"$backports_file" <<SOURCE
Types: deb
URIs: http://deb.debian.org/debian
Suites: $1-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCE
    get update
}

# Installs what is missing, as root; otherwise says what to install.
need_packages() {
    local -a missing=()
    local package lock
    for package in "${packages[@]}"; do
        installed "$package" || missing+=("$package")
    done
    command -v rustc >/dev/null ||
        die "rustc is not on the PATH: install Rust 1.87 or later, by rustup or from Debian 13's backports"
    # Outside the lock, and once: what is there already is only named.
    [[ ${qemu[0]} == qemu-system-x86_64 ]] || "$here/../debian-13" trixie-backports qemu-system-x86 >/dev/null ||
        die "no QEMU $oldest_qemu: install qemu-system-x86 of Debian 13's backports, or run this once as root"
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "missing packages: ${missing[*]}. Install them, or run this once as root"

    exec {lock}>"$cache/packages.lock"
    flock "$lock"
    export DEBIAN_FRONTEND=noninteractive
    get update
    say "installing ${missing[*]}"
    get install --yes --no-install-recommends "${missing[@]}"
    exec {lock}>&-
}

hash_of() { sha256sum | cut --characters=1-16; }

# What is being built, on the cache's own file system so that `publish` is one rename.
building() { mktemp --directory "$cache/building.XXXXXXXX"; }

# publish BUILT FINAL: BUILT becomes FINAL in one step. When another run was first, its result stands.
publish() {
    mv --no-target-directory "$1" "$2" 2>/dev/null || rm --recursive --force "$1"
    [[ -e $2 ]] || die "could not write $2"
}

# The kernel package to take: the newest signed one of the series that apt can fetch.
newest_kernel_package() {
    apt-cache pkgnames "linux-image-$1." | { grep --extended-regexp '^linux-image-[0-9.]+[^ ]*-cloud-amd64$' || true; } |
        xargs --no-run-if-empty apt-cache policy |
        awk '/^linux-image/ { package = substr($1, 1, length($1) - 1) } /Candidate: [0-9]/ { print package }' |
        sort --version-sort | tail --lines=1
}

# kernel SERIES: prints a directory of the cache that holds Debian's cloud kernel of that series (6.12, 6.1):
#   bzImage   as Debian ships it
#   vmlinux   decompressed
#   config    what it was built with
#   release   what `uname -r` says
#   lib/modules/RELEASE, with its dependencies worked out
# A series is fetched once: remove the directory to have a newer one.
kernel() {
    local series=$1 found package build modules release
    found=$(find "$cache" -maxdepth 1 -name "kernel-$series.*" | sort --version-sort | tail --lines=1)
    if [[ $found ]]; then
        echo "$found"
        return
    fi
    package=$(newest_kernel_package "$series")
    if [[ ! $package && $EUID == 0 ]]; then
        get update
        package=$(newest_kernel_package "$series")
    fi
    if [[ ! $package && $EUID == 0 && $series == 6.12 ]] && grep --quiet VERSION_CODENAME=bookworm /etc/os-release; then
        add_backports bookworm
        package=$(newest_kernel_package "$series")
    fi
    [[ $package ]] || die "apt knows no linux-image-$series*-cloud-amd64: Debian 12 has 6.1, and 6.12 in its backports;" \
        "Debian 13 has 6.12. As root, add the source and run 'apt-get update'"

    say "unpacking $package"
    build=$(building)
    # apt's list may name a version that the mirror no longer has.
    (cd "$build" && apt-get --quiet --quiet -o APT::Sandbox::User=root download "$package" >&2) || {
        ((EUID == 0)) || die "cannot download $package: as root, run 'apt-get update'"
        get update
        (cd "$build" && get -o APT::Sandbox::User=root download "$package")
    }
    dpkg-deb --extract "$build"/*.deb "$build/deb"
    # Debian 13 has them in /usr/lib.
    modules=$(find "$build/deb" -type d -path '*/lib/modules/*' -prune)
    release=$(basename "$modules")
    mkdir --parents "$build/kernel/lib/modules"
    mv "$modules" "$build/kernel/lib/modules/"
    mv "$build/deb/boot/config-$release" "$build/kernel/config"
    mv "$build/deb/boot/vmlinuz-$release" "$build/kernel/bzImage"
    echo "$release" >"$build/kernel/release"
    depmod --basedir "$build/kernel" "$release"
    decompress_kernel "$build/kernel/bzImage" "$build/kernel/vmlinux"
    publish "$build/kernel" "$cache/kernel-$release"
    rm --recursive --force "$build"
    echo "$cache/kernel-$release"
}

# decompress_kernel BZIMAGE VMLINUX. The header's fields are those of Documentation/arch/x86/boot.rst.
decompress_kernel() {
    local image=$1 offset length
    number() { od --address-radix=n --format="$1" --skip-bytes="$2" --read-bytes="$3" "$image" | tr --delete ' '; }
    [[ $(number c 0x202 4) == HdrS ]] || die "$image is no bzImage"
    offset=$((($(number u1 0x1f1 1) + 1) * 512 + $(number u4 0x248 4)))
    length=$(number u4 0x24c 4)
    # All formats but gzip are followed by the decompressed size, in four bytes.
    payload() { dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count=$((length - $1)) status=none; }
    case $(number x1 "$offset" 4) in
        1f8b*) payload 0 | gzip --decompress ;;
        28b52ffd) payload 4 | zstd --quiet --decompress ;;
        02214c18) payload 4 | lz4 --quiet --decompress ;;
        fd377a58) payload 4 | xz --decompress ;;
        *) die "$image: its payload is compressed in a way that is not known here" ;;
    esac >"$2"
    [[ $(head --bytes=4 "$2" | tail --bytes=3) == ELF ]] || die "$image did not decompress to an ELF file"
}

# stage_modules KERNEL ROOT MODULE...: puts the modules, and those that they need, into ROOT/lib/modules for modprobe.
stage_modules() {
    local kernel=$1 root=$2 release source target
    shift 2
    release=$(<"$kernel/release")
    modprobe --config /dev/null --dirname "$kernel" --set-version "$release" --show-depends --all "$@" |
        sed --quiet 's/^insmod \([^ ]*\).*/\1/p' | sort --unique | while read -r source; do
        target=$root/lib/modules/$release/${source#*"/lib/modules/$release/"}
        mkdir --parents "$(dirname "$target")"
        case $source in
            *.xz) xz --decompress --stdout "$source" >"${target%.xz}" ;;
            *.zst) zstd --quiet --decompress --stdout "$source" >"${target%.zst}" ;;
            *) cp "$source" "$target" ;;
        esac
    done
    cp "$kernel/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$release/"
    depmod --basedir "$root" "$release"
}

# stage_busybox ROOT: busybox and a link for each of its applets.
stage_busybox() {
    local applet
    mkdir --parents "$1"/{bin,sbin,usr/bin,usr/sbin}
    cp /bin/busybox "$1/bin/busybox"
    for applet in $(busybox --list-full); do
        [[ $applet == bin/busybox ]] || ln --symbolic --force /bin/busybox "$1/$applet"
    done
}

# compile SOURCE: prints the cached static binary of a Rust file.
compile() {
    local name binary build
    name=$(basename "$1" .rs)
    binary=$cache/$name-$({ rustc --version && cat "$1"; } | hash_of)
    if [[ ! -e $binary ]]; then
        build=$(building)
        rustc --edition 2024 --target x86_64-unknown-linux-gnu -C opt-level=s -C panic=abort -C strip=symbols \
            -C target-feature=+crt-static --crate-name "${name//-/_}" -o "$build/binary" "$1" >&2 || die "$1 did not compile"
        publish "$build/binary" "$binary"
        rm --recursive --force "$build"
    fi
    echo "$binary"
}

# archive ROOT: writes ROOT as a newc archive, owned by root, to standard output.
archive() { (cd "$1" && find . -mindepth 1 -print0 | sort --zero-terminated | cpio --quiet --create --null --format=newc --owner=+0:+0 --reproducible); }
