package extfs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
	"golang.org/x/sys/unix"
)

// TestUsedWhileMounted takes disks that the kernel has mounted and writes to, as
// a power failure would leave them: the map is that after fsck's recovery.
func TestUsedWhileMounted(t *testing.T) {
	for _, args := range []string{
		"-t ext4 -b 4096 -O " + extfstest.Modern,
		"-t ext4 -b 1024 -J size=1 -O " + extfstest.Modern, // the log goes round
		"-t ext3 -b 1024 -O has_journal,filetype,sparse_super",
		"-t ext4 -b 4096 -C 16384 -O bigalloc," + extfstest.Modern,
	} {
		t.Run(args, func(t *testing.T) {
			path := extfstest.Make(t, 40<<20, strings.Fields(args)...)
			dir := t.TempDir()
			if out, err := exec.Command("mount", "-o", "loop", path, dir).CombinedOutput(); err != nil {
				t.Skipf("this host does not let us mount loop devices: %v\n%s", err, out)
			}
			defer func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			for round := range 6 {
				for i := range 40 {
					name := filepath.Join(dir, fmt.Sprintf("%d-%d", round%3, i))
					var err error
					if round%2 == 1 && i%3 == 0 {
						err = os.RemoveAll(name)
					} else {
						err = os.WriteFile(name, make([]byte, (i*7919+round*104729)%150000), 0o600)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := syncFS(dir); err != nil {
					t.Fatal(err)
				}
			}
			taken := filepath.Join(t.TempDir(), "taken")
			if err := os.WriteFile(taken, read(t, path), 0o600); err != nil {
				t.Fatal(err)
			}
			node := openRaw(t, taken)
			m, err := Used(context.Background(), node, 0, node.Size())
			if err != nil {
				t.Fatal(err)
			}
			if s := m.FileSystems()[0].State; s != Recovered {
				t.Errorf("the file system is %v", s)
			}
			node.Close()
			extfstest.Run(t, "jr\n", "debugfs", "-w", "-f", "-", taken)
			if got, want := freeOf(m), extfstest.Free(t, taken); !slices.Equal(got, want) {
				t.Errorf("free:\n%v\nafter recovery:\n%v", got, want)
			}
			extfstest.Run(t, "", "e2fsck", "-f", "-n", taken)
		})
	}
}

func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}
