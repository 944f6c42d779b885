package disk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// files makes a raw disk, a qcow2 image and disks that look like one.
func files(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", filepath.Join(dir, "a.qcow2"), "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	image, err := os.ReadFile(filepath.Join(dir, "a.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"plain.img":   make([]byte, 1<<20),
		"image.img":   image,
		"plain.qcow2": make([]byte, 1<<20),
		"short":       {'Q'},
		"empty":       nil,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestOpen(t *testing.T) {
	dir := files(t)
	for _, tt := range []struct {
		name   string
		o      Options
		format string // of the node that comes, or
		fails  error  // the error
		says   string
	}{
		{"plain.img", Options{}, FormatRaw, nil, ""},
		{"plain.img", Options{ReadOnly: true}, FormatRaw, nil, ""},
		{"plain.img", Options{Format: FormatRaw}, FormatRaw, nil, ""},
		{"plain.img", Options{Format: FormatQcow2, ReadOnly: true}, "", qcow2.ErrHeader, "plain.img"},
		{"short", Options{}, FormatRaw, nil, ""},
		{"empty", Options{}, FormatRaw, nil, ""},
		{"a.qcow2", Options{ReadOnly: true}, FormatQcow2, nil, ""},
		{"a.qcow2", Options{Format: FormatQcow2, ReadOnly: true}, FormatQcow2, nil, ""},
		{"a.qcow2", Options{Format: FormatRaw}, FormatRaw, nil, ""}, // the name does not outdo what is said
		{"plain.qcow2", Options{ReadOnly: true}, "", qcow2.ErrHeader, "plain.qcow2"},
		{"image.img", Options{Format: FormatQcow2, ReadOnly: true}, FormatQcow2, nil, ""},
		{"image.img", Options{Format: FormatRaw}, FormatRaw, nil, ""}, // the guest wrote that itself
		{"image.img", Options{}, "", ErrFormat, "format=qcow2"},
		{"image.img", Options{ReadOnly: true}, "", ErrFormat, "format=raw"},
		{"none", Options{}, "", os.ErrNotExist, "none"},
		{"none.qcow2", Options{ReadOnly: true}, "", os.ErrNotExist, "none.qcow2"},
		{"plain.img", Options{Format: "vmdk"}, "", ErrFormat, "vmdk"},
		{"fifo", Options{ReadOnly: true}, "", nil, "neither a regular file"},
	} {
		n, err := Open(filepath.Join(dir, tt.name), tt.o)
		if tt.format == "" {
			if n != nil || err == nil || tt.fails != nil && !errors.Is(err, tt.fails) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s %+v: %v, %v", tt.name, tt.o, n, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s %+v: %v", tt.name, tt.o, err)
			continue
		}
		if info := n.Info(); info.Format != tt.format || n.ReadOnly() != tt.o.ReadOnly {
			t.Errorf("%s %+v: %+v, read-only %v", tt.name, tt.o, info, n.ReadOnly())
		}
		if err := n.Close(); err != nil {
			t.Errorf("%s %+v: close: %v", tt.name, tt.o, err)
		}
	}
}

func TestOpenInUse(t *testing.T) {
	dir := files(t)
	for _, name := range []string{"plain.img", "a.qcow2"} {
		path := filepath.Join(dir, name)
		first, err := Open(path, Options{Format: FormatRaw})
		if err != nil {
			t.Fatal(err)
		}
		n, err := Open(path, Options{ReadOnly: true})
		if n != nil || !errors.Is(err, block.ErrInUse) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		first.Close()
	}
}
