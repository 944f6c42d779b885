#!/bin/sh
# Runs every fuzz target of the module, two at a time: what takes a guest's, a
# file's or a peer's own format for the given time (default 30s), the others for a
# twentieth of the seconds. A target that finds something fails the run and leaves its
# input under the package's testdata/fuzz, to be committed with the mend.
set -eu
time=${1:-30s}
seconds=${time%s}
cd "$(dirname "$0")/.."
main="FuzzQueue FuzzPCIConfig FuzzLoadKernel FuzzOpen FuzzParser FuzzSession"

grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | sort | while read -r file; do
	package=./$(dirname "${file#./}")
	grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$file" | sed 's/^func //' | while read -r target; do
		case " $main " in
		*" $target "*) for_seconds=$seconds ;;
		*) for_seconds=$(((seconds + 19) / 20)) ;;
		esac
		echo "$target" "$for_seconds" "$package"
	done
done | # Little of the time goes into making interesting inputs small.
	xargs -P 2 -L 1 sh -c 'go test -run "^$" -parallel 1 -fuzz "^$0\$" -fuzztime "$1s" -fuzzminimizetime 10x "$2"'
