#!/bin/sh
# kernel.sh: build the Linux kit's kernel unless it is cached, and print the
# directory that holds bzImage, vmlinux (stripped, with a PVH note), config
# and System.map.
#
# JOBS sets how many compilers run; it is the number of processors if unset.
set -eu
. "$(dirname "$0")/common.sh"

package=linux-source-6.1
need apt-cache apt dpkg dpkg flock util-linux
version=$(package_version $package)
hash=$({
	echo "$package $version"
	cat "$here/kernel.config" "$here/kernel.sh"
} | hash_of)
out=$cache/linux-$hash

if [ ! -f "$out/vmlinux" ]; then
	need gcc gcc make make flex flex bison bison bc bc lz4 lz4 xz xz-utils tar tar perl perl
	echo '#include <gelf.h>' | gcc -E - >/dev/null 2>&1 || fail "missing headers; on Debian: apt-get install libelf-dev"
	one_at_a_time linux
fi
if [ ! -f "$out/vmlinux" ]; then
	work=$(mktemp -d "$cache/.linux.XXXXXX")
	trap 'rm -rf "$work"' EXIT INT TERM
	tarball=/usr/src/$package.tar.xz
	if [ ! -f "$tarball" ] || ! dpkg-query -W $package >/dev/null 2>&1; then
		say "downloading $package $version"
		fetch_package $package "$work"
		tarball=$work/usr/src/$package.tar.xz
	fi
	say "building the kernel ($package $version) in $cache; this takes about ten minutes of one processor"
	# Large parts that an x86 build never opens; every Kconfig file stays.
	tar -C "$work" -xf "$tarball" \
		--exclude="$package/Documentation/*/*" --exclude="$package/tools/testing/*" \
		--exclude="$package/drivers/gpu/drm/amd/*.[ch]" --exclude='*.dts' --exclude='*.dtsi'
	tree=$work/$package
	log=$work/build.log
	# Nothing of the person or machine that builds enters the kernel.
	export KBUILD_BUILD_USER=gnomon KBUILD_BUILD_HOST=gnomon KBUILD_BUILD_TIMESTAMP='2000-01-01 00:00:00 UTC' KBUILD_BUILD_VERSION=1
	(cd "$tree" && KCONFIG_ALLCONFIG="$here/kernel.config" make allnoconfig) >"$log" 2>&1 || {
		tail -n 30 "$log" >&2
		fail "the kernel cannot be configured"
	}
	# A wish that Kconfig does not grant is a mistake in kernel.config.
	while IFS= read -r wish; do
		case $wish in
		CONFIG_*=n) ! grep -q "^${wish%=n}=" "$tree/.config" || fail "Kconfig keeps $(grep "^${wish%=n}=" "$tree/.config") though kernel.config says n" ;;
		CONFIG_*) grep -qxF "$wish" "$tree/.config" || fail "Kconfig drops $wish of kernel.config" ;;
		esac
	done <"$here/kernel.config"
	(cd "$tree" && nice make -j"${JOBS:-$(nproc)}" bzImage) >>"$log" 2>&1 || {
		tail -n 30 "$log" >&2
		fail "the kernel does not build"
	}
	mkdir "$work/out"
	cp "$tree/arch/x86/boot/bzImage" "$tree/System.map" "$work/out/"
	cp "$tree/.config" "$work/out/config"
	strip -o "$work/out/vmlinux" "$tree/vmlinux"
	rm -rf "$out"
	mv "$work/out" "$out"
	ln -sfn "linux-$hash" "$cache/linux"
fi
echo "$out"
