# Shared by kernel.sh, initramfs.sh and cloud.sh. Sourced, not run.
#
# Everything that is built lives outside the checkout, in
#   ${GNOMON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gnomon}/guest
# in directories named for the hash of what they are made from. A directory
# appears by a rename when it is complete; a lock makes others wait.

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
cache=${GNOMON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gnomon}/guest

say() { echo "guest: $*" >&2; }

fail() {
	say "$*"
	exit 1
}

# need COMMAND PACKAGE ...: fail at once, naming every package that is missing.
need() {
	missing=
	while [ $# -gt 0 ]; do
		command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
		shift 2
	done
	[ -z "$missing" ] || fail "missing programs; on Debian: apt-get install$missing"
}

# one_at_a_time NAME: wait until nobody else builds NAME. The lock goes with
# this process.
one_at_a_time() {
	mkdir -p "$cache"
	exec 9>"$cache/.$1.lock"
	flock 9
}

# package_version PACKAGE: the version installed, or else the one apt would get.
package_version() {
	v=$(dpkg-query -W -f '${db:Status-Abbrev} ${Version}' "$1" 2>/dev/null | sed -n 's/^ii *//p')
	[ -n "$v" ] || v=$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: //p')
	case $v in
	'' | '(none)') fail "no Debian package $1; try apt-get update" ;;
	esac
	echo "$v"
}

# fetch_package PACKAGE DIRECTORY: unpack a Debian package there, no root needed.
fetch_package() {
	mkdir -p "$2/.deb"
	# apt's own user cannot write into a private directory and says so; that is
	# harmless.
	(cd "$2/.deb" && apt-get download "$1" >/dev/null 2>&1) ||
		fail "cannot download the Debian package $1; try apt-get update"
	dpkg -x "$2"/.deb/"$1"_*.deb "$2"
	rm -rf "$2/.deb"
}

# hash_of: the first 16 hexadecimal digits of the SHA-256 of standard input.
hash_of() { sha256sum | cut -c1-16; }
