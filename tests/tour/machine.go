package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest"
)

// memory is the guest's, in bytes.
const memory = 256 << 20

// machine is the gnomon run of the tour.
type machine struct {
	dir    string // disk and sockets; removed at the end
	agent  *guest.Agent
	qmp    *client.Client
	events <-chan client.Event

	cmd    *exec.Cmd
	serial []io.Closer
	ended  chan struct{}
	err    error // of Wait; set before ended is closed
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// start runs the command; the Linux kit's agent is at its serial port.
func start(gnomon string, kit guest.Kit) (_ *machine, err error) {
	m := &machine{ended: make(chan struct{})}
	if m.dir, err = os.MkdirTemp("", "gnomon-tour"); err != nil {
		return nil, err
	}
	err = errors.Join(os.WriteFile(m.path("disk.img"), nil, 0o600), os.Truncate(m.path("disk.img"), diskSize))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(m.dir))
	}
	args := []string{
		"run", "--cpus", "2", "--memory", fmt.Sprintf("%dM", memory>>20),
		"--kernel", kit.Kernel, "--initrd", kit.Initrd, "--append", kit.Cmdline,
		"--disk", "file=" + m.path("disk.img"),
		"--net", "user",
		"--vsock", "cid=3,path=" + m.path("vsock"),
		"--qmp", "unix:" + m.path("qmp"),
	}
	fmt.Println("$", gnomon, quote(args))
	m.cmd = exec.Command(gnomon, args...)
	console := &lines{prefix: "  | "}
	m.cmd.Stderr = console
	in, err := m.cmd.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(m.dir))
	}
	out, outw, err := os.Pipe() // StdoutPipe's would be closed by Wait
	if err != nil {
		return nil, errors.Join(err, in.Close(), os.RemoveAll(m.dir))
	}
	m.serial = []io.Closer{in, out}
	m.cmd.Stdout = outw
	err = m.cmd.Start()
	outw.Close()
	if err != nil {
		return nil, errors.Join(err, in.Close(), out.Close(), os.RemoveAll(m.dir))
	}
	go func() {
		m.err = m.cmd.Wait()
		close(m.ended)
	}()
	m.agent = guest.NewAgent(struct {
		io.Reader
		io.Writer
	}{out, in}, console)
	return m, nil
}

// end ends the machine, if it still runs, and removes its files.
func (m *machine) end() error {
	if m.qmp != nil {
		m.qmp.Close()
	}
	m.cmd.Process.Signal(syscall.SIGTERM) // an error means that it has ended
	select {
	case <-m.ended:
	case <-time.After(10 * time.Second):
		m.cmd.Process.Kill()
		<-m.ended
	}
	for _, c := range m.serial {
		c.Close()
	}
	return os.RemoveAll(m.dir)
}

// do runs a QMP command.
func (m *machine) do(ctx context.Context, command string, args, result any) error {
	if err := m.qmp.Execute(ctx, command, args, result); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// await waits for an event.
func (m *machine) await(ctx context.Context, name string) error {
	for {
		select {
		case e, ok := <-m.events:
			if !ok {
				return fmt.Errorf("the QMP session ended before %s", name)
			}
			if e.Event == name {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", name, context.Cause(ctx))
		}
	}
}

// quote writes arguments as a shell takes them.
func quote(args []string) string {
	var b bytes.Buffer
	for _, a := range args {
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		if bytes.ContainsAny([]byte(a), " ") {
			a = "'" + a + "'"
		}
		b.WriteString(a)
	}
	return b.String()
}

// lines prints what is written to it with a prefix on each line.
type lines struct {
	prefix string
	mu     sync.Mutex
	rest   []byte // guarded by mu: a line that has not ended
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, p...)
	for {
		line, after, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		fmt.Printf("%s%s\n", l.prefix, bytes.TrimRight(line, "\r"))
		l.rest = after
	}
}
