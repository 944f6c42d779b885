package model

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/stream"
)

const (
	killedSize  = 8 << 20
	killedBlock = 4 << 10
	killedStep  = 64 << 10
	killedEnv   = "GNOMON_TEST_KILLED"       // the job of the process that is to be killed
	killedImage = "GNOMON_TEST_KILLED_IMAGE" // the disk's own image
	killedFirst = "GNOMON_TEST_KILLED_FIRST" // the number of its first write
)

// place is where the n-th write goes.
func place(n uint64) int64 {
	return int64(rand.New(rand.NewPCG(n, 7)).Uint64N(killedSize/killedBlock)) * killedBlock
}

// writeAndWork writes numbered blocks and says which are durable, while a job works
// on the disk, until it is killed.
func writeAndWork(job string) error {
	var first uint64
	fmt.Sscan(os.Getenv(killedFirst), &first)
	n, err := qcow2.Open(os.Getenv(killedImage), false)
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
					fmt.Println("durable", i)
				}
			}
			if err != nil {
				failed <- err
				return
			}
		}
	}()
	if err := work(job, root, n, first); err != nil {
		return err
	}
	fmt.Println("finished")
	return <-failed
}

// work does a job and says how far it is.
func work(job string, root *block.Root, n *qcow2.Node, seed uint64) error {
	pause := func() error {
		fmt.Println("step")
		return nil
	}
	depth := 0
	for i := n.Info().Backing; i != nil; i = i.Backing {
		depth++
	}
	r := rand.New(rand.NewPCG(seed, 9))
	var pass func(context.Context) error
	var finish func() error
	switch job {
	case "consolidate":
		c, err := mirror.Consolidate(root, mirror.Options{Step: killedStep, Depth: 1 + r.IntN(depth), Pause: pause})
		if err != nil {
			return err
		}
		pass, finish = c.Run, c.Finish
	case "middle":
		top := 1 + r.IntN(depth-1)
		m, err := mirror.NewMiddle(root, mirror.MiddleOptions{
			Options: mirror.Options{Step: killedStep, Depth: top + 1 + r.IntN(depth-top), Pause: pause}, Top: top,
		})
		if err != nil {
			return err
		}
		pass, finish = m.Run, m.Finish
	case "stream":
		o := stream.Options{Pause: pause}
		if r.IntN(2) == 0 {
			o.Depth = 2 + r.IntN(depth-1)
		}
		f, err := stream.New(n, o)
		if err != nil {
			return err
		}
		root.Swap(f)
		pass = f.Run
		finish = func() (err error) {
			root.Drained(func(block.Node) block.Node {
				_, err = f.Finish()
				return n
			})
			return err
		}
	}
	if err := pass(context.Background()); err != nil {
		return err
	}
	fmt.Println("ran")
	return finish()
}

// A process that is killed at any time of a job loses nothing that was flushed, and
// the disk's image is the disk's still.
func TestKilled(t *testing.T) {
	const kills = 50
	for i, job := range []string{"consolidate", "middle", "stream"} {
		t.Run(job, func(t *testing.T) {
			k := &killed{t: t, job: job, dir: workDir(t), r: rand.New(rand.NewPCG(3, uint64(i))), next: 8, least: map[int64]uint64{}}
			for range kills {
				k.lengthen(4)
				k.kill()
				k.look()
			}
			t.Logf("killed before %d steps, before a pass's end %d, after the job's %d", k.inPass, k.atEnd, k.finished)
			if k.inPass == 0 || k.atEnd == 0 || k.finished == 0 {
				t.Error("the kills were not spread")
			}
		})
	}
}

// killed is a disk that a process writes which is killed again and again.
type killed struct {
	t      *testing.T
	job    string
	dir    string
	r      *rand.Rand
	images []string         // all that were made; the last is the disk's own
	next   uint64           // the number of the next write
	least  map[int64]uint64 // the number that a place has at least

	kills, inPass, atEnd, finished int
}

func (k *killed) path() string { return k.images[len(k.images)-1] }

// lengthen adds images until the chain has n.
func (k *killed) lengthen(n int) {
	k.t.Helper()
	for have := len(k.chain()); have < n; have++ {
		o := qcow2.CreateOptions{Size: killedSize}
		if len(k.images) > 0 {
			o.Backing, o.BackingFormat = k.path(), "qcow2"
		}
		k.images = append(k.images, filepath.Join(k.dir, fmt.Sprintf("%d.qcow2", len(k.images))))
		if err := qcow2.Create(k.path(), o); err != nil {
			k.t.Fatal(err)
		}
	}
}

// chain are the images on which the disk's own lies, and itself.
func (k *killed) chain() (all []string) {
	k.t.Helper()
	if len(k.images) == 0 {
		return nil
	}
	n, err := qcow2.Open(k.path(), true)
	if err != nil {
		k.t.Fatalf("kill %d: %v", k.kills, err)
	}
	defer n.Close()
	info := n.Info()
	for i := &info; i != nil; i = i.Backing {
		all = append(all, i.Filename)
	}
	return all
}

// kill starts the process and kills it, at some step of the pass, when the pass has
// ended, or when the job has, and a random moment later.
func (k *killed) kill() {
	k.t.Helper()
	k.kills++
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), killedEnv+"="+k.job, killedImage+"="+k.path(), fmt.Sprint(killedFirst, "=", k.next))
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		k.t.Fatal(err)
	}
	steps := killedSize / killedStep
	if k.job == "stream" {
		steps = killedSize >> 20
	}
	when := k.r.IntN(1 + k.r.IntN(steps)) // most passes have fewer
	switch k.r.IntN(6) {
	case 0:
		when = steps // never: the pass's end comes first
	case 1:
		when = 2 * steps // never, and not the pass's end either
	}
	end := func() {
		time.Sleep(time.Duration(k.r.IntN(2000)) * time.Microsecond) // anywhere in what it does now
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			k.t.Error(err)
		}
	}
	durable, seen, dead := k.next-1, 0, false
	last := ""
	for lines := bufio.NewScanner(out); lines.Scan(); {
		text := lines.Text()
		switch {
		case strings.HasPrefix(text, "error"):
			k.t.Errorf("kill %d: %s", k.kills, text)
		case strings.HasPrefix(text, "durable "):
			fmt.Sscan(text[len("durable "):], &durable)
			continue
		}
		last = text
		if text == "step" {
			seen++
		}
		if !dead && (text == "step" && seen > when || text == "ran" && when <= steps || text == "finished") {
			end()
			dead = true
		}
	}
	// Killed, or through with everything just before; it must not have ended otherwise.
	if err := cmd.Wait(); err != nil && cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		k.t.Errorf("kill %d: %v", k.kills, err)
	}
	switch last {
	case "step":
		k.inPass++
	case "ran":
		k.atEnd++
	case "finished":
		k.finished++
	}
	for i := k.next; i <= durable; i++ {
		k.least[place(i)] = i
	}
	// Numbers that were written and not told do not come again.
	k.next = (durable+100000)/8*8 + 8
}

// look finds what was durable, and images that are whole.
func (k *killed) look() {
	k.t.Helper()
	n, err := qcow2.Open(k.path(), true)
	if err != nil {
		k.t.Fatalf("kill %d: %v", k.kills, err)
	}
	defer n.Close()
	buf := make([]byte, killedBlock)
	for at, want := range k.least {
		if err := n.Readv([][]byte{buf}, at); err != nil {
			k.t.Fatal(err)
		}
		got := binary.LittleEndian.Uint64(buf)
		if got < want || place(got) != at {
			k.t.Fatalf("kill %d: at %d is write %d, and %d was flushed", k.kills, at, got, want)
		}
	}
	if k.kills%5 != 0 {
		return
	}
	for _, path := range k.chain() {
		if stdout, stderr, status := run(k.t, k.dir, "qemu-img", "check", path); status != 0 && status != 3 { // 3: leaks
			k.t.Fatalf("kill %d: %s%s", k.kills, stdout, stderr)
		}
	}
}
