#!/usr/bin/env bash
# The steps of the Dockerfile without a container engine: two bare Debian roots (debootstrap), one that builds and one that runs, read-only
# and without rights; then a session is stepped in it. As root, on Linux:  deploy/images/try.sh [DIRECTORY]
# It is the CPU image, without torch. PIP_* are passed on; SHARE names directories of this machine that pip reads from. What it cannot show: the base image
# itself, its health check, and the CUDA image on a GPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
work="${1:-$(mktemp -d)}"
build="$work/build" run="$work/run"

bare() { # directory, packages
    [ -x "$1/usr/bin/python3" ] || debootstrap --variant=minbase --include="$2" bookworm "$1" ${MIRROR:+"$MIRROR"} >"$1.log"
}
mkdir -p "$work"
echo "two bare roots in $work"
bare "$build" python3,python3-venv,python3-pip,ca-certificates
bare "$run" python3

echo "stage build"
rm -rf "$build/src" "$build/opt/engram"
mkdir -p "$build/src"
(cd "$here" && git ls-files pyproject.toml README.md LICENSE constraints.txt clients/python service models | tar -c -T - | tar -x -C "$build/src")
unshare --mount bash -eu <<MOUNTS
for share in ${SHARE:-}; do mkdir -p "$build\$share"; mount --bind "\$share" "$build\$share"; done
chroot "$build" env PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-}" sh -euc '
    cd /src
    python3 -m venv --without-pip /opt/engram
    pip --python /opt/engram/bin/python install --quiet --no-cache-dir --constraint constraints.txt ".[server,faiss]"'
MOUNTS

echo "stage run"
rm -rf "$run/opt/engram"
cp -a "$build/opt/engram" "$run/opt/engram"
chroot "$run" id engram >/dev/null 2>&1 || chroot "$run" useradd --uid 10001 --no-create-home --home-dir /var/lib/engram --shell /usr/sbin/nologin engram
mkdir -p "$run/var/lib/engram"
for tool in gcc cc make pip pip3; do
    if chroot "$run" sh -c "PATH=/opt/engram/bin:\$PATH command -v $tool" >/dev/null; then echo "FAILED: $tool is in the result"; exit 1; fi
done

unshare --mount --pid --fork bash -eu <<RUN
mount --bind "$run" "$run"
mount -o remount,bind,ro "$run"
mount -t proc proc "$run/proc"
mount -t tmpfs -o mode=1777 tmpfs "$run/tmp"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$run/var/lib/engram"
mount --bind /dev/urandom "$run/dev/urandom" 2>/dev/null || true
inside() { chroot --userspec=10001:10001 "$run" env -i PATH=/opt/engram/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 \
    ENGRAM_LISTEN=127.0.0.1:53051 ENGRAM_HTTP=127.0.0.1:53052 ENGRAM_DATA_DIR=/var/lib/engram "\$@"; }
if inside touch /opt/engram/written 2>/dev/null; then echo "FAILED: the root can be written to"; exit 1; fi
inside engram serve >"$work/server.log" 2>&1 &
for wait in \$(seq 240); do
    inside python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:53052/readyz")' 2>/dev/null && break
    sleep 0.5
done
inside python -c '
import engram, os
with engram.Client("127.0.0.1:53051") as client:
    session = client.open("digits-reader")
    outputs = [session.step([0.1] * 8) for _ in range(3)]
    print("uid", os.getuid(), "stepped", session.seq, "times; outputs", outputs[-1].shape, "; server", client.server().version)'
kill %1
wait %1 || true
RUN
tail -1 "$work/server.log"
du -sh "$run/opt/engram" | sed 's/\t.*/ of Python and Engram in the result/'
echo "it works"
