#!/bin/sh
# Runs every fuzz target of the module for the given time (default 30s).
# A target that finds something fails the run and leaves its input under the
# package's testdata/fuzz, to be committed with the mend.
set -eu
time=${1:-30s}
cd "$(dirname "$0")/.."
grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | sort | while read -r file; do
	package=./$(dirname "${file#./}")
	grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$file" | sed 's/^func //' | while read -r target; do
		echo "fuzz $package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" || exit 1
	done || exit 1
done
