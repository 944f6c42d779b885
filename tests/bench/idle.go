package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	kit "github.com/gnomon-vmm/gnomon/tests/guest"
	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// idle measures the file of a Linux guest that does nothing. Where ring 0 is
// interpreted QEMU boots no Linux, so its side is computed: what its format
// takes for the same memory, 8 bytes and its content for each page that is not
// zero. That leaves its zero pages out, which take 9 bytes each.
func (b *bench) idle() experiment {
	var s *saved // of the last run
	return experiment{
		name: "idle",
		schedule: contenders{
			{"gnomon", func(ctx context.Context) (f figures, err error) {
				if s == nil { // nothing that time could change
					s, err = b.saveLinux(ctx)
				}
				if err != nil {
					return nil, err
				}
				return figures{"bytes": float64(s.Bytes) / mib}, nil
			}},
			{"QEMU's format, computed", func(context.Context) (figures, error) {
				return figures{"bytes": float64(s.Touched/pageSize*(pageSize+8)) / mib}, nil
			}},
		},
		promises: []promise{
			{metric: "bytes", text: "file of an idle Linux guest of 256 MiB", unit: "MiB", bound: bound{"ratio", "<=", 0.5}},
		},
	}
}

// saveLinux boots the Linux kit and saves it some time later.
func (b *bench) saveLinux(ctx context.Context) (*saved, error) {
	linux, err := kit.FindLinux()
	if err != nil {
		return nil, err
	}
	v := b.ours(256, "--net", "none")
	args := v.args
	v.args = func(string) []string {
		return append(args(""), "--kernel", linux.Kernel, "--initrd", linux.Initrd, "--append", linux.Cmdline)
	}
	m, err := b.startMachine(ctx, v, "", "")
	if err != nil {
		return nil, err
	}
	defer m.close()
	ready := false
	for !ready {
		select {
		case l, ok := <-m.lines:
			if !ok {
				return nil, fmt.Errorf("the Linux guest did not boot: %w", m.end())
			}
			ready = strings.Contains(l.text, wire.Ready)
		case <-time.After(patience):
			return nil, fmt.Errorf("the Linux guest did not boot in %v", patience)
		}
	}
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	file, err := b.scratch("linux")
	if err != nil {
		return nil, err
	}
	defer os.Remove(file)
	return m.checkpoint(ctx, file, "", "running")
}
