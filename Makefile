# make run and make test do everything from a fresh Debian 12 with Go on it.
SHELL := /bin/bash
export CGO_ENABLED := 0

# The Debian packages: what the guests are built with, and the peers and
# oracles of the tests.
PACKAGES := acpica-tools bc bison build-essential busybox-static cpio curl e2fsprogs flex gdb iproute2 \
	libelf-dev libssl-dev linux-libc-dev linux-source-6.1 lz4 qemu-system-x86 qemu-utils xz-utils zstd

GO_PACKAGES := ./...
# The main fuzz targets run this long in make test, in whole seconds.
FUZZTIME ?= 30s
TESTFLAGS ?= -timeout 25m

.PHONY: run test test-long bench build guest deps check unit machines fuzz clean help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | column -t -s "$$(printf '\t')"

run: deps guest build ## boot the Linux kit: a shell at a terminal, a short tour without one
	@if [ -t 0 ] && [ -t 1 ]; then go run ./tests/tour -shell; else go run ./tests/tour; fi

test: deps guest build check unit machines fuzz ## everything that must hold before a change lands
	@echo "all tests passed"

test-long: deps guest build ## slow tests too: Debian's own kernel
	$(MAKE) -C tests/guest cloud
	go test -timeout 60m -tags long -count=1 ./tests/...

bench: PACKAGES += fio
bench: deps guest build ## figures beside QEMU's, and bench.json
	go run ./tests/bench -o bench.json

build: ## bin/gnomon
	go build -trimpath -o bin/gnomon ./tools/gnomon

guest: deps ## the guests that tests boot, cached outside the checkout
	$(MAKE) -C tests/guest all

check: ## formatting, vet, staticcheck
	@bad=$$(go tool gofumpt -l .); if [ -n "$$bad" ]; then echo "not formatted (go tool gofumpt -w .):"; echo "$$bad"; exit 1; fi
	go vet $(GO_PACKAGES)
	go tool staticcheck $(GO_PACKAGES)

# The longest first, so that none is left to run alone.
unit: ## the tests of each package, with the race detector where it can be
	CGO_ENABLED=1 go test -race -count=1 -p 2 $(TESTFLAGS) ./vmm/snapshot ./mm/checkpoint $$(go list ./... | grep -v '/tests$$')
	go test -count=1 -run Allocat $$(grep -rl --include='*_test.go' '^//go:build !race' . | xargs -n 1 dirname | sort -u) # which it would disturb

# Guests whose kernels are interpreted are slower beside anything else.
machines: build ## the tests of the command with whole guests, one by one
	CGO_ENABLED=1 go test -race -count=1 $(TESTFLAGS) ./tests

fuzz: ## each fuzz target for FUZZTIME
	@sh tests/fuzz.sh $(FUZZTIME)

# Installed only when something is missing: a machine that has all is not touched.
deps:
	@missing=$$(dpkg-query -W -f '$${Package} $${db:Status-Status}\n' $(PACKAGES) 2>&1 | awk '$$NF!="installed"'); \
	if [ -n "$$missing" ]; then \
		sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
		$$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $(PACKAGES); \
	fi

clean: ## remove what was built here; the guests' cache stays
	rm -rf bin bench.json
