#!/bin/sh
# cloud.sh: fetch Debian's unmodified cloud kernel unless it is cached, and
# print the directory that holds its vmlinuz and an initramfs of busybox whose
# init says "gnomon-cloud: ready", runs a shell on the console and powers off
# when the shell ends.
set -eu
. "$(dirname "$0")/common.sh"

need apt-cache apt apt-get apt dpkg dpkg cpio cpio flock util-linux
meta=linux-image-cloud-amd64
image=$(apt-cache depends --no-recommends $meta | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1)
[ -n "$image" ] || fail "no Debian package $meta; try apt-get update"
version=$(package_version "$image")
hash=$({
	echo "$image $version"
	cat "$here/cloud.sh"
} | hash_of)
out=$cache/cloud-$hash

[ -f "$out/vmlinuz" ] || one_at_a_time cloud
if [ ! -f "$out/vmlinuz" ]; then
	work=$(mktemp -d "$cache/.cloud.XXXXXX")
	trap 'rm -rf "$work"' EXIT INT TERM
	say "downloading $image $version"
	fetch_package "$image" "$work/kernel"
	mkdir "$work/out"
	cp "$work"/kernel/boot/vmlinuz-* "$work/out/vmlinuz"
	busybox=/bin/busybox
	if [ ! -x $busybox ] || ldd $busybox >/dev/null 2>&1; then
		fetch_package busybox-static "$work/busybox"
		busybox=$work/busybox/bin/busybox
	fi
	tree=$work/tree
	mkdir -p "$tree/bin" "$tree/dev" "$tree/proc" "$tree/sys"
	cp "$busybox" "$tree/bin/busybox"
	ln -s busybox "$tree/bin/sh"
	cat >"$tree/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
busybox mount -t devtmpfs devtmpfs /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
echo "gnomon-cloud: ready $(busybox uname -r)"
busybox setsid -c busybox sh </dev/console >/dev/console 2>&1
busybox poweroff -f
INIT
	chmod 755 "$tree/init"
	find "$tree" -exec touch -h -d @946684800 {} +
	(cd "$tree" && find . | LC_ALL=C sort | cpio --quiet --reproducible -o -H newc -R 0:0) >"$work/out/initramfs.cpio"
	rm -rf "$out"
	mv "$work/out" "$out"
	ln -sfn "cloud-$hash" "$cache/cloud"
fi
echo "$out"
