package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/qmp"
)

type qmpTestArgs struct {
	Name  string   `qmp:"name"`
	Count int64    `qmp:"count,omitempty"`
	Tags  []string `qmp:"tags,omitempty"`
	Deep  *struct {
		X int64 `qmp:"x"`
	} `qmp:"deep"`
}

type qmpTestEvent struct {
	Text string `qmp:"text"`
}

// startQMP serves a command that returns its arguments, and one that emits an event.
func startQMP(t *testing.T) (path string, srv *qmp.Server) {
	t.Helper()
	reg := qmp.NewRegistry()
	qmp.RegisterEvent[qmpTestEvent](reg, "TEST_EVENT")
	qmp.RegisterEvent[qmpTestEvent](reg, "SHUTDOWN")
	qmp.Register(reg, "test-echo", func(_ context.Context, _ *qmp.Session, a qmpTestArgs) (qmpTestArgs, error) { return a, nil })
	qmp.Register(reg, "test-emit", func(_ context.Context, s *qmp.Session, _ qmp.Empty) (qmp.Empty, error) {
		return qmp.Empty{}, s.Server().Emit("TEST_EVENT", qmpTestEvent{"hello"})
	})
	srv = qmp.NewServer(reg, qmp.Version{Major: 7, Minor: 2, Package: "gnomon"})
	path = filepath.Join(t.TempDir(), "qmp.sock")
	if err := srv.Listen("unix:" + path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	return path, srv
}

// gnomonQMP runs gnomon qmp with the arguments and standard input given.
func gnomonQMP(t *testing.T, in string, args ...string) (out string, err error) {
	t.Helper()
	cmd := newQMPCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	var b bytes.Buffer
	cmd.SetOut(&b)
	cmd.SetErr(io.Discard)
	cmd.SetIn(strings.NewReader(in))
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(t.Context())
	return b.String(), err
}

func TestQMPCommand(t *testing.T) {
	path, _ := startQMP(t)
	for _, test := range []struct {
		args []string
		in   string
		want string
	}{
		{[]string{path, "test-echo", "name=n", "count=3", `tags=["a","b"]`, "deep.x=5", "--output", "json"}, "", `{"name":"n","count":3,"tags":["a","b"],"deep":{"x":5}}` + "\n"},
		{[]string{"unix:" + path, "test-echo", "name=n"}, "", "{\n  \"name\": \"n\"\n}\n"},
		{[]string{path, "query-jobs"}, "", "[]\n"},
		{[]string{path, "--output", "json"}, `{"execute": "query-jobs"} {"execute": "test-echo", "arguments": {"name": "é"}}`, "[]\n{\"name\":\"\\u00E9\"}\n"},
		{[]string{path}, "", ""},
	} {
		out, err := gnomonQMP(t, test.in, test.args...)
		if err != nil || out != test.want {
			t.Errorf("%v: %q, %v", test.args, out, err)
		}
	}
}

func TestQMPErrors(t *testing.T) {
	path, _ := startQMP(t)
	for _, test := range []struct {
		args []string
		in   string
		want string
	}{
		{[]string{path, "nonsense"}, "", "CommandNotFound: The command nonsense has not been found"},
		{[]string{path, "test-echo"}, "", "GenericError: Parameter 'name' is missing"},
		{[]string{path, "test-echo", "name=5"}, "", "GenericError: Invalid parameter type for 'name', expected: string"},
		{[]string{path}, `{"execute": "nonsense"}`, "CommandNotFound: The command nonsense has not been found"},
		{[]string{path}, `{"execute": `, "standard input"},
		{[]string{path, "test-echo", "name"}, "", "KEY=VALUE"},
		{[]string{path + "x", "test-echo"}, "", "gnomon ps"},
		{[]string{path, "--output", "xml"}, "", "--output"},
		{nil, "", "0 arguments were given: the command is qmp MACHINE"},
	} {
		out, err := gnomonQMP(t, test.in, test.args...)
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") || out != "" {
			t.Errorf("%v: %q, %v", test.args, out, err)
		}
	}
}

// TestQMPEvents watches events up to the end of the machine, which is an error
// when nothing told of it.
func TestQMPEvents(t *testing.T) {
	path, srv := startQMP(t)
	if err := watchToTheEnd(t, path, func() { srv.Close() }); err == nil || !strings.Contains(err.Error(), "the machine is gone") {
		t.Errorf("ended with %v", err)
	}
	path, srv = startQMP(t)
	err := watchToTheEnd(t, path, func() {
		if err := srv.Emit("SHUTDOWN", qmpTestEvent{"bye"}); err != nil {
			t.Error(err)
		}
		srv.Close()
	})
	if err != nil {
		t.Errorf("after SHUTDOWN: %v", err)
	}
}

// watchToTheEnd has gnomon qmp watch events, calls end when one has come, and
// returns the command's error.
func watchToTheEnd(t *testing.T, path string, end func()) error {
	t.Helper()
	cmd := newQMPCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	r, w := io.Pipe()
	cmd.SetOut(w)
	cmd.SetArgs([]string{path, "test-emit", "--events", "--output", "json"})
	done := make(chan error, 1)
	go func() { done <- cmd.ExecuteContext(t.Context()) }()
	lines := bufio.NewScanner(r)
	for _, want := range []string{"{}", `{"event":"TEST_EVENT","data":{"text":"hello"},"timestamp":{"seconds":`} {
		if !lines.Scan() || !strings.HasPrefix(lines.Text(), want) {
			t.Fatalf("printed %s", lines.Text())
		}
	}
	end()
	go io.Copy(io.Discard, r)
	return <-done
}

// TestQMPTerminal types at a terminal: completion, a command, an event, history, an error, the end.
func TestQMPTerminal(t *testing.T) {
	path, _ := startQMP(t)
	master, terminal := openTerminal(t)
	start := func() <-chan error {
		cmd := newQMPCommand()
		cmd.SetIn(terminal)
		cmd.SetOut(terminal)
		cmd.SetArgs([]string{path})
		done := make(chan error, 1)
		go func() { done <- cmd.ExecuteContext(t.Context()) }()
		return done
	}
	r := bufio.NewReader(master)
	await := func(want string) {
		t.Helper()
		var seen strings.Builder
		for !strings.Contains(seen.String(), want) {
			c, err := r.ReadByte()
			if err != nil {
				t.Fatalf("waiting for %q: %q, %v", want, seen.String(), err)
			}
			seen.WriteByte(c)
		}
		if strings.Contains(seen.String(), "gone") {
			t.Fatalf("the machine is there, but: %q", seen.String())
		}
	}
	typed := func(s string) {
		t.Helper()
		if _, err := master.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	done := start()
	await("(QMP) ")
	typed("help\r")
	await("query-commands lists the machine's commands")
	await("Tab completes")
	typed("test-ec\tname=n\r")
	await(`"name": "n"`)
	typed("test-e\t")
	await("test-echo  test-emit")
	typed("m\t\r")
	await(`TEST_EVENT {"text":"hello"}`)
	typed("nonsense a=1\r")
	await("CommandNotFound: The command nonsense has not been found")
	typed("\x1b[A\x1b[A\x1b[A\r") // the first command again
	await(`"name": "n"`)
	for _, key := range strings.Repeat("\x04\x03", 10) { // Ctrl-D, Ctrl-C
		typed(string(key))
		if err := <-done; err != nil {
			t.Error(err)
		}
		done = start()
		await("Connected to") // the terminal is raw
	}
	typed("\x04")
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func openTerminal(t *testing.T) (master, terminal *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return master, terminal
}

func TestQMPCompletion(t *testing.T) {
	path, _ := startQMP(t)
	t.Setenv("GNOMON_RUNTIME_DIR", t.TempDir())
	got, _ := completeQMP(newQMPCommand(), []string{path}, "test-")
	if strings.Join(got, " ") != "test-echo test-emit" {
		t.Errorf("commands %v", got)
	}
	if got, _ := completeQMP(newQMPCommand(), nil, ""); len(got) != 0 {
		t.Errorf("machines %v where there are none", got)
	}
}
