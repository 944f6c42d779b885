package mirror

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// copying is a filter over raw disks whose pass has not begun.
func copying(t *testing.T, size int, o Options) (f *Filter, content []byte, target block.Node) {
	t.Helper()
	content = bytes.Repeat([]byte("gnomon.."), size/8)
	var nodes [2]block.Node
	for i, b := range [][]byte{content, make([]byte, size)} {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := raw.Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Close() })
		nodes[i] = n
	}
	f, err := New(nodes[0], nodes[1], o)
	if err != nil {
		t.Fatal(err)
	}
	f.turns.buf = make([]byte, f.o.Step)
	return f, content, nodes[1]
}

// The disk's user copies where that was granted, has time for it, and does not wait for
// a disk; it makes the whole pass then.
func TestTurns(t *testing.T) {
	const size = 32 << 20
	f, content, target := copying(t, size, Options{})
	bufs := [][]byte{content[:4096]}
	turns := &f.turns
	write := func() {
		if err := f.Writev(bufs, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name                  string
		granted, cost, credit int64
		want                  int64 // how far the pass comes
	}{
		{"nothing is granted", 0, 0, int64(maxTurn), 0},
		{"it would take too long", 1, int64(maxTurn) + 1, 2 * int64(maxTurn), 0},
		{"there is no time yet", 1, int64(maxTurn), 0, 0},
		{"a turn", 1, int64(maxTurn), int64(maxTurn), turnSize},
	} {
		turns.granted.Store(c.granted)
		turns.cost.Store(c.cost)
		turns.credit.Store(c.credit)
		if write(); turns.at != c.want {
			t.Errorf("%s: the pass is at %d, want %d", c.name, turns.at, c.want)
		}
	}
	turns.granted.Store(1 << 30)
	got := make([]byte, len(bufs[0]))
	for turns.at < size {
		turns.cost.Store(0)
		if err := f.Readv([][]byte{got}, 0); err != nil {
			t.Fatal(err)
		}
	}
	all := make([]byte, size)
	if err := target.Readv([][]byte{all}, 0); err != nil || !bytes.Equal(all, content) {
		t.Errorf("the copy is another (%v)", err)
	}
	if g := f.Figures(); g.Copied != size {
		t.Errorf("%d bytes were copied, of %d", g.Copied, int64(size))
	}
	write() // there is nothing to copy any more
}

// Nobody copies while the pass is held up, and what fails in a user's turn ends the
// pass, not the user's request.
func TestTurnsEnd(t *testing.T) {
	f, content, target := copying(t, 1<<20, Options{Step: clusterSize})
	pauses := 0
	f.o.Pause = func() error {
		pauses++
		at := f.turns.at
		f.turns.cost.Store(0)
		if err := f.Writev([][]byte{content[:512]}, 0); err != nil {
			t.Error(err)
		}
		if f.turns.at != at {
			t.Error("a user copies while the pass is held up")
		}
		if pauses == 3 {
			if err := target.Close(); err != nil {
				t.Error(err)
			}
			f.turns.granted.Store(1)
			f.turns.cost.Store(0)
			if err := f.Readv([][]byte{make([]byte, 512)}, 0); err != nil {
				t.Errorf("the user is told of the target's error: %v", err)
			}
		}
		return nil
	}
	if err := f.Run(context.Background()); !errors.Is(err, ErrMirror) || pauses != 3 {
		t.Errorf("%v, after %d pauses", err, pauses)
	}
}
