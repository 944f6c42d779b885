package qcow2

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
)

// The header's other extensions stay when the backing file gets another name, or goes.
func TestRenameBacking(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "top.qcow2")
	for _, name := range []string{"base", "other"} {
		if err := Create(filepath.Join(dir, name), CreateOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	if err := Create(path, CreateOptions{Size: 1 << 20, Backing: "base", BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ name, format, want string }{
		{"other", "qcow2", "backing file: other"},
		{strings.Repeat("./", 200) + "base", "qcow2", "/base"},
		{"", "", ""},
		{"base", "qcow2", "backing file: base"},
	} {
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			b, err := bitmap.New("b", n.Size(), 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.AddBitmap(b); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.Writev([][]byte{make([]byte, 4096)}, int64(i)<<16); err != nil {
			t.Fatal(err)
		}
		if err := n.RenameBacking(strings.Repeat("x", 1024), "raw"); err == nil {
			t.Error("a name of 1024 bytes is taken")
		}
		if err := n.RenameBacking(c.name, c.format); err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		if out := qemuImg(t, "check", path); !strings.Contains(out, "No errors were found") {
			t.Error(out)
		}
		info := qemuImg(t, "info", path)
		if !strings.Contains(info, c.want) || strings.Contains(info, "backing file") != (c.name != "") || i > 0 && !strings.Contains(info, "name: b") {
			t.Errorf("%q: %s", c.name, info)
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() > 1<<20 {
		t.Errorf("%v, %v", st.Size(), err)
	}
}
