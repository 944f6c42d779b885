package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk"
)

// smallFileSystem is a directory that has room for so many bytes.
func smallFileSystem(t *testing.T, size string) (dir string, grow func(size string)) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size="+size); errors.Is(err, unix.EPERM) {
		t.Skip("host feature missing: permission to mount a tmpfs: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir, func(size string) {
		if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size="+size); err != nil {
			t.Fatal(err)
		}
	}
}

// A disk for which there is no room is as large as it was, nothing is left of what was
// written, and the next time all of it is.
func TestDiskResizeWithoutRoom(t *testing.T) {
	for _, tt := range []struct{ format, preallocation, room string }{
		{"raw", "falloc", "4M"},
		{"raw", "full", "4M"},
		{"qcow2", "full", "4M"},
		{"qcow2", "full", "256K"}, // nothing but the image
		{"qcow2", "full", "1284K"},
	} {
		dir, grow := smallFileSystem(t, tt.room)
		path := filepath.Join(dir, "disk."+tt.format)
		works(t, "create", "-f", tt.format, path, "1M")
		if tt.format == "raw" { // as a file that is not whole sectors long
			if err := os.Truncate(path, 1<<20-100); err != nil {
				t.Fatal(err)
			}
		}
		space := func() (size, taken int64) {
			t.Helper()
			n, err := disk.Open(path, disk.Options{Format: tt.format, ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			return n.Size(), n.Info().ActualSize
		}
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		_, says, status := gnomonDisk(t, "resize", "-f", tt.format, "--preallocation", tt.preallocation, path, "8M")
		if status != statusError || !strings.Contains(says, path) || !strings.Contains(says, "no space left") {
			t.Errorf("%v: status %d: %s", tt, status, says)
		}
		if size, taken := space(); size != 1<<20 || taken > 512<<10 {
			t.Errorf("%v: it has %d bytes, and takes %d", tt, size, taken)
		}
		if after, err := os.Stat(path); err != nil || tt.format == "raw" && after.Size() != before.Size() {
			t.Errorf("%v: the file has %d bytes and had %d: %v", tt, after.Size(), before.Size(), err)
		}
		if tt.format == "qcow2" {
			if out, status := byQEMU(t, "check", path); status != 0 {
				t.Errorf("%v: status %d: %s", tt, status, out)
			}
		}
		grow("16M")
		works(t, "resize", "-f", tt.format, "--preallocation", tt.preallocation, path, "8M")
		if size, taken := space(); size != 8<<20 || taken < 7<<20 {
			t.Errorf("%v: with room it has %d bytes, and takes %d", tt, size, taken)
		}
	}
}
