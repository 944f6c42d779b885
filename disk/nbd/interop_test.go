package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// tool runs one of QEMU's tools and returns what it printed.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// start runs a server until the test ends, and returns when it takes connections at
// the socket.
func start(t testing.TB, socket, name string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("%s: %v\n%s", name, err, out.Bytes())
		case <-tick.C:
		}
	}
}

func openRaw(t testing.TB, size int64) (*raw.Node, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	n, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n, path
}

func TestQEMUIoAtOurServer(t *testing.T) {
	n, _ := openRaw(t, 64<<20)
	_, address := serve(t, ServerOptions{}, Export{Name: "disk 0", Node: n, FastZero: true})
	out := tool(t, "qemu-io", "-f", "raw", uri(address, "disk 0"),
		"-c", "write -P 0x5a 1000 70000",
		"-c", "write -f -P 0x5b 1M 2M",
		"-c", "aio_write -P 0x11 8M 64k", "-c", "aio_write -P 0x12 9M 64k", "-c", "aio_read -P 0x5b 1M 2M", "-c", "aio_flush",
		"-c", "read -P 0x5a 1000 70000",
		"-c", "read -P 0 71000 1000",
		"-c", "read -P 0x12 9M 64k",
		"-c", "write -z 1M 64k", "-c", "write -z -u 2M 64k", "-c", "write -z -n 2560k 64k",
		"-c", "discard 8M 64k",
		"-c", "read -P 0 1M 64k", "-c", "read -P 0x5b 1088k 64k", "-c", "read -P 0 2M 64k", "-c", "read -P 0 8M 64k",
		"-c", "read -P 0 32M 32M",
		"-c", "flush")
	if strings.Contains(out, "fail") || strings.Contains(out, "error") {
		t.Errorf("qemu-io:\n%s", out)
	}
	got := make([]byte, 70000)
	if err := n.Readv([][]byte{got}, 1000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{0x5a}, len(got))) {
		t.Error("what qemu-io wrote is not on the disk")
	}
	if out := tool(t, "qemu-io", "-f", "raw", "-r", uri(address, "disk 0"), "-c", "read -P 0x5a 1000 70000"); strings.Contains(out, "fail") {
		t.Error(out)
	}
}

func TestReadOnlyExport(t *testing.T) {
	n, _ := openRaw(t, 1<<20)
	_, address := serve(t, ServerOptions{}, Export{Name: "ro", Node: n, ReadOnly: true})
	cmd := exec.Command("qemu-io", "-f", "raw", uri(address, "ro"), "-c", "write 0 4k")
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("qemu-io writes a read-only export: %v\n%s", err, out)
	}
	c := use(t, address, "ro", ClientOptions{})
	if !c.ReadOnly() {
		t.Error("the client takes it for writable")
	}
	// A client that does not care about what it was told.
	r := <-c.free
	err := r.do(header{command: cmdWrite, length: 512}, [][]byte{make([]byte, 512)}, nil)
	c.free <- r
	if !errorIs(err, block.ErrReadOnly, ErrRemote) {
		t.Errorf("a write: %v", err)
	}
}

// mapped is what qemu-img map prints.
type mapped struct {
	Start, Length int64
	Present       bool
	Zero, Data    bool
}

func qemuMap(t testing.TB, args ...string) []mapped {
	t.Helper()
	var m []mapped
	out := tool(t, "qemu-img", append([]string{"map", "--output=json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return m
}

func TestQEMUImgAtOurServer(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source.qcow2")
	tool(t, "qemu-img", "create", "-f", "qcow2", source, "48M")
	tool(t, "qemu-io", "-f", "qcow2", source, "-c", "write -P 1 0 100k", "-c", "write -P 2 5M 3M", "-c", "write -z 9M 1M",
		"-c", "write -P 3 20M 64k", "-c", "write -P 4 20608k 64k", "-c", "write -P 5 48127k 1k")
	n, path := openRaw(t, 48<<20)
	q, err := qcow2.Open(source, true)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	_, address := serve(t, ServerOptions{}, Export{Name: "target", Node: n, FastZero: true}, Export{Name: "source", Node: q})
	tool(t, "qemu-img", "convert", "-n", "-W", "-f", "qcow2", "-O", "raw", source, uri(address, "target"))
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri(address, "source"), uri(address, "target"))
	tool(t, "qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", source, path)
	if out, err := exec.Command("qemu-io", "-f", "raw", uri(address, "target"), "-c", "write -P 9 30M 1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(address, "source"), uri(address, "target")).Run(); err == nil {
		t.Error("qemu-img compare finds no difference after a write")
	}

	ours := qemuMap(t, "-f", "raw", uri(address, "source"))
	theirs := qemuMap(t, "-U", "-f", "qcow2", source)
	kinds := func(all []mapped) (text []string) {
		for i := 0; i < len(all); i++ {
			m := all[i]
			for ; i+1 < len(all) && all[i+1].Zero == m.Zero && all[i+1].Data == m.Data; i++ { // not told over NBD: present
				m.Length += all[i+1].Length
			}
			text = append(text, fmt.Sprintf("%d+%d zero=%v data=%v", m.Start, m.Length, m.Zero, m.Data))
		}
		return text
	}
	if !slices.Equal(kinds(ours), kinds(theirs)) {
		t.Errorf("qemu-img map of our export:\n%s\nof the image:\n%s", kinds(ours), kinds(theirs))
	}
}

func TestQEMUReadsOurBitmaps(t *testing.T) {
	m := newMemory(32 << 20)
	b := runsBitmap{"b0", [][2]int64{{0, 64 << 10}, {1 << 20, 3 << 20}, {31 << 20, 32 << 20}}}
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m, Bitmaps: []Bitmap{runsBitmap{name: "empty"}, b}})
	spec := func(context string) string {
		return fmt.Sprintf("driver=nbd,server.type=unix,server.path=%s,export=a,x-dirty-bitmap=%s", strings.TrimPrefix(address, "unix:"), context)
	}
	var got [][2]int64
	for _, e := range qemuMap(t, "--image-opts", spec("qemu:dirty-bitmap:b0")) {
		if !e.Data { // this is how QEMU shows what the bitmap has
			got = append(got, [2]int64{e.Start, e.Start + e.Length})
		}
	}
	if !slices.Equal(got, b.runs) {
		t.Errorf("QEMU reads the bitmap as %v; it is %v", got, b.runs)
	}
	for _, e := range qemuMap(t, "--image-opts", spec("qemu:dirty-bitmap:empty")) {
		if !e.Data {
			t.Errorf("QEMU finds the empty bitmap to have %+v", e)
		}
	}
}

func TestNbdinfo(t *testing.T) {
	m := newMemory(3 << 20)
	b := runsBitmap{"b0", [][2]int64{{64 << 10, 128 << 10}}}
	_, address := serve(t, ServerOptions{},
		Export{Name: "a", Description: "the first", Node: m, Bitmaps: []Bitmap{b}},
		Export{Name: "b", Node: newMemory(512), ReadOnly: true})
	var info struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Name        string   `json:"export-name"`
			Size        int64    `json:"export-size"`
			Description string   `json:"description"`
			Contexts    []string `json:"contexts"`
			ReadOnly    bool     `json:"is_read_only"`
			Multi       bool     `json:"can_multi_conn"`
			Cache       bool     `json:"can_cache"`
			DF          bool     `json:"can_df"`
			FUA         bool     `json:"can_fua"`
			Zero        bool     `json:"can_zero"`
			FastZero    bool     `json:"can_fast_zero"`
			Trim        bool     `json:"can_trim"`
			Maximum     int64    `json:"block_size_maximum"`
		}
	}
	out := tool(t, "nbdinfo", "--list", "--json", uri(address, ""))
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if info.Protocol != "newstyle-fixed" || len(info.Exports) != 2 {
		t.Fatalf("nbdinfo: %s", out)
	}
	a := info.Exports[0]
	if a.Name != "a" || a.Size != 3<<20 || a.Description != "the first" || !slices.Equal(a.Contexts, []string{ContextAllocation, ContextDirtyBitmap + "b0"}) ||
		a.ReadOnly || !a.Multi || !a.Cache || !a.DF || !a.FUA || !a.Zero || !a.FastZero || !a.Trim || a.Maximum != maxPayload {
		t.Errorf("nbdinfo: %s", out)
	}
	if b := info.Exports[1]; b.Name != "b" || b.Size != 512 || !b.ReadOnly || b.Trim {
		t.Errorf("nbdinfo: %s", out)
	}
	list, err := List(context.Background(), address, nil)
	if err != nil || len(list) != 2 || list[0].Name != "a" || list[0].Size != 3<<20 || list[0].Description != "the first" ||
		!slices.Equal(list[0].Contexts, a.Contexts) || !list[1].ReadOnly {
		t.Errorf("List: %+v, %v", list, err)
	}
}

func TestOurClientAtQEMUNbd(t *testing.T) {
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "s")
	tool(t, "qemu-img", "create", "-f", "qcow2", image, "64M")
	tool(t, "qemu-img", "bitmap", "--add", "-g", "65536", image, "b0")
	tool(t, "qemu-io", "-f", "qcow2", image, "-c", "write -P 7 1M 128k", "-c", "write -z 4M 1M")
	start(t, socket, "qemu-nbd", "-k", socket, "-t", "-e", "4", "-x", "x", "-B", "b0", "-f", "qcow2", image)

	c := use(t, "unix:"+socket, "x", ClientOptions{Contexts: []string{ContextDirtyBitmap + "b0"}})
	dirty, err := c.Status(ContextDirtyBitmap+"b0", 0, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	want := []StatusExtent{{1 << 20, 0}, {128 << 10, StateDirty}, {3<<20 - 128<<10, 0}, {1 << 20, StateDirty}, {3 << 20, 0}}
	if !slices.Equal(dirty, want) {
		t.Errorf("bitmap: %v", dirty)
	}
	e, err := c.Map(1<<20, 8<<20)
	if err != nil || e.Length != 128<<10 || !e.Data || e.Zero {
		t.Errorf("map: %+v, %v", e, err)
	}
	if e, err = c.Map(4<<20, 8<<20); err != nil || !e.Zero {
		t.Errorf("map: %+v, %v", e, err)
	}
	data := make([]byte, 35<<20)
	pattern(data, 0)
	if err := c.Writev([][]byte{data}, 10<<20+3); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if err := c.Readv([][]byte{got[:1], got[1:]}, 10<<20+3); err != nil || !bytes.Equal(got, data) {
		t.Errorf("a read of what was written: %v", err)
	}
	if err := c.WriteZeroes(10<<20, 1<<20+7, true); err != nil {
		t.Fatal(err)
	}
	if err := c.Readv([][]byte{got[:1<<20+8]}, 10<<20); err != nil || !block.IsZero(got[:1<<20+7]) || got[1<<20+7] == 0 {
		t.Errorf("a read of zeroes: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(context.Background(), "unix:"+socket, "y", ClientOptions{}); !errorIs(err, ErrRefused) {
		t.Errorf("an export that is not there: %v", err)
	}
	if _, err := Dial(context.Background(), "unix:"+socket, "x", ClientOptions{Contexts: []string{"qemu:dirty-bitmap:none"}}); !errorIs(err, ErrRefused) {
		t.Errorf("a bitmap that is not there: %v", err)
	}
}

func TestOurClientAtStorageDaemon(t *testing.T) {
	dir := t.TempDir()
	image, socket := filepath.Join(dir, "a.raw"), filepath.Join(dir, "s")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	// Its smallest block is 4096 bytes, so that ours must read, change and write.
	start(t, socket, "qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=f,filename="+image,
		"--blockdev", "driver=blkdebug,node-name=d,image=f,align=4096",
		"--nbd-server", "addr.type=unix,addr.path="+socket+",max-connections=4",
		"--export", "type=nbd,id=e,node-name=d,name=x,writable=on")
	c := use(t, "unix:"+socket, "x", ClientOptions{})
	if minimum, _ := c.BlockSizes(); minimum != 4096 {
		t.Fatalf("smallest block %d", minimum)
	}
	model := make([]byte, c.Size())
	for _, r := range []struct{ off, n int64 }{{0, 8 << 20}, {1, 1}, {4095, 2}, {5000, 3 << 20}, {8<<20 - 5, 5}, {4096, 4096}} {
		data := make([]byte, r.n)
		pattern(data, r.off^r.n)
		copy(model[r.off:], data)
		if err := c.Writev([][]byte{data[:r.n/2], data[r.n/2:]}, r.off); err != nil {
			t.Fatal(err)
		}
	}
	clear(model[3<<20+17 : 4<<20+18])
	if err := c.WriteZeroes(3<<20+17, 1<<20+1, false); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(model))
	for _, r := range []struct{ off, n int64 }{{0, 8 << 20}, {5, 10}, {4095, 3<<20 + 9}} {
		if err := c.Readv([][]byte{got[r.off : r.off+r.n/3], got[r.off+r.n/3 : r.off+r.n]}, r.off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[r.off:r.off+r.n], model[r.off:r.off+r.n]) {
			t.Fatalf("%d bytes at %d are read wrong", r.n, r.off)
		}
	}
	if e, err := c.Map(3<<20+18, 9); err != nil || e.Start != 3<<20+18 || e.Length != 9 {
		t.Errorf("map within the smallest block: %+v, %v", e, err)
	}
}
