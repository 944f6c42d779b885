package qcow2

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"golang.org/x/sys/unix"
)

// ended notes how a request ended.
type ended struct {
	count int
	err   error
}

func (e *ended) Ended(_ *block.Request, _ int64, err error) { e.count, e.err = e.count+1, err }

// What lies side by side in the image can be begun, and is what Readv and Writev see;
// all else is left to these.
func TestStart(t *testing.T) {
	const cluster = 64 << 10
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	create(t, dir, "disk", "4M")
	edit(t, dir, "disk", "write -P 1 0 192k", "write -z 192k 64k", "write -c -P 2 256k 64k", "write -P 3 512k 64k", "write -P 4 448k 64k")
	n, err := OpenWith(path, false, raw.Options{Direct: true, Engine: aio.IOUring})
	if err != nil {
		t.Fatal(err)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(event)
	ring, err := aio.NewRing(event)
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	memory, err := unix.Mmap(-1, 0, 4*cluster, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(memory)
	start := func(write bool, off, length int64) bool {
		t.Helper()
		var e ended
		r := block.Request{Write: write, Bufs: [][]byte{memory[:length]}, Off: off, Ring: ring}
		r.Enter(&e, 0)
		if !block.Start(n, &r) {
			if r.Off != off || e.count != 0 {
				t.Errorf("a request that did not start is at %d, and ended %d times", r.Off, e.count)
			}
			return false
		}
		if n.w.active[n.w.epoch].Load() != 1 {
			t.Error("the place is not in use")
		}
		for ring.Submit(); e.count == 0; ring.Reap() {
			if !ring.Arm() {
				var count [8]byte
				_, _ = unix.Read(event, count[:])
			}
		}
		if e.count != 1 || e.err != nil || n.w.active[n.w.epoch].Load() != 0 {
			t.Fatalf("ended %d times, with %v", e.count, e.err)
		}
		return true
	}
	// Its tables are not in memory yet, and are read by this.
	if start(false, 0, 4096) {
		t.Error("started without the tables")
	}
	if err := n.Readv([][]byte{memory[:4096]}, 0); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, 4*cluster)
	for _, tt := range []struct {
		name        string
		off, length int64
		read, write bool
	}{
		{"in a cluster", 4096, 8192, true, true},
		{"clusters side by side", 0, 3 * cluster, true, true},
		{"up to the zeroes", 2*cluster + 4096, cluster - 4096, true, true},
		{"into the zeroes", 2 * cluster, 2 * cluster, false, false},
		{"zeroes", 3 * cluster, 4096, false, false},
		{"compressed", 4 * cluster, 4096, false, false},
		{"nothing", 6 * cluster, 4096, false, false},
		{"clusters in another order", 7 * cluster, 2 * cluster, false, false},
		{"not whole blocks", 100, 4096, false, false},
		{"no bytes", 0, 0, false, false},
		{"behind the end", 4<<20 - 4096, 8192, false, false},
	} {
		copy(memory, bytes.Repeat([]byte{byte(tt.off >> 12), 7}, len(memory)/2))
		if got := start(true, tt.off, tt.length); got != tt.write {
			t.Errorf("%s: write started: %v", tt.name, got)
		} else if got {
			if err := n.Readv([][]byte{back[:tt.length]}, tt.off); err != nil || !bytes.Equal(back[:tt.length], memory[:tt.length]) {
				t.Errorf("%s: write: other data, %v", tt.name, err)
			}
		}
		clear(memory)
		if got := start(false, tt.off, tt.length); got != tt.read {
			t.Errorf("%s: read started: %v", tt.name, got)
		} else if got && !bytes.Equal(back[:tt.length], memory[:tt.length]) {
			t.Errorf("%s: read: other data", tt.name)
		}
	}
	// What else keeps writes from being begun.
	n.w.mu.Lock()
	n.w.busy[2] = true
	n.w.mu.Unlock()
	if start(true, 0, 3*cluster) || !start(true, 0, 2*cluster) {
		t.Error("a write started in a cluster that is being changed, or none in others")
	}
	delete(n.w.busy, 2)
	n.SetRules(block.WriteRules{Zeroes: block.ZeroesOn})
	clear(memory)
	if start(true, 0, 4096) {
		t.Error("zeroes were written that are to be told from data")
	}
	n.SetRules(block.WriteRules{})
	if block.Start(struct{ *Node }{n}, &block.Request{Bufs: [][]byte{memory[:4096]}, Ring: ring}) || block.Start(struct{ *raw.Node }{n.file.(*raw.Node)}, &block.Request{Bufs: [][]byte{memory[:4096]}, Ring: ring}) {
		t.Error("started for a node that embeds this one")
	}
	n.through = true
	if start(true, 0, 4096) {
		t.Error("a write started that is to be durable when it ends")
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, path)
}
