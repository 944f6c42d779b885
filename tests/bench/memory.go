package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

const mib = 1 << 20

// settle is how long a machine idles before its memory is looked at.
const settle = 2 * time.Second

// memory measures what the VMM's process keeps resident besides guest RAM, with
// a disk, a user-mode network, a balloon and an entropy device, while the
// guest idles; and again after the guest has read and written the disk.
func (b *bench) memory() experiment {
	image := b.image("raw", 0)
	devices := func(bus string) []string {
		return []string{
			"-drive", "file=" + image.path + ",format=raw,if=none,id=d", "-device", "virtio-blk-" + bus + ",drive=d",
			"-netdev", "user,id=n", "-device", "virtio-net-" + bus + ",netdev=n",
			"-device", "virtio-balloon-" + bus, "-device", "virtio-rng-" + bus,
		}
	}
	idle := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			if err := image.make(); err != nil {
				return nil, err
			}
			return memoryOnce(ctx, v, "wait", "")
		}
	}
	busy := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			f, err := idle(v)(ctx)
			if err != nil {
				return nil, err
			}
			after, err := memoryOnce(ctx, v, "blk op=randwrite bs=4k qd=32 total=32M data=same; blk op=seqread bs=1M qd=8 total=64M; wait", "_busy")
			if err != nil {
				return nil, err
			}
			f["rss_busy"] = after["rss_busy"]
			return f, nil
		}
	}
	ours := b.ours(128, "--disk", "file="+image.path, "--net", "user")
	return experiment{
		name: "memory",
		schedule: contenders{
			{"gnomon", busy(ours)},
			{"QEMU microvm", idle(b.peer(microvm, 128, devices("device")...))}, // the probe guest finds devices on PCI only
			{"QEMU q35", busy(b.peer("q35", 128, devices("pci")...))},
		},
		promises: []promise{
			{metric: "rss", text: "resident memory beyond guest RAM", unit: "MiB", bound: bound{"ratio", "<", 1}},
			{metric: "rss", text: "resident memory beyond guest RAM, at most", unit: "MiB", bound: bound{"ours", "<=", 24}},
			{metric: "rss_busy", text: "resident memory beyond guest RAM after disk I/O", unit: "MiB"},
			{metric: "pss", text: "proportional memory beyond guest RAM", unit: "MiB"},
			{metric: "private", text: "private memory beyond guest RAM", unit: "MiB"},
		},
	}
}

func memoryOnce(ctx context.Context, v vmm, words, suffix string) (figures, error) {
	g, err := v.start(ctx, words)
	if err != nil {
		return nil, err
	}
	defer g.kill()
	if _, _, err := g.line("wait"); err != nil {
		return nil, err
	}
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	file, err := os.Open(fmt.Sprintf("/proc/%d/smaps", g.pid()))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	sizes, err := readMaps(file, "/memfd:"+v.ram)
	if err != nil {
		return nil, err
	}
	f := figures{}
	for name, bytes := range sizes {
		f[name+suffix] = float64(bytes) / mib
	}
	if err := g.release(); err != nil {
		return nil, err
	}
	_, err = g.results()
	return f, err
}

// readMaps adds up a smaps file (proc(5)) but for the mappings of one file. It
// fails where that has none: what is left would not be what is wanted.
func readMaps(r io.Reader, but string) (map[string]int64, error) {
	sizes := map[string]int64{"rss": 0, "pss": 0, "private": 0}
	metric := map[string]string{"Rss": "rss", "Pss": "pss", "Private_Clean": "private", "Private_Dirty": "private"}
	left, found := false, false
	for s := bufio.NewScanner(r); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) == 0 {
			continue
		}
		key, ok := strings.CutSuffix(fields[0], ":")
		if !ok { // address perms offset device inode path
			left = len(fields) > 5 && fields[5] == but
			found = found || left
			continue
		}
		name, ok := metric[key]
		if !ok || left {
			continue
		}
		if len(fields) != 3 || fields[2] != "kB" {
			return nil, fmt.Errorf("smaps: cannot read %q", s.Text())
		}
		kb, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("smaps: %w", err)
		}
		sizes[name] += kb << 10
	}
	if !found {
		return nil, fmt.Errorf("smaps: no mapping of %s", but)
	}
	return sizes, nil
}
