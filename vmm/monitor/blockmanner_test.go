package monitor_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// told is what query-named-block-nodes tells of how a node is read and written.
type told struct {
	NodeName string `json:"node-name"`
	File     string
	RO       bool
	Cache    struct {
		Writeback, Direct bool
		NoFlush           bool `json:"no-flush"`
	}
	DetectZeroes string `json:"detect_zeroes"`
}

func (n told) String() string {
	text := fmt.Sprintf("zeroes=%s", n.DetectZeroes)
	for _, x := range []struct {
		word string
		is   bool
	}{{"through", !n.Cache.Writeback}, {"no-flush", n.Cache.NoFlush}, {"direct", n.Cache.Direct}, {"ro", n.RO}} {
		if x.is {
			text = x.word + " " + text
		}
	}
	return text
}

// manners are those of the nodes with names of our own.
func (p peer) manners(t *testing.T) map[string]string {
	t.Helper()
	var list []told
	p.do(t, "query-named-block-nodes", m{"flat": true}, &list)
	all := map[string]string{}
	for _, n := range list {
		if !strings.HasPrefix(n.NodeName, "#") {
			all[n.NodeName] = n.String()
		}
	}
	return all
}

// openDirect tells whether this process has a file open past the page cache; it must
// have it open.
func openDirect(t *testing.T, path string) bool {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		name, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err != nil || name != path {
			continue
		}
		text, err := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			flags := 0
			if n, _ := fmt.Sscanf(line, "flags: %o", &flags); n == 1 {
				return flags&unix.O_DIRECT != 0
			}
		}
	}
	t.Fatalf("%s is not open", path)
	return false
}

// Nodes are read and written as their options say, which are taken and told as QEMU
// does, error by error.
func TestBlockdevManner(t *testing.T) {
	type step struct {
		command string
		args    m
	}
	add := func(args m) step { return step{"blockdev-add", args} }
	reopen := func(args ...m) step { return step{"blockdev-reopen", m{"options": args}} }
	run := func(dir string, p peer) (all []string) {
		at := func(name string) string { return filepath.Join(dir, name) }
		for _, name := range []string{"a.img", "b.img", "c.img", "d.img"} {
			qemuImg(t, "create", "-q", "-f", "raw", at(name), "1M")
		}
		for _, name := range []string{"a.qcow2", "b.qcow2"} {
			qemuImg(t, "create", "-q", "-f", "qcow2", at(name), "1M")
		}
		direct, both := m{"direct": true}, m{"direct": true, "no-flush": true}
		file := func(name, path string, more ...any) m {
			args := m{"driver": "file", "node-name": name, "filename": at(path)}
			for i := 0; i < len(more); i += 2 {
				args[more[i].(string)] = more[i+1]
			}
			return args
		}
		image := func(name string, inside any, more ...any) m {
			args := file(name, "", more...)
			delete(args, "filename")
			args["driver"], args["file"] = "qcow2", inside
			return args
		}
		for _, s := range []step{
			add(file("f1", "a.img", "aio", "native")),
			add(file("f1", "a.img", "aio", "native", "cache", m{"no-flush": true})),
			add(file("f1", "a.img", "aio", "native", "cache", direct)),
			add(file("f2", "b.img", "cache", m{"direct": "on"})),
			add(file("f2", "b.img", "cache", m{"writeback": false})),
			add(file("f2", "b.img", "cache", "none")),
			add(file("f2", "b.img", "aio", "posix")),
			add(file("f2", "b.img", "discard", "on")),
			add(file("f2", "b.img", "detect-zeroes", "maybe")),
			add(file("f2", "b.img", "detect-zeroes", "unmap")),
			add(file("f2", "b.img", "detect-zeroes", "unmap", "discard", "ignore")),
			add(file("f2", "b.img", "detect-zeroes", "unmap", "discard", "unmap", "cache", both, "aio", "threads")),
			add(m{"driver": "null-co", "node-name": "n1", "aio": "threads"}),
			add(m{"driver": "raw", "node-name": "r1", "file": file("f3", "c.img", "aio", "io_uring"), "cache": both, "detect-zeroes": "on"}),
			add(image("q1", file("f4", "a.qcow2"), "cache", direct, "discard", "unmap", "detect-zeroes", "unmap", "auto-read-only", true)),
			add(file("f5", "b.qcow2", "read-only", true)),
			add(image("q2", "f5")),
			add(image("q2", "f5", "auto-read-only", true)),
			add(file("f6", "d.img", "auto-read-only", true)),
			reopen(file("f1", "a.img", "aio", "threads", "cache", direct)),
			reopen(file("f1", "a.img", "cache", direct)),
			reopen(file("f2", "b.img", "aio", "threads", "detect-zeroes", "on")),
			reopen(file("f6", "d.img", "cache", both, "detect-zeroes", "unmap")),
			reopen(file("f6", "d.img", "cache", both)),
		} {
			switch err := p.Execute(t.Context(), s.command, s.args, nil); {
			case err != nil:
				all = append(all, strings.ReplaceAll(err.Error(), dir, ""))
			default:
				all = append(all, "")
			}
		}
		for name, manner := range p.manners(t) {
			all = append(all, name+": "+manner)
		}
		return all
	}
	sorted := cmp.Transformer("set", func(list []string) map[string]int {
		set := map[string]int{}
		for _, s := range list {
			set[s]++
		}
		return set
	})
	ourDir, theirDir := t.TempDir(), t.TempDir()
	o := start(t, "spin", nil)
	our := run(ourDir, o.peer)
	their := run(theirDir, startQEMU(t, "q35", "spin"))
	if diff := cmp.Diff(their, our, sorted); diff != "" {
		t.Errorf("QEMU (-), ours (+):\n%s", diff)
	}
	if len(our) != 24+8 {
		t.Errorf("%d answers and nodes", len(our))
	}
	// QEMU takes this, unlike its blockdev-add.
	native := m{"driver": "file", "node-name": "f1", "filename": filepath.Join(ourDir, "a.img"), "aio": "native"}
	if err := o.refuse(t, "blockdev-reopen", m{"options": []m{native}}); !strings.Contains(err.Desc, "requires cache.direct=on") {
		t.Error(err)
	}
}

// What is told of nodes is how their files are open, and changes while a disk is used.
func TestReopenInUse(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("d.qcow2"), "8M")
	o := start(t, "spin", nil)
	file := func(direct bool) m {
		return m{"driver": "file", "node-name": "f", "filename": at("d.qcow2"), "cache": m{"direct": direct}}
	}
	o.do(t, "blockdev-add", file(true), nil)
	o.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": "q", "file": "f", "discard": "unmap"}, nil)
	o.do(t, "device_add", m{"driver": "virtio-blk-pci", "id": "d", "drive": "q"}, nil)
	h := newHistory(t, o, 0)
	h.start(t)
	for _, direct := range []bool{false, true, false} {
		o.do(t, "blockdev-reopen", m{"options": []m{file(direct)}}, nil)
		if is := openDirect(t, at("d.qcow2")); is != direct {
			t.Errorf("direct=%v: the file is open past the page cache: %v", direct, is)
		}
		if got, want := o.manners(t)["f"], map[bool]string{true: "direct zeroes=off", false: "zeroes=off"}[direct]; got != want {
			t.Errorf("direct=%v: it is told to be %q", direct, got)
		}
		h.finish()
		h.check(t)
		h.start(t)
	}
	h.finish()
	// A node that somebody else uses goes on as it is.
	qemuImg(t, "create", "-q", "-f", "raw", at("e.img"), "1M")
	e := m{"driver": "file", "node-name": "e", "filename": at("e.img")}
	o.do(t, "blockdev-add", e, nil)
	o.do(t, "nbd-server-start", m{"addr": m{"type": "unix", "data": m{"path": filepath.Join(socketDir(t), "n")}}}, nil)
	o.do(t, "block-export-add", m{"id": "e", "type": "nbd", "node-name": "e"}, nil)
	e["cache"] = m{"direct": true}
	if err := o.refuse(t, "blockdev-reopen", m{"options": []m{e}}); !strings.Contains(err.Desc, "in use by block export") {
		t.Error(err)
	}
}

// Discards and zeroes take space or give it back as options say.
func TestDiscardAndZeroes(t *testing.T) {
	const part = 1 << 20
	cases := []struct {
		options m
		kept    string // of a discard, a write of zeroes, and WriteZeroes that may unmap: what keeps its space
	}{
		{m{}, "discard write zero"},
		{m{"discard": "ignore"}, "discard write zero"},
		{m{"discard": "unmap"}, "write"},
		{m{"discard": "unmap", "detect-zeroes": "on"}, "write"},
		{m{"discard": "unmap", "detect-zeroes": "unmap"}, ""},
	}
	for _, driver := range []string{"file", "raw", "qcow2", "nbd"} {
		o := start(t, "spin", nil)
		for i, c := range cases {
			id := fmt.Sprintf("%s%d", driver, i)
			path := image(t, 4*part)
			options := m{"driver": driver, "node-name": id}
			switch driver {
			case "file":
				options["filename"] = path
			case "qcow2":
				qemuImg(t, "create", "-q", "-f", "qcow2", path, "4M")
				fallthrough
			case "raw":
				options["file"] = m{"driver": "file", "filename": path}
			case "nbd":
				options["server"], options["export"] = m{"type": "unix", "path": serve(t, path)}, "x"
			}
			for k, v := range c.options {
				options[k] = v
			}
			o.do(t, "blockdev-add", options, nil)
			o.do(t, "device_add", m{"driver": "virtio-blk-pci", "id": id, "drive": id}, nil)
			root := o.m.Disks()[i].Root
			ones, zeroes := make([]byte, part), make([]byte, part)
			for i := range ones {
				ones[i] = 1
			}
			var kept []string
			for at, operation := range []struct {
				name string
				do   func(off int64) error
			}{
				{"discard", func(off int64) error { return root.Discard(off, part) }},
				{"write", func(off int64) error { return root.Writev([][]byte{zeroes}, off) }},
				{"zero", func(off int64) error { return root.WriteZeroes(off, part, true) }},
			} {
				off := int64(at) * part
				if err := errors.Join(root.Writev([][]byte{ones}, off), root.Flush()); err != nil {
					t.Fatal(err)
				}
				was := allocated(t, path)
				if err := errors.Join(operation.do(off), root.Flush()); err != nil {
					t.Fatal(err)
				}
				if allocated(t, path) > was-part/2 {
					kept = append(kept, operation.name)
				}
				got := make([]byte, part)
				if err := root.Readv([][]byte{got}, off); err != nil {
					t.Fatal(err)
				}
				if operation.name != "discard" {
					same(t, operation.name, got, zeroes)
				}
			}
			if got := strings.Join(kept, " "); got != c.kept {
				t.Errorf("%s %v: space is kept by %q, want %q", driver, c.options, got, c.kept)
			}
		}
		o.m.Close() // before the server
	}
}

// serve has a file be the export x of a server, at a socket.
func serve(t *testing.T, path string) string {
	t.Helper()
	return serveNode(t, openDisk(t, path))
}

// serveNode is serve of a node.
func serveNode(t *testing.T, n block.Node) string {
	t.Helper()
	socket := filepath.Join(socketDir(t), "n")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(nbd.ServerOptions{})
	if err := s.Add(nbd.Export{Name: "x", Node: n}); err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return socket
}

// allocated is how many bytes of the host's file system a file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// Overlays, and what a disk is copied to, are cached as the disk is, which QEMU tells
// of its own too.
func TestCacheIsInherited(t *testing.T) {
	cache := func(t *testing.T, p peer) (all []string) {
		var list []struct{ Inserted told }
		p.do(t, "query-block", nil, &list)
		for _, d := range list {
			all = append(all, d.Inserted.String())
		}
		return all
	}
	var images []string
	for range 2 * len(cacheModes) {
		images = append(images, image(t, diskSize))
	}
	o := start(t, "spin", func(c *vmm.Config) {
		for i, mode := range cacheModes {
			n, err := disk.Open(images[i], disk.Options{Cache: mode, Engine: aio.Threads})
			if err != nil {
				t.Fatal(err)
			}
			c.Disks = append(c.Disks, vmm.Disk{Node: n})
		}
	})
	var args []string
	for i, mode := range cacheModes {
		args = append(args, "-drive", fmt.Sprintf("if=none,id=disk%d,format=raw,file=%s,cache=%s", i, images[len(cacheModes)+i], mode),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	their := startQEMU(t, "q35", "spin", args...)
	for _, p := range []peer{o.peer, their} {
		was := cache(t, p)
		if len(was) != len(cacheModes) || was[0] == was[1] {
			t.Fatal(was)
		}
		dir := t.TempDir()
		for i := range cacheModes {
			p.do(t, "blockdev-snapshot-sync", m{"device": fmt.Sprintf("disk%d", i), "snapshot-file": filepath.Join(dir, fmt.Sprintf("o%d", i))}, nil)
		}
		if diff := cmp.Diff(was, cache(t, p)); diff != "" {
			t.Errorf("in overlays: %s", diff)
		}
	}
	if diff := cmp.Diff(cache(t, their), cache(t, o.peer)); diff != "" {
		t.Errorf("QEMU (-), ours (+): %s", diff)
	}
	for i, mode := range cacheModes {
		root := o.m.Disks()[i].Root
		whileStill(root, func(n block.Node) {
			if direct := openDirect(t, n.Info().Filename); direct != mode.Direct() {
				t.Errorf("cache=%s: the overlay is open past the page cache: %v", mode, direct)
			}
			if engine := raw.OptionsOf(n).Engine; engine != aio.Threads {
				t.Errorf("cache=%s: the overlay's requests are made by %q", mode, engine)
			}
		})
		target := filepath.Join(t.TempDir(), "target")
		id := fmt.Sprintf("disk%d", i)
		o.do(t, "drive-mirror", m{"device": id, "target": target, "sync": "full", "format": "raw"}, nil)
		o.job(t, id, "BLOCK_JOB_READY")
		if direct := openDirect(t, target); direct != mode.Direct() {
			t.Errorf("cache=%s: the copy is open past the page cache: %v", mode, direct)
		}
		o.do(t, "block-job-complete", m{"device": id}, nil)
		o.completed(t, id)
	}
	if diff := cmp.Diff(cache(t, their), cache(t, o.peer)); diff != "" {
		t.Errorf("in copies: QEMU (-), ours (+): %s", diff)
	}
}

var cacheModes = []disk.Cache{disk.CacheWriteback, disk.CacheNone, disk.CacheDirectSync, disk.CacheWriteThrough, disk.CacheUnsafe}

// whileStill looks at a disk's node while nobody else does anything with it.
func whileStill(root *block.Root, look func(block.Node)) {
	root.Drained(func(n block.Node) block.Node {
		look(n)
		return n
	})
}
