#!/bin/sh
# Runs every fuzz target of the module, three at a time: what takes a guest's, a
# file's or a peer's own format for the given time (default 30s), the others for a
# twentieth of the seconds. A target that finds something fails the run and leaves its
# input under the package's testdata/fuzz, to be committed with the mend.
set -eu
time=${1:-30s}
seconds=${time%s}
cd "$(dirname "$0")/.."
main="FuzzQueue FuzzPCIConfig FuzzLoadKernel FuzzOpen FuzzParser FuzzSession"

# fuzz TARGET SECONDS PACKAGE: little of the time goes into making interesting inputs
# small. An end of the time that Go takes for a failure (go.dev/issue/75804) is none.
fuzz='
out=$(go test -run "^$" -parallel 1 -fuzz "^$1\$" -fuzztime "$2s" -fuzzminimizetime 10x "$3" 2>&1) && status=0 || status=$?
printf "%s\n" "$out"
case $out in *"Failing input"*) ;; *"--- FAIL: $1 "*"    context deadline exceeded"*) status=0 ;; esac
exit $status'

grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | sort | while read -r file; do
	package=./$(dirname "${file#./}")
	grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$file" | sed 's/^func //' | while read -r target; do
		case " $main " in
		*" $target "*) for_seconds=$seconds ;;
		*) for_seconds=$(((seconds + 19) / 20)) ;;
		esac
		echo "$target" "$for_seconds" "$package"
	done
done | sort -s -k 2,2nr | # the longest first: none is left to run alone
	xargs -P 3 -L 1 sh -c "$fuzz" fuzz
