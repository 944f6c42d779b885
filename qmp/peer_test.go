package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/qmp"
)

// guard is how long a test waits for something that should come at once, before it gives up.
const guard = 30 * time.Second

// startQEMU starts QEMU without a machine and returns the path of a QMP socket of it.
func startQEMU(t testing.TB) string {
	t.Helper()
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	dir := t.TempDir()
	path, own := filepath.Join(dir, "qemu.sock"), filepath.Join(dir, "own.sock")
	cmd := exec.Command(binary, "-machine", "none", "-nodefaults", "-display", "none",
		"-qmp", "unix:"+path+",server=on,wait=off", "-qmp", "unix:"+own+",server=on,wait=off")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
	})
	for {
		// A socket of our own: QEMU may wait for ever in accept when a client comes
		// right after another has gone.
		c, err := net.Dial("unix", own)
		if err == nil {
			awaitRunning(t, c)
			c.Close()
			return path
		}
		select {
		case <-exited:
			t.Fatalf("QEMU ended: %v", cmd.ProcessState)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// awaitRunning returns when QEMU has started its machine. It answers before it
// has, and would send whoever is connected a RESUME event.
func awaitRunning(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(guard)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(c, `{"execute": "qmp_capabilities"}{"execute": "query-status", "id": "status"}`)
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		switch text := lines.Text(); {
		case strings.Contains(text, `"running": true`):
			return
		case strings.Contains(text, `"id": "status"`):
			fmt.Fprintln(c, `{"execute": "query-status", "id": "status"}`)
		}
	}
	t.Fatalf("QEMU's machine did not start: %v", lines.Err())
}

// machine is the state that the commands of the test server are about.
type machine struct {
	srv     *qmp.Server
	path    string
	blocked chan struct{} // receives when test-block begins
	release chan struct{} // lets one test-block end

	mu    sync.Mutex
	calls int // guarded by mu; commands that had an effect
}

func (m *machine) called() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls
}

func (m *machine) call() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
}

type runState string

func (runState) Values() []string { return []string{"running", "paused"} }

type statusInfo struct {
	Status     runState `qmp:"status"`
	Singlestep bool     `qmp:"singlestep"`
	Running    bool     `qmp:"running"`
}

type balloonChange struct {
	Actual int64 `qmp:"actual"`
}

type driver string

func (driver) Values() []string { return []string{"raw", "null-co", "file"} }

// blockdev is a union and blockdevRef an alternate, in the shape of QEMU's.
type blockdev struct {
	Driver   driver       `qmp:"driver,tag"`
	NodeName *string      `qmp:"node-name"`
	Raw      *blockdevRaw `qmp:"raw,variant"`
	Null     *blockdevNul `qmp:"null-co,variant"`
}

type blockdevRaw struct {
	File blockdevRef `qmp:"file"`
	Size *int64      `qmp:"size"`
}

type blockdevNul struct {
	Size       *int64 `qmp:"size"`
	ReadZeroes bool   `qmp:"read-zeroes,omitempty"`
}

type blockdevRef struct {
	Definition *blockdev `qmp:",alternate"`
	Reference  *string   `qmp:",alternate"`
}

type everything struct {
	Base
	Count   int8         `qmp:"count"`
	Size    uint64       `qmp:"size,omitempty"`
	Ratio   *float64     `qmp:"ratio"`
	Flag    *bool        `qmp:"flag"`
	State   *runState    `qmp:"state"`
	Tags    []string     `qmp:"tags,omitempty"`
	Nested  *nested      `qmp:"nested"`
	List    []nested     `qmp:"list,omitempty"`
	Ref     *blockdevRef `qmp:"ref"`
	Payload *any         `qmp:"payload"`
	States  []runState   `qmp:"states,omitempty"`
	Matrix  [][]float64  `qmp:"matrix,omitempty"`
}

// Base is embedded: its members are those of the object around it.
type Base struct {
	Name string `qmp:"name"`
}

type nested struct {
	Value    int64    `qmp:"value"`
	Children []nested `qmp:"children,omitempty"`
}

// newMachine returns a server with the commands that the tests use, some of which QEMU has too, and those of more.
func newMachine(t testing.TB, more ...func(*qmp.Registry)) *machine {
	t.Helper()
	m := &machine{blocked: make(chan struct{}, 100), release: make(chan struct{})}
	reg := qmp.NewRegistry()
	qmp.RegisterEvent[qmp.Empty](reg, "STOP")
	qmp.RegisterEvent[balloonChange](reg, "BALLOON_CHANGE", qmp.RateLimit(time.Second))
	qmp.RegisterEvent[balloonChange](reg, "TICK")
	qmp.Register(reg, "query-status", func(context.Context, *qmp.Session, qmp.Empty) (statusInfo, error) {
		return statusInfo{Status: "running", Running: true}, nil
	})
	qmp.Register(reg, "balloon", func(_ context.Context, _ *qmp.Session, a struct {
		Value int64 `qmp:"value"`
	},
	) (qmp.Empty, error) {
		m.call()
		return qmp.Empty{}, &qmp.Error{Class: qmp.DeviceNotActive, Desc: "No balloon device has been activated"}
	})
	qmp.Register(reg, "set_link", func(_ context.Context, _ *qmp.Session, a struct {
		Name string `qmp:"name"`
		Up   bool   `qmp:"up"`
	},
	) (qmp.Empty, error) {
		m.call()
		return qmp.Empty{}, &qmp.Error{Class: qmp.DeviceNotFound, Desc: fmt.Sprintf("Device '%s' not found", a.Name)}
	})
	qmp.Register(reg, "blockdev-add", func(_ context.Context, _ *qmp.Session, a blockdev) (qmp.Empty, error) {
		m.call()
		return qmp.Empty{}, nil
	})
	qmp.Register(reg, "test-everything", func(_ context.Context, _ *qmp.Session, a everything) (everything, error) {
		m.call()
		return a, nil
	})
	qmp.Register(reg, "test-error", func(context.Context, *qmp.Session, qmp.Empty) (int, error) {
		return 0, errors.New("plain \"error\" \u00e9\n")
	})
	qmp.Register(reg, "test-block", func(ctx context.Context, _ *qmp.Session, _ qmp.Empty) (qmp.Empty, error) {
		m.blocked <- struct{}{}
		select {
		case <-m.release:
			return qmp.Empty{}, nil
		case <-ctx.Done():
			return qmp.Empty{}, ctx.Err()
		}
	})
	qmp.Register(reg, "test-long", func(context.Context, *qmp.Session, qmp.Empty) (string, error) {
		m.call()
		return strings.Repeat("long", 2500), nil
	})
	qmp.Register(reg, "test-oob", func(context.Context, *qmp.Session, qmp.Empty) (string, error) {
		return "overtaken", nil
	}, qmp.AllowOOB())
	qmp.Register(reg, "test-fd", func(_ context.Context, s *qmp.Session, a struct {
		Name string `qmp:"name"`
	},
	) (string, error) {
		f, err := s.TakeFD(a.Name)
		if err != nil {
			return "", err
		}
		defer f.Close()
		buf := make([]byte, 100)
		n, err := f.ReadAt(buf, 0)
		if n == 0 && err != nil {
			return "", err
		}
		return string(buf[:n]), nil
	})
	for _, r := range more {
		r(reg)
	}
	m.srv = qmp.NewServer(reg, qmp.Version{Major: 7, Minor: 2, Micro: 22, Package: "gnomon"})
	m.path = filepath.Join(t.TempDir(), "gnomon.sock")
	if err := m.srv.Listen("unix:" + m.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.srv.Close() })
	return m
}

// wire is a connection on which a test writes and reads what it likes.
type wire struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
	n int
}

func dial(t testing.TB, path string) *wire {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(guard))
	return &wire{t: t, Conn: c, r: bufio.NewReader(c)}
}

// negotiated returns a connection past the greeting, with the capabilities given.
func negotiated(t testing.TB, path string, capabilities ...string) *wire {
	t.Helper()
	w := dial(t, path)
	w.line()
	enable, _ := json.Marshal(append([]string{}, capabilities...))
	w.send(fmt.Sprintf(`{"execute": "qmp_capabilities", "arguments": {"enable": %s}}`, enable))
	if got := w.line(); got != `{"return": {}}` {
		t.Fatalf("qmp_capabilities answered %s", got)
	}
	return w
}

func (w *wire) send(s string) {
	w.t.Helper()
	if _, err := w.Write([]byte(s)); err != nil {
		w.t.Fatal(err)
	}
}

// line reads one line, which must end as QMP's do and be ASCII.
func (w *wire) line() string {
	w.t.Helper()
	s, err := w.r.ReadString('\n')
	if err != nil {
		w.t.Fatalf("after %q: %v", s, err)
	}
	s, ok := strings.CutSuffix(s, "\r\n")
	if !ok {
		w.t.Fatalf("%q does not end in CRLF", s)
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			w.t.Fatalf("%q is not printable ASCII", s)
		}
	}
	if !json.Valid([]byte(s)) {
		w.t.Fatalf("%q is not JSON", s)
	}
	return s
}

// ask sends input as it is, gets the peer into a known state, and returns the lines that the input was answered with.
func (w *wire) ask(input string) (lines []string) {
	w.t.Helper()
	w.send(input)
	return w.settle()
}

// settle returns all lines up to the answer to a command that follows a line end.
func (w *wire) settle() (lines []string) {
	w.t.Helper()
	w.n++
	w.send(fmt.Sprintf("\n{\"execute\": \"query-status\", \"id\": \"settled %d\"}", w.n))
	end := fmt.Sprintf(`"settled %d"`, w.n)
	for {
		l := w.line()
		if strings.Contains(l, end) {
			return lines
		}
		lines = append(lines, l)
	}
}

// fdNumber is what differs between two processes about the same descriptor.
var fdNumber = regexp.MustCompile(`"fd": [0-9]+`)

// sortFDSets brings what query-fdsets returns into an order: QEMU lists what came last first.
func sortFDSets(v any) {
	switch v := v.(type) {
	case map[string]any:
		for _, e := range v {
			sortFDSets(e)
		}
	case []any:
		for _, e := range v {
			sortFDSets(e)
		}
		slices.SortFunc(v, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	}
}
