package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// fakeGuest plays the guest's end of a stream.
type fakeGuest struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Scanner
}

func newFakeGuest(t *testing.T, log io.Writer) (*Agent, *fakeGuest) {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { _, _ = ours.Close(), theirs.Close() })
	return NewAgent(ours, log), &fakeGuest{t: t, conn: theirs, in: bufio.NewScanner(theirs)}
}

func (g *fakeGuest) next() wire.Request {
	var req wire.Request
	if !g.in.Scan() {
		g.t.Error("the stream ended before a request came")
		return req
	}
	if err := json.Unmarshal(g.in.Bytes(), &req); err != nil {
		g.t.Errorf("not a request: %v", err)
	}
	return req
}

func (g *fakeGuest) say(format string, args ...any) {
	if _, err := fmt.Fprintf(g.conn, format, args...); err != nil {
		g.t.Error(err)
	}
}

func TestAgentFindsRepliesAmongKernelMessages(t *testing.T) {
	var log bytes.Buffer
	a, g := newFakeGuest(t, &log)
	go func() {
		g.say("[    0.1] Linux\r\n%s after 1 s\n", wire.Ready)
		req := g.next()
		g.say("[    2.0] a message that the reply\x1e{\"id\":%d,\"result\":{\"total\":7}}\n", req.ID)
		_ = g.conn.Close()
	}()
	if err := a.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	m, err := a.MemInfo(t.Context())
	if err != nil || m.Total != 7 {
		t.Fatalf("got %+v, %v", m, err)
	}
	<-a.Gone()
	for _, want := range []string{"[    0.1] Linux\n", "[    2.0] a message that the reply\n"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q: %q", want, log.String())
		}
	}
}

func TestAgentMatchesRepliesInAnyOrder(t *testing.T) {
	a, g := newFakeGuest(t, nil)
	const n = 8
	go func() {
		var reqs []wire.Request
		for range n {
			reqs = append(reqs, g.next())
		}
		for i := n - 1; i >= 0; i-- {
			var args wire.PathArgs
			if err := json.Unmarshal(reqs[i].Args, &args); err != nil {
				t.Error(err)
			}
			data, _ := json.Marshal(wire.DataResult{Data: []byte(args.Path)})
			g.say("\x1e{\"id\":%d,\"result\":%s}\n", reqs[i].ID, data)
		}
	}()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			path := fmt.Sprint("/file/", i)
			got, err := a.GetFile(t.Context(), path)
			if err != nil || string(got) != path {
				t.Errorf("got %q, %v for %q", got, err, path)
			}
		})
	}
	all.Wait()
}

func TestAgentErrors(t *testing.T) {
	t.Run("of the guest", func(t *testing.T) {
		a, g := newFakeGuest(t, nil)
		go func() { g.say("\x1e{\"id\":%d,\"error\":\"mount: no such device\"}\n", g.next().ID) }()
		err := a.Mount(t.Context(), "/dev/none", "/mnt", "ext4", "")
		if !errors.Is(err, ErrAgent) || !strings.Contains(err.Error(), "no such device") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a stream that ends", func(t *testing.T) {
		a, g := newFakeGuest(t, nil)
		go func() {
			g.next()
			_ = g.conn.Close()
		}()
		if _, err := a.Clocks(t.Context()); !errors.Is(err, ErrAgentGone) || !errors.Is(err, io.EOF) {
			t.Fatalf("got %v", err)
		}
		if _, err := a.Clocks(t.Context()); !errors.Is(err, ErrAgentGone) {
			t.Fatalf("a later request got %v", err)
		}
		if err := a.WaitReady(t.Context()); !errors.Is(err, ErrAgentGone) {
			t.Fatalf("WaitReady got %v", err)
		}
	})
	t.Run("replies that are none", func(t *testing.T) {
		var log bytes.Buffer
		a, g := newFakeGuest(t, &log)
		go func() {
			req := g.next()
			g.say("\x1e\n\x1enull\n\x1e{\n\x1e{\"id\":999}\n\x1e{\"id\":%d,\"result\":{\"power_button\":3}}\n", req.ID)
			_ = g.conn.Close()
		}()
		e, err := a.Events(t.Context())
		if err != nil || e.PowerButton != 3 {
			t.Fatalf("got %+v, %v", e, err)
		}
	})
	t.Run("a program that fails", func(t *testing.T) {
		a, g := newFakeGuest(t, nil)
		go func() {
			g.say("\x1e{\"id\":%d,\"result\":{\"status\":4,\"stderr\":\"bad block\"}}\n", g.next().ID)
		}()
		err := a.CheckExt4(t.Context(), "/dev/vda")
		if !errors.Is(err, ErrAgent) || !strings.Contains(err.Error(), "bad block") {
			t.Fatalf("got %v", err)
		}
	})
}

func TestAgentCancels(t *testing.T) {
	a, g := newFakeGuest(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancelled := make(chan uint64, 1)
	go func() {
		sleeping := g.next()
		cancel()
		req := g.next()
		var args wire.CancelArgs
		if err := json.Unmarshal(req.Args, &args); err != nil || req.Command != wire.CommandCancel || args.ID != sleeping.ID {
			t.Errorf("got %+v %+v, %v", req, args, err)
		}
		cancelled <- args.ID
	}()
	if err := a.Do(ctx, wire.CommandSleep, wire.SleepArgs{MS: 1e6}, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	<-cancelled
}

func TestAgentBoundsALine(t *testing.T) {
	log := &counter{}
	a, g := newFakeGuest(t, log)
	go func() {
		chunk := strings.Repeat("x", 1<<16)
		for range 4 * maxLine / len(chunk) {
			g.say("%s", chunk)
		}
		_ = g.conn.Close()
	}()
	<-a.Gone()
	if log.longest > 2*maxLine {
		t.Fatalf("%d bytes of one line were kept", log.longest)
	}
	if log.total < 4*maxLine {
		t.Fatalf("%d bytes of %d reached the log", log.total, 4*maxLine)
	}
}

type counter struct{ total, longest int }

func (c *counter) Write(p []byte) (int, error) {
	c.total += len(p)
	c.longest = max(c.longest, len(p))
	return len(p), nil
}
