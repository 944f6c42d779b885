package mirror_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

const (
	killedSize  = 8 << 20
	killedBlock = 4 << 10
	killedEnv   = "GNOMON_TEST_CONSOLIDATE" // the overlay that this process writes and consolidates
)

func TestMain(m *testing.M) {
	if path := os.Getenv(killedEnv); path != "" {
		if err := writeAndConsolidate(path); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// place is where the n-th write goes.
func place(n uint64) int64 {
	return int64(rand.New(rand.NewPCG(n, 7)).Uint64N(killedSize/killedBlock)) * killedBlock
}

// writeAndConsolidate writes numbered blocks and says which are durable, while the
// overlay is consolidated, until it is killed.
func writeAndConsolidate(path string) error {
	var first uint64
	fmt.Sscan(os.Getenv(killedEnv+"_FROM"), &first)
	n, err := qcow2.Open(path, false)
	if err != nil {
		return err
	}
	root := block.NewRoot(n)
	failed := make(chan error, 1)
	go func() {
		buf := make([]byte, killedBlock)
		for i := first; ; i++ {
			for at := 0; at < len(buf); at += 8 {
				binary.LittleEndian.PutUint64(buf[at:], i)
			}
			err := root.Writev([][]byte{buf}, place(i))
			if err == nil && i%8 == 7 {
				if err = root.Flush(); err == nil {
					fmt.Println(i)
				}
			}
			if err != nil {
				failed <- err
				return
			}
		}
	}()
	c, err := mirror.Consolidate(root, mirror.Options{Pause: func() error {
		time.Sleep(250 * time.Microsecond) // so that most are killed in the middle
		return nil
	}})
	if err != nil {
		return err
	}
	if err := c.Run(context.Background()); err != nil {
		return err
	}
	if err := c.Finish(); err != nil {
		return err
	}
	fmt.Println("finished")
	return <-failed
}

// A process that is killed at any time while it consolidates loses nothing that was
// flushed, and the disk's name is the disk's still.
func TestKilledWhileConsolidating(t *testing.T) {
	const kills = 40
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "overlay.qcow2")
	if err := qcow2.Create(base, qcow2.CreateOptions{Size: killedSize}); err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: killedSize, Backing: base, BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(3, 4))
	least := map[int64]uint64{} // the number that a place has at least
	next, finished := uint64(1), 0
	for kill := range kills {
		// What the overlay holds from the round before is what is consolidated.
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killedEnv+"="+path, fmt.Sprint(killedEnv, "_FROM=", next))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(10+random.IntN(120))*time.Millisecond, func() { cmd.Process.Kill() })
		durable := uint64(0)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			text := lines.Text()
			switch {
			case strings.HasPrefix(text, "error"):
				t.Errorf("kill %d: %s", kill, text)
			case text == "finished":
				finished++
			default:
				fmt.Sscan(text, &durable)
			}
		}
		cmd.Wait()
		timer.Stop()
		for i := next; i <= durable; i++ {
			least[place(i)] = i
		}
		n, err := qcow2.Open(path, true)
		if err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		buf := make([]byte, killedBlock)
		for at, want := range least {
			if err := n.Readv([][]byte{buf}, at); err != nil {
				t.Fatal(err)
			}
			got := binary.LittleEndian.Uint64(buf)
			if got < want || place(got) != at {
				t.Fatalf("kill %d: at %d is write %d, and %d was flushed", kill, at, got, want)
			}
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		next = max(next, durable+1) + 100000 // numbers that were written and not told do not come again
		next += 8 - next%8
	}
	t.Logf("%d of %d were killed after the end", finished, kills)
	if finished == 0 || finished == kills {
		t.Errorf("%d of %d were killed after the end: the kills were not spread", finished, kills)
	}
}
