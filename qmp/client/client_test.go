package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/digitalocean/go-qemu/qemu"
	"github.com/google/go-cmp/cmp"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// startQEMU starts QEMU without a machine, and returns the address of its QMP socket.
func startQEMU(t *testing.T) string {
	t.Helper()
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	path := filepath.Join(t.TempDir(), "qemu.sock")
	cmd := exec.Command(binary, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "unix:"+path+",server=on,wait=off")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return "unix:" + path
		}
		time.Sleep(5 * time.Millisecond) // until QEMU listens
	}
}

type statusInfo struct {
	Status     string `qmp:"status"`
	Singlestep bool   `qmp:"singlestep"`
	Running    bool   `qmp:"running"`
}

func startGnomon(t *testing.T) (string, *qmp.Server) {
	t.Helper()
	reg := qmp.NewRegistry()
	qmp.RegisterEvent[qmp.Empty](reg, "STOP")
	qmp.RegisterEvent[qmp.Empty](reg, "RESUME")
	running := true
	qmp.Register(reg, "query-status", func(context.Context, *qmp.Session, qmp.Empty) (statusInfo, error) {
		if running {
			return statusInfo{Status: "running", Running: true}, nil
		}
		return statusInfo{Status: "paused"}, nil
	})
	set := func(to bool, event string) func(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
		return func(_ context.Context, s *qmp.Session, _ qmp.Empty) (qmp.Empty, error) {
			running = to
			return qmp.Empty{}, s.Server().Emit(event, nil)
		}
	}
	qmp.Register(reg, "stop", set(false, "STOP"))
	qmp.Register(reg, "cont", set(true, "RESUME"))
	qmp.Register(reg, "test-block", func(ctx context.Context, _ *qmp.Session, _ qmp.Empty) (qmp.Empty, error) {
		<-ctx.Done()
		return qmp.Empty{}, ctx.Err()
	})
	srv := qmp.NewServer(reg, qmp.Version{Major: 7, Minor: 2, Micro: 22, Package: "gnomon"})
	path := filepath.Join(t.TempDir(), "s")
	if err := srv.Listen("unix:" + path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	return path, srv
}

func dial(t *testing.T, addr string) *client.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestBoth does the same on QEMU and on us.
func TestBoth(t *testing.T) {
	ours, _ := startGnomon(t)
	for name, addr := range map[string]string{"qemu": startQEMU(t), "gnomon": ours} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			c := dial(t, addr)
			if v := c.Version.String(); !strings.HasPrefix(v, "7.2.") || !cmp.Equal(c.Capabilities, []string{"oob"}) {
				t.Errorf("version %s, capabilities %v", v, c.Capabilities)
			}
			events := c.Subscribe(ctx)
			var st struct{ Running bool }
			for _, step := range []struct {
				command string
				running bool
				event   string
			}{{"stop", false, "STOP"}, {"cont", true, "RESUME"}} {
				if err := c.Execute(ctx, step.command, nil, nil); err != nil {
					t.Fatal(err)
				}
				if e := <-events; e.Event != step.event || e.Timestamp.Seconds == 0 {
					t.Errorf("after %s came %+v", step.command, e)
				}
				if err := c.Execute(ctx, "query-status", nil, &st); err != nil || st.Running != step.running {
					t.Errorf("after %s: %+v, %v", step.command, st, err)
				}
			}
			// Longer than go-qemu's own client can read.
			var schema []map[string]any
			if err := c.Execute(ctx, "query-qmp-schema", nil, &schema); err != nil || len(schema) < 30 {
				t.Errorf("%d entries of schema, %v", len(schema), err)
			}
			names, err := c.Commands(ctx)
			if err != nil || !strings.Contains(fmt.Sprint(names), "query-status") {
				t.Errorf("commands %v, %v", names, err)
			}
			var refusal *qmp.Error
			if err := c.Execute(ctx, "nonsense", nil, nil); !errors.As(err, &refusal) || refusal.Class != qmp.CommandNotFound {
				t.Errorf("an unknown command: %v", err)
			}
			err = c.Execute(ctx, "job-cancel", map[string]string{"id": "j"}, nil)
			if !errors.As(err, &refusal) || *refusal != (qmp.Error{Class: qmp.GenericError, Desc: "Job not found"}) {
				t.Errorf("an unknown job: %v", err)
			}
			f, err := os.Open("/dev/null")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var added struct {
				FDSet int64 `json:"fdset-id"`
			}
			if err := c.ExecuteWithFile(ctx, "add-fd", map[string]any{"fdset-id": 5}, f, &added); err != nil || added.FDSet != 5 {
				t.Errorf("add-fd: %+v, %v", added, err)
			}
			domain, err := qemu.NewDomain(c, "vm")
			if err != nil {
				t.Fatal(err)
			}
			if v, err := domain.Version(); err != nil || v != c.Version.String() {
				t.Errorf("go-qemu's domain has version %s, %v", v, err)
			}
			if v, err := domain.Status(); err != nil || v != qemu.StatusRunning {
				t.Errorf("go-qemu's domain is %v, %v", v, err)
			}
			if list, err := domain.Commands(); err != nil || len(list) != len(names) {
				t.Errorf("go-qemu's domain has %d commands, %v", len(list), err)
			}
		})
	}
}

// TestConcurrentCommands uses one client from many goroutines, with events in between.
func TestConcurrentCommands(t *testing.T) {
	addr, srv := startGnomon(t)
	c := dial(t, addr)
	events := c.Subscribe(t.Context())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 100 {
				var v struct{ Package string }
				if err := c.Execute(t.Context(), "query-version", nil, &v); err != nil || v.Package != "gnomon" {
					t.Errorf("%d.%d: %+v, %v", i, j, v, err)
				}
				srv.Emit("STOP", nil)
			}
		})
	}
	wg.Wait()
	for range 800 {
		if e, ok := <-events; !ok || e.Event != "STOP" {
			t.Fatalf("event %+v, %v", e, ok)
		}
	}
}

func TestLostConnection(t *testing.T) {
	addr, srv := startGnomon(t)
	c := dial(t, addr)
	events := c.Subscribe(t.Context())
	srv.Close()
	if _, ok := <-events; ok {
		t.Error("events go on after the end")
	}
	if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, client.ErrConnection) {
		t.Errorf("a command after the end: %v", err)
	}
	if _, ok := <-c.Subscribe(t.Context()); ok {
		t.Error("events after the end")
	}
}

// TestImpatience gives up waiting for a response. The session must not take the late one for another's.
func TestImpatience(t *testing.T) {
	addr, _ := startGnomon(t)
	c := dial(t, addr)
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if err := c.Execute(ctx, "test-block", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("gave up with %v", err)
	}
	if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, client.ErrConnection) {
		t.Errorf("afterwards: %v", err)
	}
}

// Responses to a client that was killed come before those to the next one, not any number.
func TestLateResponses(t *testing.T) {
	const most = 9
	for _, c := range []struct{ before, after int }{{0, 0}, {1, 0}, {2, 1}, {0, 1}, {most, 0}, {0, most}, {most + 1, 0}, {0, most + 1}, {most, 1}} {
		addr := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", addr)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer l.Close()
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			in := json.NewDecoder(conn)
			answer := func(with string) bool {
				var command struct{ ID json.RawMessage }
				if in.Decode(&command) != nil {
					return false
				}
				if command.ID != nil {
					with += `, "id": ` + string(command.ID)
				}
				fmt.Fprintf(conn, "{%s}\n", with)
				return true
			}
			late := func(n int) {
				for i := range n {
					fmt.Fprintln(conn, []string{`{"return": {"status": "late"}, "id": "1"}`, `{"error": {"class": "GenericError", "desc": "late"}}`}[i%2])
				}
			}
			late(c.before)
			fmt.Fprintln(conn, `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}`)
			late(c.after)
			if answer(`"return": {}`) && answer(`"return": {"status": "running"}`) {
				_, _ = io.Copy(io.Discard, conn)
			}
		}()
		s, err := client.Dial(t.Context(), addr)
		if (err == nil) != (c.before+c.after <= most) {
			t.Errorf("%+v late responses: %v", c, err)
		}
		if err != nil {
			continue
		}
		var v struct{ Status string }
		if err := s.Execute(t.Context(), "query-status", nil, &v); err != nil || v.Status != "running" {
			t.Errorf("%+v late responses: the status is %q, %v", c, v.Status, err)
		}
		s.Close()
	}
}

func TestDialErrors(t *testing.T) {
	dir := t.TempDir()
	other, err := net.Listen("unix", filepath.Join(dir, "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	go func() {
		for {
			c, err := other.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("220 mail\r\n"))
		}
	}()
	for addr, want := range map[string]error{
		filepath.Join(dir, "none"): client.ErrConnect, filepath.Join(dir, "other"): client.ErrConnect,
		"tcp:nowhere": qmp.ErrAddress, "unix:": qmp.ErrAddress,
	} {
		if _, err := client.Dial(t.Context(), addr); !errors.Is(err, want) {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestParseCommand(t *testing.T) {
	for line, want := range map[string]string{
		`query-status`:                `{"execute":"query-status"}`,
		`balloon value=1024`:          `{"execute":"balloon","arguments":{"value":1024}}`,
		`set_link name=net0 up=false`: `{"execute":"set_link","arguments":{"name":"net0","up":false}}`,
		`c a=-1 b=18446744073709551615 c=1.5 d=True e= f=x=y`:           `{"execute":"c","arguments":{"a":-1,"b":18446744073709551615,"c":"1.5","d":"True","e":"","f":"x=y"}}`,
		`blockdev-add driver=qcow2 file.driver=file file.filename=/a b`: `error`,
		`blockdev-add driver=qcow2 file.driver=file file.filename=/a`:   `{"execute":"blockdev-add","arguments":{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}}`,
		`c list=[1, "a b"]   o={"x": {"y": 1.5}} s="5"`:                 `{"execute":"c","arguments":{"list":[1,"a b"],"o":{"x":{"y":1.5}},"s":"5"}}`,
		`{"execute": "c", "id": 1}`:                                     `{"execute": "c", "id": 1}`,
		`c a=1 a=2`:                                                     `error`, `c a=1 a.b=2`: `error`, `c a.b=2 a=1`: `error`, `c =1`: `error`, `c a={`: `error`, `c a=[1]2`: `error`,
		`{"execute"`: `error`, ``: `error`,
	} {
		got := "error"
		out, err := client.ParseCommand(client.SplitWords(line))
		if err == nil {
			got = string(out)
		} else if !errors.Is(err, client.ErrSyntax) {
			t.Errorf("%s: %v", line, err)
		}
		if got != want {
			t.Errorf("%s\nis    %s\nnot   %s", line, got, want)
		}
	}
}

// FuzzParseCommand makes commands of anything: they are JSON with a command's name in it.
func FuzzParseCommand(f *testing.F) {
	for _, s := range []string{`query-status`, `balloon value=1`, `b file.driver=file o={"a": [1, "x y"]}`, `{"execute": "c"}`, `c a="\"" b=[`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		out, err := client.ParseCommand(client.SplitWords(line))
		if err == nil && !json.Valid(out) {
			t.Fatalf("%q became %s", line, out)
		}
	})
}
