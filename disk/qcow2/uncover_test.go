package qcow2

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// What is uncovered reads as before, from the backing file, while others read it; the
// file knows it from StoreTables on, and gets its space back by Reclaim.
func TestUncover(t *testing.T) {
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	const size = 4<<20 + 512
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(i>>9 + 1)
	}
	clear(content[1<<20 : 1<<20+256<<10])
	if err := os.WriteFile(base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(path, CreateOptions{Size: size, Backing: base, BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Writev([][]byte{content[:1<<20]}, 0); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteZeroes(1<<20, 256<<10, false); err != nil {
		t.Fatal(err)
	}
	if err := n.Writev([][]byte{content[2<<20:]}, 2<<20); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteCompressed(content[1<<20+512<<10:][:64<<10], 1<<20+512<<10); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() {
		got := make([]byte, size)
		for {
			if err := n.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, content) {
				t.Errorf("a reader is given other bytes (%v)", err)
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	const kept = 512 << 10 // stays as it is, but for whole clusters
	if err := n.Uncover(kept-1, size-kept+1); err != nil {
		t.Fatal(err)
	}
	if err := n.StoreTables(); err != nil {
		t.Fatal(err)
	}
	holds := func(path string) (sum int64) {
		t.Helper()
		n, err := Open(path, true)
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		got := make([]byte, size)
		if err := n.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, content) {
			t.Errorf("the file does not read as the disk (%v)", err)
		}
		for off := int64(0); off < size; {
			e, err := n.Map(off, size-off)
			if err != nil {
				t.Fatal(err)
			}
			if e.Depth == 0 {
				sum += e.Length
			}
			off += e.Length
		}
		return sum
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	killed := path + ".killed"
	if err := os.WriteFile(killed, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := holds(killed); got != kept {
		t.Errorf("the file holds %d bytes, of %d", got, kept)
	}
	n.Reclaim()
	if err := n.Flush(); err != nil {
		t.Fatal(err)
	}
	close(stop)
	readers.Wait()
	// They are written as any others again.
	if err := n.Writev([][]byte{content[3<<20 : 3<<20+100]}, 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if got := holds(path); got != kept+64<<10 {
		t.Errorf("the file holds %d bytes, of %d", got, kept+64<<10)
	}
	if out := qemuImg(t, "check", path); !strings.Contains(out, "No errors were found") {
		t.Error(out)
	}
}

// StoreTables waits for the disk only where the tables tell of something new.
func TestStoreTables(t *testing.T) {
	const size, cluster = 4 << 20, 64 << 10
	first, err := (&CreateOptions{Size: size, Backing: "base", BackingFormat: "raw"}).encode()
	if err != nil {
		t.Fatal(err)
	}
	var log []change
	file := &memory{b: first, log: &log}
	n, err := inMemory(t, map[string]*memory{"image": file, "base": {b: make([]byte, size), readOnly: true}}, false)
	if err != nil {
		t.Fatal(err)
	}
	data := [][]byte{bytes.Repeat([]byte{0}, cluster)}
	for i := range int64(4) {
		if err := n.Writev(data, i*cluster); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Flush(); err != nil {
		t.Fatal(err)
	}
	flushes, writes := file.flushes, file.writes
	store := func() {
		t.Helper()
		if err := n.StoreTables(); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Uncover(0, cluster); err != nil {
		t.Fatal(err)
	}
	store()
	if file.flushes != flushes || file.writes != writes+1 {
		t.Errorf("%d flushes and %d writes, want none and one", file.flushes-flushes, file.writes-writes)
	}
	// A cluster whose data is not durable is linked in the same table.
	if err := n.Writev(data, 8*cluster); err != nil {
		t.Fatal(err)
	}
	if err := n.Uncover(cluster, cluster); err != nil {
		t.Fatal(err)
	}
	log = nil
	store()
	if len(log) < 3 || !log[len(log)-1].flush {
		t.Errorf("%d changes, of which the last is no flush", len(log))
	}
	for i, c := range log {
		if linked := c.data != nil && c.at >= int64(n.l1[0]&offsetMask) && c.at < int64(n.l1[0]&offsetMask)+cluster; linked && (i == 0 || !log[i-1].flush) {
			t.Error("a table is written before what it points to is durable")
		}
	}
	flushes = file.flushes
	if err := n.Uncover(2*cluster, cluster); err != nil {
		t.Fatal(err)
	}
	store()
	if file.flushes != flushes {
		t.Error("it waits for what is durable")
	}
}
