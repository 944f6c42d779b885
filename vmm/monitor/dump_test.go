package monitor_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// notes returns the contents of a core file's notes by owner and type.
func notes(t *testing.T, f *elf.File) map[string][][]byte {
	t.Helper()
	all := map[string][][]byte{}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			t.Fatal(err)
		}
		for len(b) > 0 {
			le := binary.LittleEndian
			name, desc, kind := le.Uint32(b), le.Uint32(b[4:]), le.Uint32(b[8:])
			owner := string(b[12 : 12+name-1])
			b = b[12+(name+3)&^3:]
			key := fmt.Sprintf("%s %d", owner, kind)
			all[key] = append(all[key], b[:desc])
			b = b[(desc+3)&^3:]
		}
	}
	return all
}

// dumpResult is what DUMP_COMPLETED and query-dump tell.
type dumpResult struct {
	Status           string
	Completed, Total uint64
}

func (p peer) dumped(t *testing.T) (r dumpResult) {
	t.Helper()
	p.do(t, "query-dump", nil, &r)
	return r
}

// The core file of a paused machine holds its memory and registers.
func TestDump(t *testing.T) {
	const ram = 64 << 20
	o := start(t, "map size=2M fill seed=5 spin", func(c *vmm.Config) { c.CPUs = 2 })
	o.waitCounting(t, 0)
	o.do(t, "stop", nil, nil)
	o.event(t, "STOP")
	path := filepath.Join(t.TempDir(), "core")
	o.do(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + path}, nil)
	want := map[string]any{"result": map[string]any{"status": "completed", "completed": float64(ram), "total": float64(ram)}}
	if e := o.event(t, "DUMP_COMPLETED"); !cmp.Equal(e.Data, want) {
		t.Errorf("data %v", e.Data)
	}
	if s := o.status(t); s != "paused" {
		t.Errorf("status %q", s)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		t.Errorf("header %+v", f.FileHeader)
	}
	var got []byte
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			if p.Vaddr != 0 || p.Paddr != 0 || p.Memsz != ram || p.Filesz != ram {
				t.Errorf("segment %+v", p.ProgHeader)
			}
			if got, err = io.ReadAll(p.Open()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !bytes.Equal(got, o.save(t, "pmemsave", 0, ram)) || !bytes.Contains(got, binary.LittleEndian.AppendUint64(nil, probe.Magic)) {
		t.Error("the core file's memory is not the guest's")
	}
	all := notes(t, f)
	if n := all["CORE 1"]; len(n) != 2 || len(n[0]) != 336 {
		t.Fatalf("notes %v", all)
	}
	if n := all["QEMU 0"]; len(n) != 2 || len(n[0]) != 440 || binary.LittleEndian.Uint32(n[0]) != 1 || binary.LittleEndian.Uint32(n[0][4:]) != 440 {
		t.Fatalf("notes of QEMU's %v", n)
	}
	if err := o.m.Stopped(func() error {
		for i := range 2 {
			s, err := o.m.CPUState(i)
			if err != nil {
				return err
			}
			note := all["CORE 1"][i]
			if pid := binary.LittleEndian.Uint32(note[32:]); pid != uint32(i+1) {
				t.Errorf("thread %d is called %d", i+1, pid)
			}
			if rip := binary.LittleEndian.Uint64(note[112+16*8:]); rip != s.Regs.RIP {
				t.Errorf("vCPU %d: RIP %#x, in the core file %#x", i, s.Regs.RIP, rip)
			}
			if cr3 := binary.LittleEndian.Uint64(all["QEMU 0"][i][392+3*8:]); cr3 != s.Sregs.CR3 {
				t.Errorf("vCPU %d: CR3 %#x, in the core file %#x", i, s.Sregs.CR3, cr3)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// gdb reads registers and memory of our core files as of QEMU's.
func TestDumpInGDB(t *testing.T) {
	for _, tool := range []string{"gdb", "readelf"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("host feature missing: %s", tool)
		}
	}
	q := startQEMU(t, "q35", "boot wait for=go spin")
	q.do(t, "cont", nil, nil)
	q.event(t, "RESUME")
	for name, p := range map[string]peer{"ours": start(t, "boot wait for=go spin", nil).peer, "QEMU's": q} {
		p.serial.waitFor(t, "for=go")
		p.do(t, "stop", nil, nil)
		path := filepath.Join(t.TempDir(), "core")
		p.do(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + path}, nil)
		out, err := exec.Command("gdb", "-nx", "-batch", "-ex", "info threads", "-ex", "p/x (long)$rip", "-ex", "p/x $cs", "-ex", "p/x $fs_base",
			"-ex", fmt.Sprintf("x/gx %#x", probe.MailboxAddr), "-c", path).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: gdb: %v\n%s", name, err, out)
		}
		for _, want := range []string{"LWP 1", "$2 = 0x", fmt.Sprintf("0x%x:\t0x%016x", probe.MailboxAddr, uint64(probe.Magic))} {
			if !strings.Contains(string(out), want) {
				t.Errorf("%s: no %q in what gdb says:\n%s", name, want, out)
			}
		}
		if name == "ours" {
			var cpus []struct{ PC uint64 }
			p.do(t, "query-cpus", nil, &cpus)
			if want := fmt.Sprintf("$1 = 0x%x\n", cpus[0].PC); !strings.Contains(string(out), want) {
				t.Errorf("no %q in what gdb says:\n%s", want, out)
			}
		}
		out, err = exec.Command("readelf", "-a", "-W", path).CombinedOutput()
		if err != nil || strings.Contains(string(out), "Warning") || strings.Contains(string(out), "Error") {
			t.Errorf("%s: readelf: %v\n%s", name, err, out)
		}
	}
}

// A machine that runs is stopped for the dump, and the events come as QEMU's.
func TestDumpEventsLikeQEMU(t *testing.T) {
	var got [2][]string
	for i, p := range []peer{startQEMU(t, "q35", "spin"), start(t, "spin", func(c *vmm.Config) { c.Paused = true }).peer} {
		p.do(t, "cont", nil, nil)
		for _, detach := range []bool{false, true} {
			p.do(t, "dump-guest-memory", map[string]any{
				"paging": false, "protocol": "file:" + filepath.Join(t.TempDir(), "core"), "begin": 1 << 20, "length": 4096, "detach": detach,
			}, nil)
			for {
				e := p.next(t)
				if e.Event == "JOB_STATUS_CHANGE" {
					continue // QEMU's detached dump is no job
				}
				got[i] = append(got[i], fmt.Sprint(e.Event, e.Data))
				if e.Event == "RESUME" && len(got[i]) > 1 {
					break
				}
			}
			if r := p.dumped(t); r != (dumpResult{"completed", 4096, 4096}) {
				t.Errorf("query-dump: %+v", r)
			}
		}
		if s := p.status(t); s != "running" {
			t.Errorf("status %q", s)
		}
	}
	if d := cmp.Diff(got[0], got[1]); d != "" {
		t.Errorf("events -QEMU +ours\n%s", d)
	}
}

// What QEMU refuses we refuse in the same words.
func TestDumpRefusesLikeQEMU(t *testing.T) {
	q, o := startQEMU(t, "q35", "spin"), start(t, "spin", nil)
	path := filepath.Join(t.TempDir(), "core")
	file := "file:" + path
	for _, args := range []map[string]any{
		{"protocol": "foo:"},
		{"protocol": ""},
		{"protocol": "fd:none"},
		{"protocol": file, "begin": 1},
		{"protocol": file, "length": 1},
		{"protocol": file, "begin": 1 << 50, "length": 5},
		{"protocol": file, "begin": 5, "length": 0},
		{"protocol": "file:/nonexistent/x"},
	} {
		args["paging"] = false
		want, got := q.refuse(t, "dump-guest-memory", args), o.refuse(t, "dump-guest-memory", args)
		if got != want {
			t.Errorf("%v: %+v, QEMU %+v", args, got, want)
		}
		os.Remove(path) // QEMU leaves one
	}
	for _, format := range []string{"kdump-zlib", "kdump-lzo", "kdump-snappy", "win-dmp"} {
		got := o.refuse(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": file, "format": format})
		if got.Class != qmp.GenericError || !strings.Contains(got.Desc, format) {
			t.Errorf("%s: %+v", format, got)
		}
	}
	if got := o.refuse(t, "dump-guest-memory", map[string]any{"paging": true, "protocol": file}); !strings.Contains(got.Desc, "paging") {
		t.Errorf("%+v", got)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Error("there is a file")
	}
	if r := o.dumped(t); r.Status != "none" {
		t.Errorf("query-dump: %+v", r)
	}
	if s := o.status(t); s != "running" {
		t.Errorf("status %q", s)
	}
}

// A dump into a pipe, by getfd or from a set, is what it is in a file.
func TestDumpToDescriptor(t *testing.T) {
	o := start(t, "spin", nil)
	o.waitCounting(t, 0)
	o.do(t, "stop", nil, nil)
	path := filepath.Join(t.TempDir(), "core")
	o.do(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + path}, nil)
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for protocol, give := range map[string]func(w *os.File) error{
		"fd:pipe": func(w *os.File) error {
			return o.ExecuteWithFile(t.Context(), "getfd", map[string]any{"fdname": "pipe"}, w, nil)
		},
		"file:/dev/fdset/3": func(w *os.File) error {
			return o.ExecuteWithFile(t.Context(), "add-fd", map[string]any{"fdset-id": 3}, w, nil)
		},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := give(w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		got := make(chan []byte)
		go func() {
			b := make([]byte, len(want))
			n, _ := io.ReadFull(r, b)
			got <- b[:n]
		}()
		o.do(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": protocol}, nil)
		if !bytes.Equal(<-got, want) {
			t.Errorf("%s: not what the file holds", protocol)
		}
		r.Close()
	}
}

// A detached dump is a job; while it runs others wait, and cancelling it lets
// the machine go on.
func TestDumpJob(t *testing.T) {
	o := start(t, "map size=2M fill spin", nil)
	o.waitCounting(t, 0)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	args := map[string]any{"paging": false, "protocol": "file:" + fifo, "detach": true}
	o.do(t, "dump-guest-memory", args, nil)
	o.event(t, "STOP")
	busy := qmp.Error{Class: qmp.GenericError, Desc: "There is a dump in process, please wait."}
	for _, c := range []string{"stop", "cont"} {
		if got := o.refuse(t, c, nil); got != busy {
			t.Errorf("%s: %+v", c, got)
		}
	}
	if got := o.refuse(t, "dump-guest-memory", args); got != busy {
		t.Errorf("dump: %+v", got)
	}
	if r := o.dumped(t); r.Status != "active" || r.Total != 64<<20 {
		t.Errorf("query-dump: %+v", r)
	}
	var jobs []struct {
		ID, Type string
		Total    uint64 `json:"total-progress"`
	}
	o.do(t, "query-jobs", nil, &jobs)
	if len(jobs) != 1 || jobs[0].Type != "dump-guest-memory" {
		t.Fatalf("jobs %+v", jobs)
	}
	o.do(t, "job-cancel", map[string]any{"id": jobs[0].ID}, nil)
	for {
		e := o.next(t)
		if e.Event == "JOB_STATUS_CHANGE" {
			continue
		}
		if e.Event != "DUMP_COMPLETED" || e.Data["result"].(map[string]any)["status"] != "failed" || e.Data["error"] == nil {
			t.Errorf("event %+v", e)
		}
		break
	}
	for o.next(t).Event != "RESUME" {
	}
	if s := o.status(t); s != "running" {
		t.Errorf("status %q", s)
	}
	if _, err := os.Stat(fifo); err != nil {
		t.Errorf("the pipe is gone: %v", err)
	}
}

// quit ends a machine whose dump nobody reads.
func TestQuitDuringDump(t *testing.T) {
	o := start(t, "map size=2M fill spin", nil)
	o.waitCounting(t, 0)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	o.do(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + fifo, "detach": true}, nil)
	o.do(t, "quit", nil, nil)
	<-o.done
	if o.exit != vmm.ExitQuit {
		t.Errorf("exit %q", o.exit)
	}
}
