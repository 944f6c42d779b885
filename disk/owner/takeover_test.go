package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const shortLease = 100 * time.Millisecond

// times does f as often as a takeover of each kind is tried, some at once: most of
// the time is spent waiting for leases.
func times(t *testing.T, f func(t *testing.T)) {
	const count, together = 50, 10
	var left atomic.Int64
	left.Store(count)
	for i := range together {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			for left.Add(-1) >= 0 && !t.Failed() {
				f(t)
			}
		})
	}
}

// elsewhere is another host that shares the directory.
func elsewhere() *host {
	return &host{boot: [16]byte(random(16)), shared: func(string) bool { return true }}
}

// takeOver opens the disk of an owner that does not answer and checks what is on it.
func takeOver(t *testing.T, path string, o Options) (*Disk, report) {
	t.Helper()
	began := time.Now()
	d, err := Open(context.Background(), path, openRaw(path), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	r := report{Took: time.Since(began), Epoch: d.Epoch()}
	for i := range r.Found {
		if r.Found[i], err = readSlot(d, i); err != nil {
			t.Fatal(err)
		}
	}
	return d, r
}

// stays checks that nothing but what r found is on the disk.
func stays(t *testing.T, d *Disk, r *report) {
	t.Helper()
	for i := range r.Found {
		s, err := readSlot(d, i)
		if err != nil || s != r.Found[i] {
			t.Errorf("slot %d: %v, %v; was %v: the old owner has written", i, s, err, r.Found[i])
		}
	}
}

// TestKilled: of a killed owner the kernel tells that it is gone; on another host
// its lease and a copy do.
func TestKilled(t *testing.T) {
	t.Parallel()
	times(t, func(t *testing.T) {
		for _, h := range []*host{&thisHost, elsewhere()} {
			path := newImage(t)
			p := startChild(t, childOptions{Path: path, Lease: shortLease})
			p.take()
			owned := p.expect("owned")
			inode := inodeOf(t, path)
			p.kill()
			d, r := takeOver(t, path, Options{Lease: shortLease, host: h})
			if r.Epoch != owned.Epoch+1 {
				t.Errorf("epoch %d after %d", r.Epoch, owned.Epoch)
			}
			if copied := inodeOf(t, path) != inode; copied != (h != &thisHost) {
				t.Errorf("the disk was copied: %v", copied)
			}
			if err := d.Writev([][]byte{stampOfWrite{r.Epoch, 1}.bytes()}, 0); err != nil {
				t.Error(err)
			}
			d.Close()
		}
	})
}

// TestFrozen: the owner is stopped between the check of its lease and the write, and
// goes on when there is another owner.
func TestFrozen(t *testing.T) {
	t.Parallel()
	var count atomic.Uint64
	times(t, func(t *testing.T) {
		path := newImage(t)
		stuck := 1 + count.Add(1)%100
		p := startChild(t, childOptions{Path: path, Lease: shortLease, Stuck: stuck})
		p.take()
		owned := p.expect("owned")
		waitStopped(t, p)
		d, r := takeOver(t, path, Options{Lease: shortLease})
		if r.Epoch != owned.Epoch+1 {
			t.Errorf("epoch %d after %d", r.Epoch, owned.Epoch)
		}
		next := stampOfWrite{r.Epoch, 1}
		slot := int((stuck - 1) % slots) // where the old owner's late write goes
		if err := d.Writev([][]byte{next.bytes()}, int64(slot)*slotSize); err != nil {
			t.Fatal(err)
		}
		p.cmd.Process.Signal(syscall.SIGCONT)
		ended := p.expect("ended")
		if ended.Count != stuck-1 || ended.Tried[slot] != (stampOfWrite{owned.Epoch, stuck}) || ended.Again == "" {
			t.Errorf("thawed in write %d of slot %d: %d writes acknowledged, tried %v, then %q", stuck, slot, ended.Count, ended.Tried[slot], ended.Again)
		}
		if err := r.sameAs(&ended); err != nil {
			t.Error(err)
		}
		r.Found[slot] = next
		stays(t, d, &r)
		p.kill()
		d.Close()
	})
}

// TestCutOff: the owner runs but cannot be reached. It notices the claim and
// lets go in order, so its file stays.
func TestCutOff(t *testing.T) {
	t.Parallel()
	times(t, func(t *testing.T) {
		for _, h := range []*host{&thisHost, elsewhere()} {
			path := newImage(t)
			inode := inodeOf(t, path)
			p := startChild(t, childOptions{Path: path, Lease: shortLease, Deaf: true})
			p.take()
			owned := p.expect("owned")
			d, r := takeOver(t, path, Options{Lease: shortLease, host: h})
			ended := p.expect("ended")
			if err := r.sameAs(&ended); err != nil {
				t.Error(err)
			}
			if r.Epoch != owned.Epoch+1 || ended.Again == "" {
				t.Errorf("epoch %d after %d; then %q", r.Epoch, owned.Epoch, ended.Again)
			}
			if h != &thisHost && inodeOf(t, path) == inode {
				t.Error("an owner that cannot be seen keeps the file")
			}
			stays(t, d, &r)
			p.kill()
			d.Close()
		}
	})
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// waitStopped waits until the kernel says that the child is stopped.
func waitStopped(t *testing.T, p *process) {
	t.Helper()
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, &info, unix.WSTOPPED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(os.NewSyscallError("waitid", err))
		}
		return
	}
}
