// Package tests runs the gnomon command with real guests.
package tests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest"
)

// limit ends a test that hangs; no test depends on how long anything takes.
const limit = 15 * time.Minute

var gnomon string // the command under test

func TestMain(m *testing.M) {
	os.Exit(inNetwork(func() int { return testGnomon(m) }))
}

// testGnomon runs the tests with a command that it builds.
func testGnomon(m *testing.M) int {
	dir, err := os.MkdirTemp("", "gnomon-tests")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	gnomon = filepath.Join(dir, "gnomon")
	build := exec.Command("go", "build", "-o", gnomon, "./tools/gnomon")
	build.Dir = ".."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build gnomon: %v\n%s", err, out)
		return 1
	}
	// Machines of these tests are apart from the user's.
	os.Setenv("GNOMON_RUNTIME_DIR", filepath.Join(dir, "run"))
	return m.Run()
}

// output keeps what a process prints.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// process is a gnomon run.
type process struct {
	*exec.Cmd
	name    string
	qmp     *client.Client
	log     output // standard error, and what is not an agent's on the serial port
	stopped chan struct{}
	err     error // of Wait; set before stopped is closed
}

// launch starts gnomon run; its standard input and output are the serial port,
// at which rw is the test's end.
func launch(t *testing.T, args ...string) (p *process, rw io.ReadWriter) {
	t.Helper()
	return launchCommand(t, "run", args...)
}

// launchCommand is launch for a command that may be another than run.
func launchCommand(t *testing.T, command string, args ...string) (p *process, rw io.ReadWriter) {
	t.Helper()
	return launchProgram(t, gnomon, append([]string{command, "--name", machineName(t)}, args...)...)
}

func machineName(t *testing.T) string {
	return strings.NewReplacer("/", "-", "#", "-").Replace(t.Name())
}

// launchProgram is launch for another VMM.
func launchProgram(t *testing.T, program string, args ...string) (p *process, rw io.ReadWriter) {
	t.Helper()
	p = &process{name: machineName(t), stopped: make(chan struct{})}
	p.Cmd = exec.Command(program, args...)
	p.Stderr = &p.log
	in, err := p.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// A pipe of our own: StdoutPipe's is closed by Wait.
	out, outw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.Stdout = outw
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	outw.Close()
	go func() {
		p.err = p.Wait()
		close(p.stopped)
	}()
	t.Cleanup(func() {
		p.Process.Kill() // an error means that it has ended
		<-p.stopped
		out.Close()
		if t.Failed() {
			t.Logf("%s:\n%s", p.name, &p.log)
		}
	})
	return p, struct {
		io.Reader
		io.Writer
	}{out, in}
}

// connect opens the machine's QMP socket.
func (p *process) connect(ctx context.Context, t *testing.T) {
	t.Helper()
	address := "unix:" + filepath.Join(os.Getenv("GNOMON_RUNTIME_DIR"), p.name, "qmp.sock")
	for {
		var err error
		if p.qmp, err = client.Dial(ctx, address); err == nil {
			t.Cleanup(func() { p.qmp.Close() })
			return
		}
		select {
		case <-p.stopped:
			t.Fatalf("the machine ended: %v\n%s", p.err, &p.log)
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(20 * time.Millisecond): // until it listens
		}
	}
}

// do runs a QMP command that must succeed.
func (p *process) do(ctx context.Context, t *testing.T, command string, args, result any) {
	t.Helper()
	if err := p.qmp.Execute(ctx, command, args, result); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
}

// status waits for the process's end and returns its exit status.
func (p *process) status(ctx context.Context, t *testing.T) int {
	t.Helper()
	select {
	case <-p.stopped:
	case <-ctx.Done():
		t.Fatalf("the machine did not end: %v", ctx.Err())
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		return exit.ExitCode()
	}
	if p.err != nil {
		t.Fatal(p.err)
	}
	return 0
}

// residentRAM is how much of the guest's memory the process has in RAM, in bytes.
func (p *process) residentRAM(t *testing.T) int {
	t.Helper()
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	total, inRAM := 0, false
	for _, line := range strings.Split(string(smaps), "\n") {
		fields := strings.Fields(line)
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-"):
			inRAM = strings.Contains(line, "memfd:gnomon-ram")
		case inRAM && len(fields) >= 2 && fields[0] == "Rss:":
			kib, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			total += kib << 10
		}
	}
	return total
}

// bootLinux starts the Linux kit with the given further flags and waits until
// its init answers.
func bootLinux(ctx context.Context, t *testing.T, args ...string) (*process, *guest.Agent) {
	t.Helper()
	kit := guest.Linux(t)
	p, rw := launch(t, append([]string{"--kernel", kit.Kernel, "--initrd", kit.Initrd, "--append", kit.Cmdline}, args...)...)
	agent := guest.NewAgent(rw, &p.log)
	if err := agent.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return p, agent
}

// freePort returns a TCP port of the loopback interface that was free just now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
