package tests

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// place is a directory of a test's own in which the command runs: runtime
// directory, temporary files and working directory are all in it.
type place struct {
	dir    string
	before []string // what was there before the command ran
}

// newPlace makes a place with a probe guest's kernel, a disk image and some
// files that are no kernel.
func newPlace(t *testing.T) *place {
	t.Helper()
	// Not t.TempDir, into which other users cannot look.
	dir, err := os.MkdirTemp("", "gnomon-cli")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &place{dir: dir}
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{"probe": kernel, "gnomon": gnomon} {
		if out, err := exec.Command("cp", from, filepath.Join(dir, to)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	armImage := make([]byte, 4096)
	copy(armImage[56:], "ARM\x64") // arm64's booting.rst
	armELF := make([]byte, 4096)
	copy(armELF, elf.ELFMAG)
	armELF[elf.EI_CLASS], armELF[elf.EI_DATA], armELF[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	binary.LittleEndian.PutUint16(armELF[16:], uint16(elf.ET_EXEC))
	binary.LittleEndian.PutUint16(armELF[18:], uint16(elf.EM_AARCH64))
	for name, text := range map[string][]byte{
		"arm.Image": armImage, "arm.elf": armELF, "text": []byte("not a kernel at all\n"), "empty": nil,
		"initrd": make([]byte, 8<<20), "disk.img": make([]byte, 1<<20),
		"unknown.json": []byte(`{"kernle": "probe"}`), "wrong.json": []byte(`{"cpus": "many"}`), "broken.json": []byte(`{`),
		"list.json": []byte(`[]`), "good.json": []byte(`{"cpus": 1}`), "large.json": bytes.Repeat([]byte(" "), 1<<20+1),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("disk.img", filepath.Join(dir, "link.img")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "tmp", "run"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, name), 0o755), os.Chmod(filepath.Join(dir, name), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	p.before = p.files(t)
	return p
}

// files lists what is in the place, with the sizes of files.
func (p *place) files(t *testing.T) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(p.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name := path + " " + d.Type().String()
		if info.Mode().IsRegular() {
			name += fmt.Sprintf(" %d bytes", info.Size())
		}
		names = append(names, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// unchanged fails when the command left something behind or took something away.
func (p *place) unchanged(t *testing.T) {
	t.Helper()
	if now := p.files(t); !slices.Equal(now, p.before) {
		t.Errorf("there was\n%s\nand now there is\n%s", strings.Join(p.before, "\n"), strings.Join(now, "\n"))
	}
}

// result is how a command ended.
type result struct {
	status         int
	stdout, stderr string
}

// run runs a command in the place until it ends by itself.
func (p *place) run(t *testing.T, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), "GNOMON_RUNTIME_DIR="+filepath.Join(p.dir, "run"), "TMPDIR="+filepath.Join(p.dir, "tmp"))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, &stderr)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// refused is run for a command that must fail: with the status, one line that
// holds all the words, and nothing left behind.
func (p *place) refused(t *testing.T, status int, words []string, name string, args ...string) {
	t.Helper()
	r := p.run(t, name, args...)
	if r.status != status {
		t.Errorf("status %d, want %d", r.status, status)
	}
	if !strings.HasPrefix(r.stderr, "gnomon: ") || strings.Count(r.stderr, "\n") != 1 || !strings.HasSuffix(r.stderr, "\n") {
		t.Errorf("not one line:\n%s", r.stderr)
	}
	for _, word := range words {
		if !strings.Contains(r.stderr, word) {
			t.Errorf("nothing about %q in: %s", word, r.stderr)
		}
	}
	for _, word := range []string{"strconv", "unmarshal", "Go value", "EOF"} {
		if strings.Contains(r.stderr, word) {
			t.Errorf("%q, which is Go's word, in: %s", word, r.stderr)
		}
	}
	if r.stdout != "" {
		t.Errorf("on standard output: %q", r.stdout)
	}
	p.unchanged(t)
}

// boots are the flags of a machine that does the workload and powers off.
func boots(workload string, more ...string) []string {
	args := append([]string{"run", "--kernel", "probe", "--append", workload, "--memory", "16M"}, more...)
	if !slices.Contains(more, "--net") {
		args = append(args, "--net", "none")
	}
	return args
}

func TestBadUse(t *testing.T) {
	p := newPlace(t)
	for _, test := range []struct {
		name   string
		args   []string
		status int
		words  []string // what, why, and what to do
	}{
		{"NoKernel", []string{"run"}, 2, []string{"--kernel", "bzImage", "--help"}},
		{"MissingKernel", []string{"run", "--kernel", "nowhere"}, 1, []string{"nowhere", "no such file", "check the path"}},
		{"ARM64Image", []string{"run", "--kernel", "arm.Image"}, 1, []string{"arm.Image", "ARM64", "x86-64"}},
		{"ARM64ELF", []string{"run", "--kernel", "arm.elf"}, 1, []string{"arm.elf", "aarch64", "x86-64"}},
		{"NotAKernel", []string{"run", "--kernel", "text"}, 1, []string{"text", "not a kernel", "x86-64 bzImage"}},
		{"EmptyKernel", []string{"run", "--kernel", "empty"}, 1, []string{"empty", "not a kernel", "x86-64 bzImage"}},
		{"DirectoryAsKernel", []string{"run", "--kernel", "tmp"}, 1, []string{"tmp", "not a regular file", "name a bzImage"}},
		{"FIFOAsKernel", []string{"run", "--kernel", "fifo"}, 1, []string{"fifo", "not a regular file", "name a bzImage"}},
		{"FIFOAsInitrd", boots("boot", "--initrd", "fifo"), 1, []string{"--initrd fifo", "not a regular file", "cpio"}},
		{"EmptyInitrd", boots("boot", "--initrd", "empty"), 1, []string{"--initrd empty", "is empty", "cpio"}},
		{"MissingInitrd", boots("boot", "--initrd", "nowhere"), 1, []string{"--initrd nowhere", "no such file", "check the path"}},
		{"TooLittleForKernel", boots("boot", "--memory", "1M"), 1, []string{"not enough guest memory", "--memory", "or more"}},
		{"TooLittleForInitrd", boots("boot", "--memory", "9M", "--initrd", "initrd"), 1, []string{"initial RAM disk", "8 MiB", "--memory"}},
		{"LongCommandLine", boots(strings.Repeat("x", 100_000)), 1, []string{"command line", "100000 bytes", "shorten"}},
		{"MissingDisk", boots("boot", "--disk", "file=nowhere"), 1, []string{"nowhere", "does not exist", "create it"}},
		{"DirectoryAsDisk", boots("boot", "--disk", "file=tmp,readonly=on"), 1, []string{"--disk file=tmp", "neither a regular file nor a block device", "truncate"}},
		{"WritableDirectoryAsDisk", boots("boot", "--disk", "file=tmp"), 1, []string{"--disk file=tmp", "neither a regular file nor a block device", "truncate"}},
		{"FIFOAsDisk", boots("boot", "--disk", "file=fifo"), 1, []string{"--disk file=fifo", "neither a regular file nor a block device"}},
		{"MemoryAsDisk", boots("boot", "--disk", "file=/proc/self/mem"), 1, []string{"--disk file=/proc/self/mem", "no size"}},
		{"EmptyDisk", boots("boot", "--disk", "file=empty"), 1, []string{"--disk file=empty", "no size", "truncate"}},
		{"NotQcow2", boots("boot", "--disk", "file=disk.img,format=qcow2,readonly=on"), 1, []string{"disk.img", "qcow2"}},
		{"SerialInNoDirectory", boots("boot", "--serial", "file:nowhere/x"), 1, []string{"--serial", "no such file or directory", "make its directory"}},
		{"SerialToFIFO", boots("boot", "--serial", "file:fifo"), 1, []string{"--serial", "fifo", "neither a regular file nor a character device", "unix:PATH"}},
		{"SerialToDirectory", boots("boot", "--serial", "file:tmp"), 1, []string{"--serial", "tmp", "is a directory", "name a file"}},
		{"SocketInNoDirectory", boots("boot", "--qmp", "unix:nowhere/x"), 1, []string{"QMP", "no such file or directory", "make its directory"}},
		{"SocketThatIsAFile", boots("boot", "--qmp", "unix:./text"), 1, []string{"text", "not a socket", "another path"}},
		{"MissingConfig", boots("boot", "--config", "nowhere"), 1, []string{"--config nowhere", "no such file", "check the path"}},
		{"FIFOAsConfig", boots("boot", "--config", "fifo"), 1, []string{"--config fifo", "not a regular file"}},
		{"EndlessConfig", boots("boot", "--config", "/dev/zero"), 1, []string{"--config /dev/zero", "not a regular file"}},
		{"LargeConfig", boots("boot", "--config", "large.json"), 1, []string{"--config large.json", "1024 KiB"}},
		{"NobodysName", []string{"qmp", "nobody", "query-status"}, 1, []string{"nobody", "gnomon ps"}},

		{"UnknownFlag", boots("boot", "--frob"), 2, []string{"--frob", "gnomon run --help"}},
		{"UnknownCommand", []string{"frob"}, 2, []string{"frob", "gnomon --help"}},
		{"Argument", boots("boot", "frob"), 2, []string{"frob", "gnomon run --help"}},
		{"MemoryUnit", boots("boot", "--memory", "12X"), 2, []string{"--memory", "12X", "512M or 2G"}},
		{"NoMemory", boots("boot", "--memory", "0"), 2, []string{"--memory 0", "1M to 1T"}},
		{"TooMuchMemory", boots("boot", "--memory", "2T"), 2, []string{"--memory 2T", "1M to 1T"}},
		{"NoCPUs", boots("boot", "--cpus", "0"), 2, []string{"--cpus 0", "1 to 64"}},
		{"TooManyCPUs", boots("boot", "--cpus", "65"), 2, []string{"--cpus 65", "1 to 64"}},
		{"CPUsInWords", boots("boot", "--cpus", "two"), 2, []string{"--cpus two", "whole number"}},
		{"CPUsBeyondNumbers", boots("boot", "--cpus", strings.Repeat("9", 30)), 2, []string{"--cpus 999", "too large"}},
		{"SwitchInWords", boots("boot", "--paused=maybe"), 2, []string{"--paused maybe", "true and false"}},
		{"DiskWithoutFile", boots("boot", "--disk", "readonly=on"), 2, []string{"--disk readonly=on", "file= is missing"}},
		{"DiskKey", boots("boot", "--disk", "file=disk.img,colour=red"), 2, []string{"colour", "keys are file"}},
		{"DiskFormat", boots("boot", "--disk", "file=disk.img,format=vmdk"), 2, []string{"format=vmdk", "raw, qcow2"}},
		{"DiskCache", boots("boot", "--disk", "file=disk.img,cache=fast"), 2, []string{"cache=fast", "none, directsync, writethrough, writeback, unsafe"}},
		{"DiskAIO", boots("boot", "--disk", "file=disk.img,aio=posix"), 2, []string{"aio=posix", "threads, io_uring, native"}},
		{"DiskAIONative", boots("boot", "--disk", "file=disk.img,aio=native"), 2, []string{"aio=native needs cache=none"}},
		{"DiskPolicy", boots("boot", "--disk", "file=disk.img,rerror=enospc"), 2, []string{"rerror=enospc", "report, ignore, stop"}},
		{"DiskSwitch", boots("boot", "--disk", "file=disk.img,readonly=yes"), 2, []string{"readonly=yes", "on and off"}},
		{"DiskSerial", boots("boot", "--disk", "file=disk.img,serial="+strings.Repeat("x", 21)), 2, []string{"serial", "20 bytes"}},
		{"DiskTwins", boots("boot", "--disk", "file=disk.img,id=a,readonly=on", "--disk", "file=text,id=a,readonly=on"), 2, []string{"two devices are named a"}},
		{"DiskTwice", boots("boot", "--disk", "file=disk.img", "--disk", "file=link.img,readonly=on"), 2, []string{"--disk file=link.img", "given twice", "readonly=on"}},
		{"ManyDisks", boots("boot", slices.Repeat([]string{"--disk", "file=disk.img,readonly=on"}, 30)...), 2, []string{"32 devices", "at most 31"}},
		{"Net", boots("boot", "--net", "bogus"), 2, []string{"--net", "bogus", "tap=NAME"}},
		{"NetForward", boots("boot", "--net", "user,forward=80"), 2, []string{"forward=80", "tcp:8080:80"}},
		{"NetMAC", boots("boot", "--net", "user,mac=01:00:00:00:00:01"), 2, []string{"mac=", "even"}},
		{"NetMACZero", boots("boot", "--net", "user,mac=00:00:00:00:00:00"), 2, []string{"mac=", "nobody's"}},
		{"NetForwardAnyPort", boots("boot", "--net", "user,forward=tcp:0:22"), 2, []string{"tcp:0:22", "1 to 65535"}},
		{"NetNoneAndAnother", boots("boot", "--net", "none", "--net", "user"), 2, []string{"--net none", "another --net"}},
		{"VsockEmpty", boots("boot", "--vsock", ""), 2, []string{"--vsock is empty", "cid=N,path=P"}},
		{"VsockLongPath", boots("boot", "--vsock", "cid=3,path="+strings.Repeat("x", 108)), 2, []string{"--vsock", "108 bytes", "up to 107"}},
		{"VsockCID", boots("boot", "--vsock", "cid=2,path=v"), 2, []string{"cid=2", "3 to 4294967294"}},
		{"VsockPath", boots("boot", "--vsock", "cid=3"), 2, []string{"path= is missing"}},
		{"Serial", boots("boot", "--serial", "bogus"), 2, []string{"--serial", "bogus", "file:PATH"}},
		{"SerialOption", boots("boot", "--serial", "file:out,append=maybe"), 2, []string{"--serial", "append=maybe", "on or off"}},
		{"SerialLongPath", boots("boot", "--serial", "unix:"+strings.Repeat("x", 108)), 2, []string{"--serial", "108 bytes", "up to 107"}},
		{"SerialToKernel", boots("boot", "--serial", "file:./probe"), 2, []string{"--serial file:./probe", "--kernel probe", "another"}},
		{"SerialToInitrd", boots("boot", "--initrd", "initrd", "--serial", "file:initrd"), 2, []string{"--serial file:initrd", "--initrd", "another"}},
		{"SerialToConfig", boots("boot", "--config", "good.json", "--serial", "file:good.json"), 2, []string{"--serial file:good.json", "--config", "another"}},
		{"SerialToDisk", boots("boot", "--disk", "file=disk.img", "--serial", "file:link.img"), 2, []string{"--serial file:link.img", "--disk file=disk.img", "another"}},
		{"SerialAppendsToDisk", boots("boot", "--disk", "file=disk.img", "--serial", "file:disk.img,append=on"), 2, []string{"--serial", "--disk", "another"}},
		{"ConsoleToSerial", boots("boot", "--serial", "file:out", "--console", "file:./out"), 2, []string{"--console file:./out", "--serial file:out", "another"}},
		{"SerialTwice", boots("boot", "--console", "stdio"), 2, []string{"--serial and --console", "file or a socket"}},
		{"QMPAddress", boots("boot", "--qmp", "bogus"), 2, []string{"--qmp", "bogus", "unix:PATH"}},
		{"QMPForAll", boots("boot", "--qmp", "tcp:0.0.0.0:4444"), 2, []string{"--qmp", "0.0.0.0", "127.0.0.1"}},
		{"QMPPort", boots("boot", "--qmp", "tcp:127.0.0.1:99999"), 2, []string{"--qmp", "99999", "1 to 65535"}},
		{"QMPAnyPort", boots("boot", "--qmp", "tcp:localhost:0"), 2, []string{"--qmp", "port 0", "1 to 65535"}},
		{"QMPLongPath", boots("boot", "--qmp", "unix:"+strings.Repeat("x", 108)), 2, []string{"--qmp", "108 bytes", "up to 107"}},
		{"UUID", boots("boot", "--uuid", "1"), 2, []string{"--uuid", "must look like"}},
		{"Name", boots("boot", "--name", "../x"), 2, []string{"--name", "../x", "letters"}},
		{"ConfigKey", boots("boot", "--config", "unknown.json"), 2, []string{"unknown.json", "kernle", "not a flag"}},
		{"ConfigValue", boots("boot", "--config", "wrong.json"), 2, []string{"wrong.json", "cpus", "many"}},
		{"ConfigText", boots("boot", "--config", "broken.json"), 2, []string{"broken.json", "too early", "write an object"}},
		{"ConfigList", boots("boot", "--config", "list.json"), 2, []string{"list.json", "not an object", "write an object"}},
		{"ConfigEmpty", boots("boot", "--config", "empty"), 2, []string{"configuration empty", "it is empty", "write an object"}},
		{"Output", []string{"ps", "--output", "yaml"}, 2, []string{"--output", "yaml", "text and json"}},
		{"NoMachine", []string{"qmp"}, 2, []string{"gnomon qmp --help"}},
	} {
		t.Run(test.name, func(t *testing.T) { p.refused(t, test.status, test.words, gnomon, test.args...) })
	}
}

// What another process has is not taken from it.
func TestTaken(t *testing.T) {
	p := newPlace(t)
	in := func(name string) string { return filepath.Join(p.dir, name) }
	l, err := net.Listen("unix", in("taken"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	port := tcp.Addr().(*net.TCPAddr).Port
	p.before = p.files(t)

	for name, args := range map[string][]string{
		"QMP":     {"--qmp", "unix:./taken"},
		"Serial":  {"--serial", "unix:taken"},
		"Console": {"--console", "unix:taken"},
		"Vsock":   {"--vsock", "cid=3,path=taken"},
	} {
		t.Run(name, func(t *testing.T) {
			p.refused(t, 1, []string{"taken", "in use", "choose another path"}, gnomon, boots("boot", args...)...)
		})
	}
	t.Run("QMPPort", func(t *testing.T) {
		p.refused(t, 1, []string{"QMP", "address already in use", "choose another"}, gnomon, boots("boot", "--qmp", fmt.Sprintf("tcp:127.0.0.1:%d", port))...)
	})
	t.Run("ForwardedPort", func(t *testing.T) {
		p.refused(t, 1, []string{fmt.Sprintf("tcp port %d is taken", port), "choose another"}, gnomon,
			boots("boot", "--net", fmt.Sprintf("user,forward=tcp:%d:80", port))...)
	})
	t.Run("DiskOfQEMU", func(t *testing.T) {
		holder := exec.Command("qemu-io", "-f", "raw", in("disk.img"))
		stdin, err := holder.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := holder.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			stdin.Close() // qemu-io ends with its input
			holder.Wait()
		}()
		fmt.Fprintln(stdin, "read 0 512")
		awaitText(t, stdout, "read 512/512")
		p.refused(t, 1, []string{"disk.img", "in use", "its own copy"}, gnomon, boots("boot", "--disk", "file=disk.img")...)
		for _, serial := range []string{"file:disk.img", "file:link.img", "file:disk.img,append=on"} {
			p.refused(t, 1, []string{"--serial", "in use as a machine's disk", "another file"}, gnomon, boots("boot", "--serial", serial)...)
		}
	})
}

// What the host cannot write is told of in one line each, and the machine goes on.
func TestHostFull(t *testing.T) {
	p := newPlace(t)
	told := func(t *testing.T, r result, words ...string) {
		t.Helper()
		if r.status != 0 || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("status %d: %s", r.status, r.stderr)
		}
		for _, word := range append(words, "no space left on device") {
			if !strings.Contains(r.stderr, word) {
				t.Errorf("nothing about %q in: %s", word, r.stderr)
			}
		}
	}
	t.Run("Serial", func(t *testing.T) {
		told(t, p.run(t, gnomon, boots("boot", "--quiet", "--serial", "file:/dev/full")...), "serial0", "lost")
	})
	t.Run("Disk", func(t *testing.T) {
		needRoot(t)
		const script = `mount -t tmpfs -o size=64k none tmp && truncate -s 1M tmp/full.img && exec "$@"`
		args := append([]string{"-m", "sh", "-c", script, "sh", gnomon}, boots("blk op=seqwrite bs=64K total=1M", "--disk", "file=tmp/full.img")...)
		r := p.run(t, "unshare", args...)
		told(t, r, "disk disk0", "write failed")
		if !strings.Contains(r.stdout, "probe: done") {
			t.Errorf("the guest did not go on:\n%s", r.stdout)
		}
	})
	p.unchanged(t)
}

// A machine has as many devices as the message of too many says.
func TestMostDevices(t *testing.T) {
	p := newPlace(t)
	r := p.run(t, gnomon, boots("boot", slices.Repeat([]string{"--disk", "file=disk.img,readonly=on"}, 29)...)...)
	if r.status != 0 || !strings.Contains(r.stdout, "probe: done") {
		t.Errorf("status %d: %s%s", r.status, r.stdout, r.stderr)
	}
}

// awaitText reads until the text has come.
func awaitText(t *testing.T, r io.Reader, text string) {
	t.Helper()
	var seen strings.Builder
	for b := bufio.NewReader(r); !strings.Contains(seen.String(), text); {
		c, err := b.ReadByte()
		if err != nil {
			t.Fatalf("waiting for %q after %q: %v", text, seen.String(), err)
		}
		seen.WriteByte(c)
	}
}

// A socket that a killed process left behind is replaced, and is gone when the
// machine has ended.
func TestStaleSockets(t *testing.T) {
	p := newPlace(t)
	for _, name := range []string{"qmp", "serial", "console", "vsock"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(p.dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	r := p.run(t, gnomon, boots("boot", "--qmp", "unix:./qmp", "--serial", "unix:serial", "--console", "unix:console", "--vsock", "cid=3,path=vsock")...)
	if r.status != 0 || r.stderr != "" {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	p.unchanged(t)
}

// withDevices runs the command of "$@" in a mount namespace whose /dev has what
// the script makes there. Only root can.
const withDevices = `set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs -o mode=755 none /dev
mkdir /dev/net
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/urandom c 1 9
`

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making devices in a mount namespace takes root")
	}
}

const asNobody = "exec setpriv --reuid 65534 --regid 65534 --clear-groups -- \"$@\""

// A host or user without KVM is told what to do about it.
func TestWithoutKVM(t *testing.T) {
	needRoot(t)
	p := newPlace(t)
	for _, test := range []struct {
		name   string
		script string
		words  []string
	}{
		{"NoDevice", `exec "$@"`, []string{"KVM is not available", "/dev/kvm: no such file", "modprobe"}},
		{"NoModule", `mknod /dev/kvm c 10 254; exec "$@"`, []string{"KVM is not available", "modprobe"}},
		{"AnotherDevice", `mknod -m 666 /dev/kvm c 1 3; exec "$@"`, []string{"KVM is not available", "not a KVM device"}},
		{"NoPermission", `mknod -m 600 /dev/kvm c 10 232; ` + asNobody, []string{"no permission", "group", "root"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			args := append([]string{"-m", "sh", "-c", withDevices + test.script, "sh", "./gnomon"}, boots("boot", "--serial", "file:log")...)
			p.refused(t, 1, test.words, "unshare", args...)
		})
	}
}

func TestTapWithoutPermission(t *testing.T) {
	needRoot(t)
	p := newPlace(t)
	if err := os.Chown(filepath.Join(p.dir, "run"), 65534, 65534); err != nil {
		t.Fatal(err)
	}
	const kvm = "mknod -m 666 /dev/kvm c 10 232; "
	for name, test := range map[string]struct {
		script string
		words  []string
	}{
		"Interface": {"mknod -m 666 /dev/net/tun c 10 200; ", []string{"gnmtest9", "no permission", "ip tuntap add", "--net user"}},
		"Device":    {"mknod -m 600 /dev/net/tun c 10 200; ", []string{"gnmtest9", "no permission for /dev/net/tun", "--net user"}},
		"NoDevice":  {"", []string{"/dev/net/tun is missing", "modprobe tun"}},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"-m", "sh", "-c", withDevices + kvm + test.script + asNobody, "sh", "./gnomon"}, boots("boot", "--net", "tap=gnmtest9")...)
			p.refused(t, 1, test.words, "unshare", args...)
		})
	}
}

// waiting starts a machine whose guest waits for a line at the serial port.
func waiting(t *testing.T, args ...string) (*process, io.ReadWriter) {
	t.Helper()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	m, rw := launch(t, append([]string{"--kernel", kernel, "--append", "wait", "--memory", "16M", "--net", "none"}, args...)...)
	awaitText(t, rw, "probe: wait")
	return m, rw
}

// The exit status tells how the machine ended, and nothing of it stays.
func TestExitStatus(t *testing.T) {
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	ended := func(t *testing.T, m *process, want int) {
		t.Helper()
		if status := m.status(ctx, t); status != want {
			t.Errorf("exit status %d, want %d", status, want)
		}
		if _, err := os.Lstat(filepath.Join(os.Getenv("GNOMON_RUNTIME_DIR"), m.name)); err == nil {
			t.Error("the machine is still in the runtime directory")
		}
	}
	for _, test := range []struct {
		name, workload string
		flags          []string
		status         int
	}{
		{"PowerOff", "boot", nil, 0},
		{"Panic", "out port=0x505 count=2", nil, 3}, // the bytes 0 and 1
		{"Reset", "out port=0xcf9 count=8", []string{"--no-reboot"}, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, _ := launch(t, append([]string{"--kernel", kernel, "--append", test.workload, "--memory", "16M", "--net", "none"}, test.flags...)...)
			ended(t, m, test.status)
		})
	}
	for name, end := range map[string]func(t *testing.T, m *process, rw io.Writer){
		"Quit":   func(t *testing.T, m *process, _ io.Writer) { m.connect(ctx, t); m.do(ctx, t, "quit", nil, nil) },
		"CtrlAX": func(_ *testing.T, _ *process, rw io.Writer) { io.WriteString(rw, "\x01x") },
		"Term":   func(_ *testing.T, m *process, _ io.Writer) { m.Process.Signal(syscall.SIGTERM) },
		"Int":    func(_ *testing.T, m *process, _ io.Writer) { m.Process.Signal(syscall.SIGINT) },
	} {
		t.Run(name, func(t *testing.T) {
			m, rw := waiting(t)
			end(t, m, rw)
			ended(t, m, 0)
		})
	}
}

// A configuration file does what its flags do, and flags win over it.
func TestConfig(t *testing.T) {
	p := newPlace(t)
	config := `{"kernel": "probe", "append": "boot", "memory": "16M", "net": ["none"], "serial": "stdio"}`
	if err := os.WriteFile(filepath.Join(p.dir, "vm.json"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	ram := func(args ...string) string {
		t.Helper()
		r := p.run(t, gnomon, args...)
		_, rest, ok := strings.Cut(r.stdout, " ram=")
		if r.status != 0 || !ok {
			t.Fatalf("%q: status %d, %q, %s", args, r.status, r.stdout, r.stderr)
		}
		value, _, _ := strings.Cut(rest, " ")
		return value
	}
	byFlags, byFile := ram(boots("boot")...), ram("run", "--config", "vm.json")
	if byFlags != byFile {
		t.Errorf("%s bytes of RAM by flags, %s by the file", byFlags, byFile)
	}
	if won, want := ram("run", "--config", "vm.json", "--memory", "8M"), ram(boots("boot", "--memory", "8M")...); won != want || won == byFile {
		t.Errorf("%s bytes of RAM by the file and --memory 8M, %s by flags", won, want)
	}
}

// outputOf runs gnomon with the tests' runtime directory; it must succeed.
func outputOf(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(gnomon, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gnomon %q: %v: %s", args, err, &stderr)
	}
	return string(out)
}

// gnomon ps, gnomon qmp and the shell's completion find a machine by its name.
func TestMachinesByName(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	m, _ := waiting(t, "--cpus", "2")
	m.connect(ctx, t)

	var list []struct {
		Name, UUID, QMP string
		PID, CPUs       int
		Memory          uint64
	}
	if err := json.Unmarshal([]byte(outputOf(t, "ps", "--output", "json")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != m.name || list[0].PID != m.Process.Pid || list[0].CPUs != 2 || list[0].Memory != 16<<20 || len(list[0].UUID) != 36 {
		t.Errorf("gnomon ps: %+v", list)
	}
	if text := outputOf(t, "ps"); strings.Count(text, "\n") != 2 || !strings.Contains(text, m.name) || !strings.Contains(text, "16 MiB") {
		t.Errorf("gnomon ps:\n%s", text)
	}
	for _, machine := range []string{m.name, list[0].QMP, "unix:" + list[0].QMP} {
		var status struct{ Status string }
		if err := json.Unmarshal([]byte(outputOf(t, "qmp", machine, "query-status")), &status); err != nil || status.Status != "running" {
			t.Errorf("gnomon qmp %s: %+v, %v", machine, status, err)
		}
	}
	for prefix, args := range map[string][]string{
		m.name:         {"__complete", "qmp", ""},
		"query-status": {"__complete", "qmp", m.name, "query-sta"},
		"json":         {"__complete", "ps", "--output", ""},
	} {
		if got := outputOf(t, args...); !strings.Contains("\n"+got, "\n"+prefix+"\n") {
			t.Errorf("%q completes to\n%s", args, got)
		}
	}

	p := newPlace(t)
	taken := exec.Command(gnomon, boots("boot", "--name", m.name)...)
	taken.Dir = p.dir
	if out, err := taken.CombinedOutput(); taken.ProcessState == nil || taken.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "choose another --name") {
		t.Errorf("a taken name: %v, %s", err, out)
	}

	// A machine that was killed is not listed, and its name is free.
	if err := m.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-m.stopped
	if text := outputOf(t, "ps", "--output", "json"); strings.TrimSpace(text) != "[]" {
		t.Errorf("after kill -9: %s", text)
	}
	again := exec.Command(gnomon, boots("boot", "--name", m.name)...)
	again.Dir = p.dir
	if out, err := again.CombinedOutput(); err != nil {
		t.Errorf("the name of a killed machine: %v, %s", err, out)
	}
}

// gnomon qmp talks to QEMU as it does to us.
func TestQMPOfQEMU(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "qemu.sock")
	qemu := exec.Command("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio",
		"-qmp", "unix:"+socket+",server=on,wait=off")
	stdin, err := qemu.StdinPipe() // open, or else its first monitor would see the end
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		qemu.Process.Kill() // an error means that it has ended
		qemu.Wait()
	})
	awaitText(t, stdout, `"QMP"`) // by then it listens on its sockets
	var status struct{ Running bool }
	if err := json.Unmarshal([]byte(outputOf(t, "qmp", socket, "query-status")), &status); err != nil || !status.Running {
		t.Errorf("%+v, %v", status, err)
	}
	outputOf(t, "qmp", socket, "quit")
	io.Copy(io.Discard, stdout)
	if err := qemu.Wait(); err != nil {
		t.Error(err)
	}
}

func TestHelp(t *testing.T) {
	for _, command := range []string{"", "run", "ps", "qmp", "host", "version"} {
		args := append(strings.Fields(command), "--help")
		text := outputOf(t, args...)
		if !strings.Contains(text, "Usage:") {
			t.Errorf("gnomon %q:\n%s", args, text)
		}
		for _, line := range strings.Split(text, "\n") {
			if len(line) > 140 {
				t.Errorf("gnomon %q: a line of %d characters: %s", args, len(line), line)
			}
		}
	}
	if !strings.HasPrefix(outputOf(t, "version"), "gnomon ") || outputOf(t, "version") != outputOf(t, "--version") {
		t.Error("gnomon version and gnomon --version differ")
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if !strings.Contains(outputOf(t, "completion", shell), "gnomon") {
			t.Errorf("no completion for %s", shell)
		}
	}
}
