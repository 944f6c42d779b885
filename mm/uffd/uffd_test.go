package uffd

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const page = 4096

// watched is a memfd of pages mapped twice, as guest memory is; one mapping is
// for registering, the other for us.
type watched struct {
	*FD
	fd          int
	guest, host []byte
	addr        uintptr // of guest
}

func newWatched(t testing.TB, pages int, features Features, mode Mode) *watched {
	t.Helper()
	u, err := Open(features)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &watched{FD: u}
	if w.fd, err = unix.MemfdCreate("uffd-test", unix.MFD_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(w.fd) })
	if err := unix.Ftruncate(w.fd, int64(pages*page)); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*[]byte{&w.guest, &w.host} {
		if *m, err = unix.Mmap(w.fd, 0, pages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Munmap(*m) })
	}
	w.addr = Address(w.guest)
	if mode != 0 {
		if err := u.Register(w.addr, uintptr(len(w.guest)), mode); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// access is one that the kernel makes for us, so that no goroutine sleeps in a
// page fault, where it could not be preempted. The bytes or the error follow.
type access chan result

type result struct {
	bytes [8]byte
	err   error
}

func (w *watched) read(pageIndex int) access {
	a := make(access, 1)
	go func() {
		var r result
		n, err := unix.ProcessVMReadv(unix.Getpid(), []unix.Iovec{{Base: &r.bytes[0], Len: 8}}, []unix.RemoteIovec{{Base: w.addr + uintptr(pageIndex*page), Len: 8}}, 0)
		if r.err = err; err == nil && n != 8 {
			r.err = unix.EIO
		}
		a <- r
	}()
	return a
}

func (w *watched) write(pageIndex int, b byte) access {
	a := make(access, 1)
	go func() {
		r := result{bytes: [8]byte{b, b, b, b, b, b, b, b}}
		_, r.err = unix.ProcessVMWritev(unix.Getpid(), []unix.Iovec{{Base: &r.bytes[0], Len: 8}}, []unix.RemoteIovec{{Base: w.addr + uintptr(pageIndex*page), Len: 8}}, 0)
		a <- r
	}()
	return a
}

func (a access) want(t *testing.T, b byte) {
	t.Helper()
	r := <-a
	if r.err != nil || r.bytes != [8]byte{b, b, b, b, b, b, b, b} {
		t.Fatalf("the access gives %x, %v; want %x", r.bytes, r.err, b)
	}
}

// fault reads one fault, and wants it at a page.
func (w *watched) fault(t *testing.T, pageIndex int) Fault {
	t.Helper()
	var f [4]Fault
	n, err := w.ReadFaults(f[:])
	if err != nil || n != 1 || f[0].Addr != w.addr+uintptr(pageIndex*page) {
		t.Fatalf("fault %+v, %d of them, %v; want one at page %d, %#x", f[0], n, err, pageIndex, w.addr+uintptr(pageIndex*page))
	}
	return f[0]
}

func filled(pages int, b byte) []byte { return bytes.Repeat([]byte{b}, pages*page) }

func (w *watched) at(pageIndex int) uintptr { return w.addr + uintptr(pageIndex*page) }

func TestCopyAnswersFault(t *testing.T) {
	w := newWatched(t, 8, FeatureMissingShmem, Missing)
	a := w.read(3)
	if f := w.fault(t, 3); f.Write || f.WP || f.Minor {
		t.Errorf("a read is told as %+v", f)
	}
	if n, err := w.Copy(w.at(2), filled(3, 7), 0); n != 3*page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	a.want(t, 7)
	if !bytes.Equal(w.host[2*page:5*page], filled(3, 7)) {
		t.Error("the other mapping has other bytes")
	}
	// Up to the page that is there, and no further.
	if n, err := w.Copy(w.at(0), filled(6, 9), 0); n != 2*page || err != unix.EEXIST {
		t.Fatalf("%d, %v", n, err)
	}
	if w.host[0] != 9 || w.host[2*page] != 7 || w.host[5*page] != 0 {
		t.Error("the copy went past a page that was there")
	}
	// Page 5 came into being by the line above; the guest's mapping takes it as it is.
	w.read(5).want(t, 0)
	a = w.write(6, 4)
	if f := w.fault(t, 6); !f.Write {
		t.Errorf("a write is told as %+v", f)
	}
	if n, err := w.ZeroPage(w.at(6), page, false); n != page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	a.want(t, 4)
	if w.host[6*page] != 4 || w.host[6*page+8] != 0 {
		t.Error("the write did not reach the other mapping")
	}
	if n, err := w.ZeroPage(w.at(5), 3*page, false); n != 0 || err != unix.EEXIST {
		t.Errorf("zeros over a page: %d, %v", n, err)
	}
	// A page punched out is missing again.
	if err := unix.Fallocate(w.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 3*page, page); err != nil {
		t.Fatal(err)
	}
	a = w.read(3)
	w.fault(t, 3)
	if _, err := w.ZeroPage(w.at(3), page, false); err != nil {
		t.Fatal(err)
	}
	a.want(t, 0)
}

func TestDontWake(t *testing.T) {
	w := newWatched(t, 8, FeatureMissingShmem, Missing)
	a, b := w.read(1), w.read(1)
	for told := 0; told < 2; {
		var f [2]Fault
		n, err := w.ReadFaults(f[:])
		if err != nil {
			t.Fatal(err)
		}
		told += n
	}
	if _, err := w.Copy(w.at(1), filled(1, 5), CopyDontWake); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a:
		t.Error("woken though told not to")
	case <-b:
		t.Error("woken though told not to")
	default:
	}
	if err := w.Wake(w.at(0), 8*page); err != nil {
		t.Fatal(err)
	}
	a.want(t, 5)
	b.want(t, 5)
}

func TestWriteProtect(t *testing.T) {
	w := newWatched(t, 8, FeatureWP|FeatureWPShmem|FeatureMissingShmem, WP|Missing)
	if n, err := w.Copy(w.at(0), filled(4, 1), 0); n != 4*page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	w.write(0, 2).want(t, 2)
	if err := w.WriteProtect(w.at(0), 8*page, true, false); err != nil {
		t.Fatal(err)
	}
	w.read(0).want(t, 2)
	a := w.write(0, 3)
	if f := w.fault(t, 0); !f.WP || !f.Write {
		t.Errorf("told as %+v", f)
	}
	if w.host[0] != 2 {
		t.Error("the write came through")
	}
	if err := w.WriteProtect(w.at(0), page, false, false); err != nil {
		t.Fatal(err)
	}
	a.want(t, 3)
	a = w.write(1, 4)
	w.fault(t, 1)
	if err := w.WriteProtect(w.at(1), page, false, true); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a:
		t.Error("woken though told not to")
	default:
	}
	if err := w.Wake(w.at(1), page); err != nil {
		t.Fatal(err)
	}
	a.want(t, 4)
	// A copy can leave its pages protected.
	if _, err := w.Copy(w.at(4), filled(1, 6), CopyWP); err != nil {
		t.Fatal(err)
	}
	a = w.write(4, 7)
	if f := w.fault(t, 4); !f.WP {
		t.Errorf("told as %+v", f)
	}
	if err := w.WriteProtect(w.at(4), page, false, false); err != nil {
		t.Fatal(err)
	}
	a.want(t, 7)
}

// TestWriteProtectHole: a page of a memfd that is not there yet can be
// protected, so that its first write is told.
func TestWriteProtectHole(t *testing.T) {
	w := newWatched(t, 2, FeatureWP|FeatureWPShmem|FeatureWPUnpopulated, WP)
	if err := w.WriteProtect(w.at(0), 2*page, true, false); err != nil {
		t.Fatal(err)
	}
	a := w.write(1, 3)
	if f := w.fault(t, 1); !f.WP {
		t.Errorf("told as %+v", f)
	}
	if err := w.WriteProtect(w.at(1), page, false, false); err != nil {
		t.Fatal(err)
	}
	a.want(t, 3)
}

func TestContinue(t *testing.T) {
	w := newWatched(t, 4, FeatureMinorShmem|FeatureMissingShmem, Missing|Minor)
	copy(w.host[page:], filled(1, 8))
	a := w.read(1)
	if f := w.fault(t, 1); !f.Minor {
		t.Errorf("told as %+v", f)
	}
	if n, err := w.Continue(w.at(1), 2*page, false); n != page || err != unix.EFAULT {
		t.Errorf("one of two pages is in the memfd: %d, %v", n, err)
	}
	a.want(t, 8)
	if n, err := w.Continue(w.at(1), page, true); n != 0 || err != unix.EEXIST {
		t.Errorf("mapped already: %d, %v", n, err)
	}
}

func TestThreadID(t *testing.T) {
	w := newWatched(t, 4, FeatureMissingShmem|FeatureThreadID, Missing)
	a := w.read(1)
	if f := w.fault(t, 1); f.Thread == 0 {
		t.Errorf("told as %+v", f)
	}
	if _, err := w.Copy(w.at(1), filled(1, 1), 0); err != nil {
		t.Fatal(err)
	}
	a.want(t, 1)
}

// TestCloseFreesEverybody: a reader that sleeps returns, and whoever waits for
// an answer goes on.
func TestCloseFreesEverybody(t *testing.T) {
	w := newWatched(t, 4, FeatureMissingShmem, Missing)
	a := w.read(2)
	w.fault(t, 2)
	readers := make(chan error, 2)
	for range cap(readers) {
		go func() {
			_, err := w.ReadFaults(make([]Fault, 1))
			readers <- err
		}()
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for range cap(readers) {
		if err := <-readers; !errors.Is(err, ErrClosed) {
			t.Errorf("a reader got %v", err)
		}
	}
	a.want(t, 0)
	if err := w.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := w.ReadFaults(make([]Fault, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if _, err := w.Copy(w.at(0), filled(1, 1), 0); err != unix.EBADF {
		t.Errorf("copy after close: %v", err)
	}
	if err := w.Wake(w.at(0), page); err != unix.EBADF {
		t.Errorf("wake after close: %v", err)
	}
}

func TestUnregisterFreesTheRange(t *testing.T) {
	w := newWatched(t, 4, FeatureMissingShmem, Missing)
	a := w.read(1)
	w.fault(t, 1)
	if err := w.Unregister(w.addr, 4*page); err != nil {
		t.Fatal(err)
	}
	a.want(t, 0)
	w.read(2).want(t, 0)
	if n, err := w.Copy(w.at(3), filled(1, 1), 0); n != 0 || err != unix.ENOENT {
		t.Errorf("copy into what is not registered: %d, %v", n, err)
	}
	if err := w.WriteProtect(w.at(3), page, true, false); err != unix.ENOENT {
		t.Errorf("protect what is not registered: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	if _, err := Open(1 << 60); !errors.Is(err, ErrOpen) || !strings.Contains(err.Error(), "0x1000000000000000") {
		t.Errorf("%v", err)
	}
	w := newWatched(t, 4, FeatureMissingShmem, Missing)
	if err := w.Register(w.addr+1, page, Missing); !errors.Is(err, ErrRegister) || !errors.Is(err, unix.EINVAL) {
		t.Errorf("unaligned: %v", err)
	}
	other, err := Open(FeatureMissingShmem)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Register(w.addr, page, Missing); !errors.Is(err, ErrRegister) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("watched by somebody else: %v", err)
	}
	if n, err := w.Copy(w.addr, make([]byte, 100), 0); n != 0 || err != unix.EINVAL {
		t.Errorf("less than a page: %d, %v", n, err)
	}
	if n, err := w.Copy(w.addr, nil, 0); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
	if s := (FeatureWP | FeatureMinorShmem | 1<<50).String(); s != "PAGEFAULT_FLAG_WP|MINOR_SHMEM|0x4000000000000" {
		t.Errorf("features %s", s)
	}
}

func TestNoAllocations(t *testing.T) {
	const runs = 20
	w := newWatched(t, runs+2, FeatureWP|FeatureWPShmem|FeatureMissingShmem, Missing|WP)
	// One thread makes all accesses; the pages come by the channel.
	next := make(chan int)
	done := make(chan error)
	go func() {
		var b [8]byte
		local, remote := []unix.Iovec{{Base: &b[0], Len: 8}}, []unix.RemoteIovec{{Len: 8}}
		for i := range next {
			remote[0].Base = w.at(i)
			_, err := unix.ProcessVMReadv(unix.Getpid(), local, remote, 0)
			done <- err
		}
	}()
	src := filled(1, 3)
	faults := make([]Fault, 8)
	i := 0
	var failed error
	allocs := testing.AllocsPerRun(runs, func() {
		next <- i
		if _, err := w.ReadFaults(faults); err != nil {
			failed = err
		}
		if _, err := w.Copy(faults[0].Addr, src, 0); err != nil {
			failed = err
		}
		if err := <-done; err != nil {
			failed = err
		}
		if err := w.WriteProtect(w.at(i), page, true, false); err != nil {
			failed = err
		}
		if err := w.Wake(w.at(i), page); err != nil {
			failed = err
		}
		if _, err := w.Copy(w.at(i), src, 0); err != unix.EEXIST {
			failed = err
		}
		i++
	})
	close(next)
	if failed != nil {
		t.Fatal(failed)
	}
	if allocs != 0 {
		t.Errorf("%v allocations a fault", allocs)
	}
}

func BenchmarkFault(b *testing.B) {
	w := newWatched(b, b.N+1, FeatureMissingShmem, Missing)
	go func() {
		var x [8]byte
		local, remote := []unix.Iovec{{Base: &x[0], Len: 8}}, []unix.RemoteIovec{{Len: 8}}
		for i := range b.N {
			remote[0].Base = w.at(i)
			unix.ProcessVMReadv(unix.Getpid(), local, remote, 0)
		}
	}()
	src := filled(1, 3)
	faults := make([]Fault, 8)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if _, err := w.ReadFaults(faults); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Copy(faults[0].Addr, src, 0); err != nil {
			b.Fatal(err)
		}
	}
}
