#!/bin/sh
# initramfs.sh: build the Linux kit's initramfs unless it is cached, and print
# the directory that holds initramfs.cpio.
#
# In it: our init, busybox, and Debian's mke2fs and e2fsck with the libraries
# they load. It is not compressed: the guest would pay for that.
set -eu
. "$(dirname "$0")/common.sh"

need go golang cpio cpio flock util-linux dpkg dpkg
one_at_a_time initramfs
work=$(mktemp -d "$cache/.initramfs.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM
tree=$work/tree
mkdir -p "$tree/bin" "$tree/sbin" "$tree/lib64" "$tree/lib" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/tmp" "$tree/root" "$tree/etc" "$tree/mnt"

# program PATH PACKAGE: where the program is, unpacked from its package if it
# is not installed. A machine that has none of them can still build.
program() {
	if [ -x "$1" ]; then
		echo "$1"
		return
	fi
	mkdir -p "$work/packages"
	fetch_package "$2" "$work/packages"
	echo "$work/packages$1"
}

# Preemption by signal is off: an interpreted kernel takes long to deliver one.
(cd "$root" && CGO_ENABLED=0 go build -trimpath -buildvcs=false \
	-ldflags '-s -w -X runtime.godebugDefault=asyncpreemptoff=1' \
	-o "$tree/init" ./tests/guest/linux/init)

busybox=$(program /bin/busybox busybox-static)
! ldd "$busybox" >/dev/null 2>&1 || busybox=$(fetch_package busybox-static "$work/packages" && echo "$work/packages/bin/busybox")
cp "$busybox" "$tree/bin/busybox"
ln -s busybox "$tree/bin/sh"
for tool in mke2fs e2fsck; do
	cp "$(program /sbin/$tool e2fsprogs)" "$tree/sbin/$tool"
done
ln -s mke2fs "$tree/sbin/mkfs.ext4"
ln -s e2fsck "$tree/sbin/fsck.ext4"
cp /lib64/ld-linux-x86-64.so.2 "$tree/lib64/"
ldd "$tree/sbin/mke2fs" "$tree/sbin/e2fsck" | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u | while IFS= read -r lib; do
	cp "$lib" "$tree/lib/"
done
cp /etc/mke2fs.conf "$tree/etc/"
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$tree/etc/passwd"

# The same inputs make the same bytes: sorted names, one time, one owner.
find "$tree" -exec touch -h -d @946684800 {} +
(cd "$tree" && find . | LC_ALL=C sort | cpio --quiet --reproducible -o -H newc -R 0:0) >"$work/initramfs.cpio"
hash=$(hash_of <"$work/initramfs.cpio")
out=$cache/initramfs-$hash
if [ ! -f "$out/initramfs.cpio" ]; then
	mkdir "$work/out"
	mv "$work/initramfs.cpio" "$work/out/"
	rm -rf "$out"
	mv "$work/out" "$out"
	ln -sfn "initramfs-$hash" "$cache/initramfs"
fi
echo "$out"
