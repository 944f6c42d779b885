package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/qmp"
)

func TestArgumentsBeforeEffect(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	w.ask(`{"execute": "set_link", "arguments": {"name": "n", "up": true, "extra": 1}}`)
	w.ask(`{"execute": "set_link", "arguments": {"name": "n", "up": 1}}`)
	w.ask(`{"execute": "set_link", "arguments": {"name": "n"}}`)
	if n := m.called(); n != 0 {
		t.Fatalf("%d commands with bad arguments were run", n)
	}
	w.ask(`{"execute": "set_link", "arguments": {"name": "n", "up": true}}`)
	if n := m.called(); n != 1 {
		t.Fatalf("a good command ran %d times", n)
	}
}

// TestHandshake compares what a session answers before, during and after negotiation with QEMU, connection by connection.
func TestHandshake(t *testing.T) {
	qemu, ours := startQEMU(t), newMachine(t).path
	for _, inputs := range [][]string{
		{`{"execute": "query-status"}`, `{"execute": "nonsense", "id": 1}`, `{"exec-oob": "qmp_capabilities"}`, `{"execute": 1}`, `{}`, `null `},
		{`{"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}}`, `{"execute": "qmp_capabilities", "arguments": {"y": 1}}`},
		{`{"execute": "qmp_capabilities"}`, `{"execute": "qmp_capabilities"}`, `{"exec-oob": "query-status"}`, `{"execute": "query-jobs"}`},
		{`{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "é"}`, `{"exec-oob": "query-status", "id": 7}`},
		{`{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}`, `{"exec-oob": "qmp_capabilities"}`, `{"exec-oob": 1}`},
		{`{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "oob"]}}`, `{"execute": "qmp_capabilities"}`},
		{`{"execute": "qmp_capabilities", "arguments": {"enable": []}}`, `{"exec-oob": "query-status"}`},
	} {
		a, b := dial(t, qemu), dial(t, ours)
		theirs, greeting := a.line(), b.line()
		if want := `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "gnomon"}, "capabilities": ["oob"]}}`; greeting != want {
			t.Errorf("greeting is\n%s, not\n%s", greeting, want)
		}
		if !strings.HasSuffix(theirs, `"capabilities": ["oob"]}}`) {
			t.Errorf("QEMU greets with %s", theirs)
		}
		for _, input := range inputs {
			a.send(input)
			b.send(input)
			if want, got := a.line(), b.line(); got != want {
				t.Errorf("%v: %s\nQEMU %s\nus   %s", inputs, input, want, got)
			}
		}
		// QEMU serves one connection at a time.
		a.Close()
		b.Close()
	}
}

func TestErrors(t *testing.T) {
	w := negotiated(t, newMachine(t).path)
	for input, want := range map[string]string{
		`{"execute": "test-error"}`: `{"error": {"class": "GenericError", "desc": "plain \"error\" \u00E9\n"}}`,
		`{"execute": "balloon", "arguments": {"value": 1}}`: `{"error": {"class": "DeviceNotActive", ` +
			`"desc": "No balloon device has been activated"}}`,
		`{"execute": "set_link", "arguments": {"name": "n", "up": true}, "id": [{}]}`: `{"id": [{}], "error": ` +
			`{"class": "DeviceNotFound", "desc": "Device 'n' not found"}}`,
	} {
		if got := w.ask(input); len(got) != 1 || got[0] != want {
			t.Errorf("%s answered\n%s, not\n%s", input, got, want)
		}
	}
}

// TestEverything sends every kind of argument through a command and back.
func TestEverything(t *testing.T) {
	w := negotiated(t, newMachine(t).path)
	const value = `{"name": "\u00E9", "count": -128, "size": 18446744073709551615, "ratio": 0.5, "flag": false, "state": "paused", ` +
		`"tags": ["a", ""], "nested": {"value": 1, "children": [{"value": 2}]}, "list": [{"value": 3}], ` +
		`"ref": {"driver": "raw", "file": {"driver": "null-co", "size": 4, "read-zeroes": true}}, ` +
		`"payload": {"x": [1, 2.5, null, true, {"y": "z"}]}, "states": ["running"], "matrix": [[1, 2], []]}`
	for _, args := range []string{
		value, `{"name": "", "count": 0}`, `{"name": "n", "count": 127, "ref": "a reference"}`,
		`{"name": "n", "count": 0, "ref": {"driver": "file", "node-name": "f"}}`, `{"name": "n", "count": 0, "payload": null}`,
	} {
		got := w.ask(`{"execute": "test-everything", "arguments": ` + args + `}`)
		if want := `{"return": ` + args + `}`; len(got) != 1 || got[0] != want {
			t.Errorf("answered\n%s, not\n%s", got, want)
		}
	}
	for args, want := range map[string]string{
		`{"name": "n", "count": 128}`:                                               "Parameter 'count' expects int8_t",
		`{"name": "n", "count": 1, "size": -1}`:                                     "Parameter 'size' expects uint64_t",
		`{"name": "n", "count": 1, "size": "1"}`:                                    "Invalid parameter type for 'size', expected: uint64",
		`{"name": "n", "count": 1, "ratio": "1"}`:                                   "Invalid parameter type for 'ratio', expected: number",
		`{"name": "n", "count": 1, "state": "gone"}`:                                "Parameter 'state' does not accept value 'gone'",
		`{"name": "n", "count": 1, "states": ["gone"]}`:                             "Parameter 'null' does not accept value 'gone'",
		`{"name": "n", "count": 1, "matrix": [[1], [2, "3"]]}`:                      "Invalid parameter type for 'matrix[1][1]', expected: number",
		`{"name": "n", "count": 1, "nested": {"value": 1, "children": [{}]}}`:       "Parameter 'nested.children[0].value' is missing",
		`{"name": "n", "count": 1, "list": [{"value": 1}, {"value": 1, "no": 2}]}`:  "Parameter 'list[1].no' is unexpected",
		`{"name": "n", "count": 1, "ref": 1}`:                                       "Invalid parameter type for 'ref', expected: blockdevRef",
		`{"name": "n", "count": 1, "ref": {"driver": "raw"}}`:                       "Parameter 'ref.file' is missing",
		`{"name": "n", "count": 1, "flag": null}`:                                   "Invalid parameter type for 'flag', expected: boolean",
		`{"name": "n", "count": 1, "nested": []}`:                                   "Invalid parameter type for 'nested', expected: object",
		`{"name": "n", "count": 1, "ref": {"driver": "file", "read-zeroes": true}}`: "Parameter 'ref.read-zeroes' is unexpected",
	} {
		want := fmt.Sprintf(`{"error": {"class": "GenericError", "desc": %q}}`, want)
		if got := w.ask(`{"execute": "test-everything", "arguments": ` + args + `}`); len(got) != 1 || got[0] != want {
			t.Errorf("%s answered\n%s, not\n%s", args, got, want)
		}
	}
}

// TestOutOfBand has an out-of-band command overtake one that blocks, then fills the queue behind it.
func TestOutOfBand(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path, "oob")
	w.send(`{"execute": "test-block", "id": "block"}{"execute": "query-status", "id": "behind"}{"exec-oob": "test-oob", "id": "oob"}`)
	<-m.blocked
	if got := w.line(); got != `{"return": "overtaken", "id": "oob"}` {
		t.Fatalf("while a command blocks, got %s", got)
	}
	// One is behind already. Errors of syntax wait in the queue, too.
	for i := range 6 {
		w.send(fmt.Sprintf(`{"execute": "query-jobs", "id": %d}`, i))
	}
	w.send(`{"exec-oob": "test-oob", "id": "still"}`)
	if got := w.line(); got != `{"return": "overtaken", "id": "still"}` {
		t.Fatalf("with seven waiting, got %s", got)
	}
	// The eighth fills the queue: what follows is not read until it moves.
	w.send(`{"execute": 8}{"exec-oob": "test-oob", "id": "late"}`)
	w.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if s, err := w.r.ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("with the queue full, got %s, %v", s, err)
	}
	w.SetReadDeadline(time.Now().Add(guard))
	m.release <- struct{}{}
	var got []string
	for range 10 {
		got = append(got, w.line())
	}
	if got[0] != `{"return": {}, "id": "block"}` {
		t.Errorf("after release the first answer is %s", got[0])
	}
	late := 0
	var order []string
	for _, l := range got {
		if strings.Contains(l, `"late"`) {
			late++
			continue
		}
		order = append(order, l)
	}
	want := []string{
		`{"return": {}, "id": "block"}`, `{"return": {"status": "running", "singlestep": false, "running": true}, "id": "behind"}`,
		`{"return": [], "id": 0}`, `{"return": [], "id": 1}`, `{"return": [], "id": 2}`, `{"return": [], "id": 3}`,
		`{"return": [], "id": 4}`, `{"return": [], "id": 5}`,
		`{"error": {"class": "GenericError", "desc": "QMP input member 'execute' must be a string"}}`,
	}
	if d := cmp.Diff(want, order); d != "" || late != 1 {
		t.Errorf("in-band answers -want +got, %d late ones:\n%s", late, d)
	}
}

// TestInBandOneByOne shows that in-band commands of different sessions exclude each other, and out-of-band ones do not.
func TestInBandOneByOne(t *testing.T) {
	m := newMachine(t)
	a, b := negotiated(t, m.path), negotiated(t, m.path, "oob")
	a.send(`{"execute": "test-block"}`)
	<-m.blocked
	b.send(`{"execute": "query-status", "id": 1}{"exec-oob": "test-oob", "id": 2}`)
	if got := b.line(); got != `{"return": "overtaken", "id": 2}` {
		t.Fatalf("beside a blocked session, got %s", got)
	}
	b.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if s, err := b.r.ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("beside a blocked session, got %s, %v", s, err)
	}
	b.SetReadDeadline(time.Now().Add(guard))
	m.release <- struct{}{}
	if got := a.line(); got != `{"return": {}}` {
		t.Fatalf("the blocked command answered %s", got)
	}
	b.line()
}

// TestHangUpCancels ends a blocked command by closing its connection, in out-of-band mode, where this is noticed.
func TestHangUpCancels(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path, "oob")
	w.send(`{"execute": "test-block"}{"execute": "balloon", "arguments": {"value": 1}}`)
	<-m.blocked
	w.Close()
	// Runs only when the blocked command has ended, and after what was queued behind it.
	negotiated(t, m.path).ask(`{"execute": "query-jobs"}`)
	if n := m.called(); n != 0 {
		t.Errorf("a queued command was run %d times for a client that had gone", n)
	}
}

func sendFD(t *testing.T, w *wire, s string, files ...*os.File) {
	t.Helper()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	if _, _, err := w.Conn.(*net.UnixConn).WriteMsgUnix([]byte(s), unix.UnixRights(fds...), nil); err != nil {
		t.Fatal(err)
	}
}

func openFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestDescriptors compares the commands about descriptors with QEMU's, and counts that none is left open.
func TestDescriptors(t *testing.T) {
	// Go's network poller has descriptors from its first use on.
	warm := newMachine(t)
	negotiated(t, warm.path).Close()
	warm.srv.Close()
	before := openFDs(t)

	m := newMachine(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	qemu, ours := negotiated(t, startQEMU(t)), negotiated(t, m.path)
	for _, step := range []struct {
		pass    int
		command string
	}{
		{0, `{"execute": "add-fd"}`},
		{1, `{"execute": "add-fd"}`},
		{1, `{"execute": "add-fd", "arguments": {"opaque": "rdonly"}}`},
		{1, `{"execute": "add-fd", "arguments": {"fdset-id": -1}}`},
		{0, `{"execute": "add-fd", "arguments": {"fdset-id": 1}}`},
		{3, `{"execute": "add-fd", "arguments": {"fdset-id": 1, "opaque": "x"}}`},
		{0, `{"execute": "add-fd", "arguments": {"fdset-id": 1}}`},
		{1, `{"execute": "add-fd", "arguments": {"fdset-id": 7}}`},
		{1, `{"execute": "add-fd"}`},
		{0, `{"execute": "remove-fd", "arguments": {"fdset-id": 9}}`},
		{0, `{"execute": "remove-fd", "arguments": {"fdset-id": 7, "fd": 1}}`},
		{0, `{"execute": "remove-fd", "arguments": {"fdset-id": 7}}`},
		{0, `{"execute": "query-fdsets"}`},
		{1, `{"execute": "getfd", "arguments": {"fdname": "1x"}}`},
		{0, `{"execute": "getfd", "arguments": {"fdname": "x"}}`},
		{1, `{"execute": "query-status"}`},
		{0, `{"execute": "getfd", "arguments": {"fdname": "x"}}`}, // what came with an earlier command
		{1, `{"execute": "getfd", "arguments": {"fdname": "x"}}`},
		{0, `{"execute": "closefd", "arguments": {"fdname": "x"}}`},
		{0, `{"execute": "closefd", "arguments": {"fdname": "x"}}`},
		{2, `{"execute": "getfd", "arguments": {"fdname": "y"}}`},
	} {
		files := []*os.File{f, f, f}[:step.pass]
		for _, w := range []*wire{qemu, ours} {
			if len(files) > 0 {
				sendFD(t, w, step.command, files...)
			} else {
				w.send(step.command)
			}
		}
		want, got := qemu.line(), ours.line()
		if a, b := fdNumber.ReplaceAllString(want, `"fd": 0`), fdNumber.ReplaceAllString(got, `"fd": 0`); !sameJSON(t, a, b) {
			t.Errorf("%s\nQEMU %s\nus   %s", step.command, a, b)
		}
	}
	if got := ours.ask(`{"execute": "test-fd", "arguments": {"name": "y"}}`); got[0] != `{"return": "content"}` {
		t.Errorf("a named descriptor reads %s", got)
	}
	opened, release, err := m.srv.FDSets().Open(1, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.srv.FDSets().Open(1, os.O_RDWR); !errors.Is(err, qmp.ErrFDSet) {
		t.Errorf("a read-only descriptor opened for writing: %v", err)
	}
	ours.ask(`{"execute": "remove-fd", "arguments": {"fdset-id": 1}}`)
	if got := ours.ask(`{"execute": "query-fdsets"}`); !strings.Contains(got[0], `"fdset-id": 1`) {
		t.Errorf("an open set is gone: %s", got)
	}
	release()
	opened.Close()
	if got := ours.ask(`{"execute": "query-fdsets"}`); strings.Contains(got[0], `"fdset-id": 1`) {
		t.Errorf("a removed set is still there: %s", got)
	}
	// Descriptors beyond what a command takes, and those nobody takes at all.
	sendFD(t, ours, `{"execute": "query-status"}`, f, f, f, f, f)
	ours.line()
	sendFD(t, ours, `{"execute": "getfd", "arguments": {"fdname": "z"}}`, f, f, f, f, f)
	ours.line()
	sendFD(t, ours, "garbage", f, f)
	ours.settle()
	// Descriptors that come before the message they could belong to is complete, more than once.
	sendFD(t, ours, " ", f, f)
	sendFD(t, ours, " ", f)
	ours.settle()
	// Gone with the session: all that is left.
	ours.Close()
	m.srv.Close()
	qemu.Close()
	f.Close()
	if after := openFDs(t); after != before+1 { // one is the pidfd by which QEMU is waited for
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func sameJSON(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if err := errors.Join(json.Unmarshal([]byte(a), &x), json.Unmarshal([]byte(b), &y)); err != nil {
		t.Fatal(err)
	}
	sortFDSets(x)
	sortFDSets(y)
	return cmp.Equal(x, y)
}

// TestManyDescriptors passes more descriptors than are kept.
func TestManyDescriptors(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	refused := 0
	for i := range 100 {
		sendFD(t, w, fmt.Sprintf(`{"execute": "getfd", "arguments": {"fdname": "f%d"}}`, i), f)
		if strings.Contains(w.line(), "Too many") {
			refused++
		}
	}
	if refused != 36 {
		t.Errorf("%d of 100 names were refused, not 36", refused)
	}
}

// TestGoQEMU talks to us with go-qemu's own client.
func TestGoQEMU(t *testing.T) {
	m := newMachine(t)
	mon, err := goqemu.NewSocketMonitor("unix", m.path, guard)
	if err != nil {
		t.Fatal(err)
	}
	if err := mon.Connect(); err != nil {
		t.Fatal(err)
	}
	defer mon.Disconnect()
	if v := mon.Version.String(); v != "7.2.22" {
		t.Errorf("version %s", v)
	}
	events, err := mon.Events(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	out, err := mon.Run([]byte(`{"execute": "query-status"}`))
	if err != nil || !strings.Contains(string(out), `"running": true`) {
		t.Errorf("query-status: %s, %v", out, err)
	}
	if err := m.srv.Emit("TICK", balloonChange{Actual: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	e := <-events
	if e.Event != "TICK" || e.Data["actual"] != float64(1<<30) || e.Timestamp.Seconds == 0 {
		t.Errorf("event %+v", e)
	}
}

func TestEmit(t *testing.T) {
	m := newMachine(t)
	greeted, w := dial(t, m.path), negotiated(t, m.path)
	greeted.line()
	for name, data := range map[string]any{"NONE": nil, "TICK": nil, "STOP": balloonChange{}} {
		if err := m.srv.Emit(name, data); !errors.Is(err, qmp.ErrEvent) {
			t.Errorf("emitting %s with %v: %v", name, data, err)
		}
	}
	if err := m.srv.Emit("STOP", nil); err != nil {
		t.Fatal(err)
	}
	if got := w.line(); !strings.HasPrefix(got, `{"timestamp": {"seconds": `) || !strings.HasSuffix(got, `}, "event": "STOP"}`) {
		t.Errorf("STOP is %s", got)
	}
	// Not negotiated, so the next line is an answer and not the event.
	greeted.send(`{"execute": "query-status"}`)
	if got := greeted.line(); !strings.Contains(got, "Expecting capabilities negotiation") {
		t.Errorf("before negotiation came %s", got)
	}
}

// TestRateLimit emits faster than the event may be sent: the first and the last of an interval arrive.
func TestRateLimit(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	for i := range 100 {
		if err := m.srv.Emit("BALLOON_CHANGE", balloonChange{int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"0", "99"} {
		if got := w.line(); !strings.HasSuffix(got, `"data": {"actual": `+want+`}}`) {
			t.Errorf("%s came where %s was to", got, want)
		}
	}
}

// TestRateLimitBy emits faster than the event may be sent, of two things, and one of a kind that may be sent at any rate: the
// first and the last of each thing arrive, and all of that kind.
func TestRateLimitBy(t *testing.T) {
	m := newMachine(t, func(r *qmp.Registry) {
		qmp.RegisterEvent[balloonChange](r, "OF_PARITY", qmp.RateLimitBy(time.Second, func(data any) (string, bool) {
			n := data.(balloonChange).Actual
			return []string{"even", "odd"}[n%2], n < 1000
		}))
	})
	w := negotiated(t, m.path)
	for i := range 100 {
		if err := m.srv.Emit("OF_PARITY", balloonChange{int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := m.srv.Emit("OF_PARITY", balloonChange{1001}); err != nil {
			t.Fatal(err)
		}
	}
	// Two intervals end at nearly the same time.
	for _, want := range []string{"^0$", "^1$", "^1001$", "^1001$", "^9[89]$", "^9[89]$"} {
		got := w.line()
		_, number, _ := strings.Cut(strings.TrimSuffix(got, "}}"), `"actual": `)
		if ok, err := regexp.MatchString(want, number); !ok || err != nil {
			t.Errorf("%s came where %s was to", got, want)
		}
	}
}

// TestSlowReader floods a client that reads nothing: emitting goes on, others are served, and the client is hung up on.
func TestSlowReader(t *testing.T) {
	m := newMachine(t)
	slow, w := negotiated(t, m.path), negotiated(t, m.path)
	total := 0
	for i := range 40_000 {
		if err := m.srv.Emit("TICK", balloonChange{int64(i)}); err != nil {
			t.Fatal(err)
		}
		if got := w.line(); !strings.HasSuffix(got, fmt.Sprintf(`{"actual": %d}}`, i)) {
			t.Fatalf("event %d is %s", i, got)
		}
	}
	for {
		n, err := slow.Read(make([]byte, 64<<10))
		total += n
		if err != nil {
			break
		}
	}
	if total > 2<<20 {
		t.Errorf("%d bytes were held for a client that did not read", total)
	}
}

// TestSlowReaderOfResponses sends commands without reading answers: the server stops reading, and goes on when answers are read.
func TestSlowReaderOfResponses(t *testing.T) {
	w := negotiated(t, newMachine(t).path)
	const commands = 500
	sent := make(chan error, 1)
	go func() {
		for i := range commands {
			if _, err := fmt.Fprintf(w, `{"execute": "query-qmp-schema", "id": %d}`, i); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	for i := range commands {
		if got := w.line(); !strings.HasSuffix(got, fmt.Sprintf(`, "id": %d}`, i)) {
			t.Fatalf("answer %d ends in %s", i, got[len(got)-20:])
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
}

// TestUnreadResponses sends commands without end and reads nothing: few are run, and the sender is kept waiting.
func TestUnreadResponses(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	const limit = 200_000
	command := []byte(`{"execute": "test-long"}`)
	w.SetWriteDeadline(time.Now().Add(time.Second))
	sent := 0
	for sent < limit {
		if _, err := w.Write(command); err != nil {
			break
		}
		sent++
	}
	if n := m.called(); sent == limit || n > 1000 {
		t.Errorf("%d commands were taken and %d run for a client that does not read", sent, n)
	}
}

func TestManyConnections(t *testing.T) {
	m := newMachine(t)
	var wg sync.WaitGroup
	for i := range 100 {
		w := negotiated(t, m.path)
		wg.Go(func() {
			for j := range 100 {
				fmt.Fprintf(w, `{"execute": "query-status", "id": [%d, %d]}`, i, j)
				l, err := w.r.ReadString('\n')
				if err != nil || !strings.Contains(l, fmt.Sprintf(`"id": [%d, %d]`, i, j)) {
					t.Errorf("connection %d, command %d: %s, %v", i, j, l, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	a := qmp.NewServer(qmp.NewRegistry(), qmp.Version{})
	b := qmp.NewServer(qmp.NewRegistry(), qmp.Version{})
	if err := a.Listen("unix:" + path + ",server=on,wait=off"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v", info.Mode(), err)
	}
	if err := b.Listen("unix:" + path); !errors.Is(err, qmp.ErrListen) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a taken socket: %v", err)
	}
	negotiated(t, path)
	// A dead owner's socket is replaced, and its owner does not remove the new one.
	stale := filepath.Join(dir, "stale")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if err := a.Listen("unix:" + stale); err != nil {
		t.Errorf("a stale socket: %v", err)
	}
	os.Remove(path)
	if err := b.Listen("unix:" + path); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("closing removed another server's socket: %v", err)
	}
	if _, err := os.Stat(stale); err == nil {
		t.Error("closing left the socket's file")
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]error{
		"unix:" + file: qmp.ErrListen, "unix:" + dir + "/no/such": qmp.ErrListen, "unix:": qmp.ErrAddress, "nonsense": qmp.ErrAddress,
		"tcp:1.2.3.4:5": qmp.ErrAddress, "tcp::4444": qmp.ErrAddress, "tcp:localhost": qmp.ErrAddress,
		"unix:" + path + "2,server=off": qmp.ErrAddress, "unix:" + dir + strings.Repeat("/x", 100): qmp.ErrListen,
	} {
		if err := b.Listen(addr); !errors.Is(err, want) || strings.Contains(fmt.Sprint(err), "\n") {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if err := b.Listen("tcp:localhost:0"); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := b.Listen("tcp:localhost:0"); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("listening after the end: %v", err)
	}
}

func TestTCP(t *testing.T) {
	s := qmp.NewServer(qmp.NewRegistry(), qmp.Version{Package: "p"})
	defer s.Close()
	if err := s.Listen("tcp:127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	mon, err := goqemu.NewSocketMonitor("tcp", s.Addrs()[0].String(), guard)
	if err != nil {
		t.Fatal(err)
	}
	if err := mon.Connect(); err != nil {
		t.Fatal(err)
	}
	defer mon.Disconnect()
	out, err := mon.Run([]byte(`{"execute": "query-version"}`))
	if want := `{"return": {"qemu": {"micro": 0, "minor": 0, "major": 0}, "package": "p"}}`; err != nil || string(out) != want {
		t.Errorf("query-version: %s, %v", out, err)
	}
}

// TestCloseAnswers closes the server while a command runs: the command is cancelled, and still answered.
func TestCloseAnswers(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	w.send(`{"execute": "test-block", "id": 1}{"execute": "query-status", "id": 2}`)
	<-m.blocked
	m.srv.Close()
	if got := w.line(); got != `{"id": 1, "error": {"class": "GenericError", "desc": "context canceled"}}` {
		t.Errorf("answered %s", got)
	}
	if s, err := w.r.ReadString('\n'); err == nil {
		t.Errorf("after the end came %s", s)
	}
}
