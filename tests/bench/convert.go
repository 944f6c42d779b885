package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// convert measures the conversion of a raw image of 4 GiB to qcow2 and back,
// beside qemu-img's, where both wait until the host's disk has it and where both do
// not. A quarter of it is data, spread over all of it in pieces of
// 1 MiB; the rest are holes.
func (b *bench) convert(cache string) experiment {
	source := filepath.Join(b.dir, "convert.raw")
	run := func(command ...string) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			if err := sparse(source, int64(b.pick(4096, 512))*mib); err != nil {
				return nil, err
			}
			qcow2, back := filepath.Join(b.dir, "convert.qcow2"), filepath.Join(b.dir, "convert.back")
			defer os.Remove(qcow2)
			defer os.Remove(back)
			f := figures{}
			for _, c := range []struct{ metric, from, source, to, target string }{
				{"toQcow2", "raw", source, "qcow2", qcow2},
				{"toRaw", "qcow2", qcow2, "raw", back},
			} {
				args := append(command[1:len(command):len(command)], "-t", cache, "-f", c.from, "-O", c.to, c.source, c.target)
				// The first time, which does not count, finds memory that a virtual host
				// may yet have to get from its own host.
				for range 2 {
					if err := os.Remove(c.target); err != nil && !errors.Is(err, os.ErrNotExist) {
						return nil, err
					}
					start := time.Now()
					if out, err := exec.CommandContext(ctx, command[0], args...).CombinedOutput(); err != nil {
						return nil, fmt.Errorf("%s: %w: %s", command[0], err, out)
					}
					f[c.metric] = time.Since(start).Seconds()
				}
			}
			return f, qemuImg("compare", "-f", "raw", "-F", "raw", source, back)
		}
	}
	return experiment{
		name: "convert " + cache,
		schedule: contenders{
			{"gnomon", run(b.gnomon, "disk", "convert")},
			{"qemu-img", run("qemu-img", "convert")},
			{"qemu-img, 16 out of order", run("qemu-img", "convert", "-m", "16", "-W")},
		},
		promises: []promise{
			{metric: "toQcow2", text: "convert 4 GiB, cache=" + cache + ", raw to qcow2", unit: "s", bound: bound{"ratio", "<=", 1}},
			{metric: "toRaw", text: "convert 4 GiB, cache=" + cache + ", qcow2 to raw", unit: "s", bound: bound{"ratio", "<=", 1}},
		},
		end: func() { os.Remove(source) },
	}
}

// sparse makes an image whose every fourth MiB has data, unless it is there.
func sparse(path string, size int64) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, mib)
	for off := int64(0); off < size; off += 4 * mib {
		probe.Pattern(buf, 1, uint64(off))
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Sync()
}
