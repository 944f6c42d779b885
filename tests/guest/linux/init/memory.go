//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// stretch is memory that fill keeps.
type stretch struct {
	data []byte // its own mapping, so that forget gives the pages back
}

// maxFill bounds one stretch; the guest's memory bounds them together.
const maxFill = 1 << 40

func (a *agent) fill(_ context.Context, args wire.FillArgs) (any, error) {
	if args.Size < 1 || args.Size > maxFill {
		return nil, fmt.Errorf("size %d is not between 1 and %d", args.Size, int64(maxFill))
	}
	if err := a.drop(args.Name); err != nil {
		return nil, err
	}
	data, err := buffer(int(args.Size))
	if err != nil {
		return nil, err
	}
	wire.Pattern(data, args.Seed, 0)
	a.mu.Lock()
	defer a.mu.Unlock()
	if old, ok := a.memory[args.Name]; ok { // another request was as quick
		_ = unix.Munmap(old.data)
	}
	a.memory[args.Name] = stretch{data: data}
	return sum(data), nil
}

func (a *agent) verify(_ context.Context, args wire.NameArgs) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, ok := a.memory[args.Name]
	if !ok {
		return nil, fmt.Errorf("nothing is kept as %q", args.Name)
	}
	return sum(s.data), nil
}

func (a *agent) forget(_ context.Context, args wire.NameArgs) (any, error) {
	return nil, a.drop(args.Name)
}

func (a *agent) drop(name string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, ok := a.memory[name]
	if !ok {
		return nil
	}
	delete(a.memory, name)
	return unix.Munmap(s.data)
}

func sum(data []byte) wire.SumResult {
	h := sha256.Sum256(data)
	return wire.SumResult{Size: int64(len(data)), SHA256: hex.EncodeToString(h[:])}
}

func memInfo(*agent) (any, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	var r wire.MemInfoResult
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseUint(f[1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("/proc/meminfo: %w", err)
		}
		switch f[0] {
		case "MemTotal:":
			r.Total = kib << 10
		case "MemFree:":
			r.Free = kib << 10
		case "MemAvailable:":
			r.Available = kib << 10
		}
	}
	return r, nil
}
