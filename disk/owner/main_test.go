package owner

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

const childVariable = "GNOMON_OWNER_TEST_CHILD"

func TestMain(m *testing.M) {
	if s := os.Getenv(childVariable); s != "" {
		child(s)
		return
	}
	flag.Parse()
	flag.Set("test.parallel", "20") // most tests wait for leases most of the time
	os.Exit(m.Run())
}

func openRaw(path string) func() (block.Node, error) {
	return func() (block.Node, error) {
		n, err := raw.Open(path, false)
		if err != nil {
			return nil, err
		}
		return n, nil
	}
}

const (
	slots    = 64
	slotSize = 512
)

func newImage(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, slots*slotSize), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// stampOfWrite is what a write leaves in its slot.
type stampOfWrite struct{ Epoch, Sequence uint64 }

func (s stampOfWrite) bytes() []byte {
	b := make([]byte, slotSize)
	for at := 0; at < slotSize; at += 16 { // all over the slot: half a write shows
		binary.LittleEndian.PutUint64(b[at:], s.Epoch)
		binary.LittleEndian.PutUint64(b[at+8:], s.Sequence)
	}
	return b
}

func readSlot(n block.Node, slot int) (stampOfWrite, error) {
	b := make([]byte, slotSize)
	if err := n.Readv([][]byte{b}, int64(slot)*slotSize); err != nil {
		return stampOfWrite{}, err
	}
	s := stampOfWrite{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
	if string(b) != string(s.bytes()) {
		return s, fmt.Errorf("slot %d holds parts of several writes", slot)
	}
	return s, nil
}

// childOptions say what a child process does.
type childOptions struct {
	Path    string
	Lease   time.Duration
	Address string
	// Deaf children lose their listener once they own the disk.
	Deaf bool
	// Stuck: the child's node freezes its process in the middle of its write
	// number Stuck, after the lease was found valid, and then writes.
	Stuck uint64
}

// report is a line of a child: what it found when it took the disk, and what it
// wrote until it had to let go.
type report struct {
	Event string // "owned", "ended", "failed"
	Error string
	Epoch uint64
	Took  time.Duration // for Open
	// Closing is how long the node took to close and so to flush.
	Closing time.Duration
	Found   [slots]stampOfWrite
	// Acked are the last acknowledged writes, Tried one that failed later.
	Acked, Tried [slots]stampOfWrite
	Count        uint64
	Again        string // the error of a write tried at the end
}

// stuckNode stops its process before a write reaches the file.
type stuckNode struct {
	block.Node
	at    uint64
	count uint64
}

func (n *stuckNode) Writev(bufs [][]byte, off int64) error {
	if n.count++; n.count == n.at {
		runtime.LockOSThread() // a signal to the own thread has come when the call returns
		unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
		runtime.UnlockOSThread()
	}
	return n.Node.Writev(bufs, off)
}

// timedNode tells how long it took to close.
type timedNode struct {
	block.Node
	closing time.Duration
}

func (n *timedNode) Close() error {
	began := time.Now()
	err := n.Node.Close()
	n.closing = time.Since(began)
	return err
}

// child owns the disk at each line of its input and writes until it is told to let go.
func child(arguments string) {
	var o childOptions
	if err := json.Unmarshal([]byte(arguments), &o); err != nil {
		panic(err)
	}
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for in.Scan() {
		var r report
		began := time.Now()
		timed := &timedNode{}
		opener := func() (block.Node, error) {
			n, err := openRaw(o.Path)()
			timed.Node = n
			return timed, err
		}
		if o.Stuck > 0 {
			opener = func() (block.Node, error) {
				n, err := openRaw(o.Path)()
				return &stuckNode{Node: n, at: o.Stuck}, err
			}
		}
		d, err := Open(context.Background(), o.Path, opener, Options{Lease: o.Lease, Address: o.Address})
		r.Took = time.Since(began)
		if err != nil {
			out.Encode(report{Event: "failed", Error: err.Error()})
			continue
		}
		if o.Deaf {
			d.server.listener.Close()
		}
		r.Event, r.Epoch = "owned", d.Epoch()
		for i := range r.Found {
			if r.Found[i], err = readSlot(d, i); err != nil {
				break
			}
		}
		if err != nil {
			out.Encode(report{Event: "failed", Error: err.Error()})
			continue
		}
		out.Encode(r)
		r.Event, r.Acked = "ended", r.Found
		if err := writeOn(d, &r); err != nil {
			r.Error = err.Error()
		}
		<-d.Done()
		r.Closing = timed.closing
		if err := d.Writev([][]byte{make([]byte, slotSize)}, 0); err != nil {
			r.Again = err.Error()
		}
		out.Encode(r)
		d.Close()
	}
}

// writeOn writes to one slot after the other until the disk is gone. Each slot has
// to hold what was written there last: else there is another writer.
func writeOn(d *Disk, r *report) error {
	for {
		slot := int(r.Count % slots)
		s, err := readSlot(d, slot)
		if errors.Is(err, ErrReleased) || errors.Is(err, ErrLost) {
			return nil
		}
		if err != nil {
			return err
		}
		if s != r.Acked[slot] {
			return fmt.Errorf("two writers: epoch %d finds %v in slot %d where it had %v", r.Epoch, s, slot, r.Acked[slot])
		}
		next := stampOfWrite{r.Epoch, r.Count + 1}
		err = d.Writev([][]byte{next.bytes()}, int64(slot)*slotSize)
		if errors.Is(err, ErrReleased) || errors.Is(err, ErrLost) {
			r.Tried[slot] = next
			return nil
		}
		if err != nil {
			return err
		}
		r.Acked[slot] = next
		r.Count++
	}
}

// process is a child as its parent sees it.
type process struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
	end sync.Once
}

func startChild(t testing.TB, o childOptions) *process {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), childVariable+"="+string(b), "GOMAXPROCS=2")
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = json.NewDecoder(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.end.Do(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
}

func (p *process) take() {
	if _, err := io.WriteString(p.in, "take\n"); err != nil {
		p.t.Error(err)
	}
}

func (p *process) expect(event string) report {
	p.t.Helper()
	var r report
	if err := p.out.Decode(&r); err != nil {
		p.t.Errorf("waiting for %s: %v", event, err)
		return r
	}
	if r.Event != event || r.Error != "" {
		p.t.Errorf("%s, epoch %d: %s; want %s", r.Event, r.Epoch, r.Error, event)
	}
	return r
}

// sameAs tells where what was found differs from what was acknowledged. A write that was
// not acknowledged may be there or not.
func (r *report) sameAs(before *report) error {
	var wrong []string
	for i, f := range r.Found {
		if f != before.Acked[i] && (before.Tried[i].Epoch == 0 || f != before.Tried[i]) {
			wrong = append(wrong, fmt.Sprintf("slot %d: %v, acknowledged was %v", i, f, before.Acked[i]))
		}
	}
	if wrong != nil {
		return errors.New(strings.Join(wrong, "; "))
	}
	return nil
}
