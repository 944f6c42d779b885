package qcow2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// chainOf makes 0.qcow2, and n-1 more images that each lie on the one before.
func chainOf(t *testing.T, dir string, n int) (top string) {
	t.Helper()
	for i := range n {
		o := CreateOptions{Size: 1 << 20, ClusterSize: 4096}
		if i > 0 {
			o.Backing, o.BackingFormat = filepath.Base(top), "qcow2"
		}
		top = filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		if err := Create(top, o); err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
	}
	return top
}

// refused wants an error that says what to do about a chain that is too long.
func refused(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, ErrBacking) || !strings.Contains(err.Error(), "gnomon disk consolidate") || !strings.Contains(err.Error(), "--disks copy") {
		t.Errorf("%s: %v", what, err)
	}
}

// What cannot be opened is not made either: the longest chain that can be opened takes
// no image more, in whatever way, and is as it was then.
func TestChainLimit(t *testing.T) {
	dir := t.TempDir()
	top := chainOf(t, dir, maxChain)
	node := mustOpen(t, top)
	defer node.Close()
	at := filepath.Join(dir, "more.qcow2")
	refused(t, "create by a relative name", Create(at, CreateOptions{Size: 1 << 20, Backing: filepath.Base(top), BackingFormat: "qcow2"}))
	refused(t, "create by an absolute name", Create(at, CreateOptions{Size: 1 << 20, Backing: top, BackingFormat: "qcow2"}))
	refused(t, "create over a node", CreateOver(at, node))
	refused(t, "room over a node", RoomOver(node))
	if files, err := filepath.Glob(filepath.Join(dir, "*more*")); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v %v", files, err)
	}
	// One image less leaves room for one.
	if err := RoomBelow(at, "62.qcow2", "qcow2"); err != nil {
		t.Error(err)
	}
	if err := RoomOver(node.Backing()); err != nil {
		t.Error(err)
	}
	// The name alone is not changed to one that leads too far either.
	if err := Create(at, CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	was, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	for _, only := range []bool{false, true} {
		refused(t, "rebase", Rebase(context.Background(), at, RebaseOptions{Backing: top, BackingFormat: "qcow2", NameOnly: only}))
	}
	if now, err := os.ReadFile(at); err != nil || string(now) != string(was) {
		t.Error("a refused rebase changed the image")
	}
}

// An image that lies on what cannot be opened is refused, whatever is wrong below it.
func TestRebaseBrokenChain(t *testing.T) {
	for what, spoil := range map[string]func(t *testing.T, dir string){
		"an image in the middle is missing": func(t *testing.T, dir string) {
			chainOf(t, dir, 4)
			if err := os.Remove(filepath.Join(dir, "1.qcow2")); err != nil {
				t.Fatal(err)
			}
		},
		"an image in the middle is none": func(t *testing.T, dir string) {
			chainOf(t, dir, 4)
			writeFile(t, filepath.Join(dir, "2.qcow2"), make([]byte, 4096))
		},
		"there are too many": func(t *testing.T, dir string) {
			qemu(t, dir, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", filepath.Base(chainOf(t, dir, maxChain)), "-F", "qcow2", "top.qcow2", "1M")
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			spoil(t, dir)
			top := filepath.Join(dir, "top.qcow2")
			if _, err := os.Stat(top); err != nil {
				top = filepath.Join(dir, "3.qcow2")
			}
			before := descriptors(t)
			if err := Rebase(context.Background(), top, RebaseOptions{}); err == nil {
				t.Error("it is rebased")
			}
			if n, err := Open(top, false); err == nil || n != nil {
				t.Errorf("it is opened: %v", err)
			}
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}
