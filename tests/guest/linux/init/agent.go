//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// An agent answers requests, from any number of connections at a time.
type agent struct {
	started, ready time.Duration // since the kernel started; set before the first request
	powerButton    atomic.Uint64

	mu     sync.Mutex
	memory map[string]stretch // what fill keeps
}

func newAgent(started time.Duration) *agent {
	return &agent{started: started, memory: map[string]stretch{}}
}

// maxRequest bounds a request line; put-file is the largest.
const maxRequest = 2 * wire.MaxOutput

// connection is one stream of requests.
type connection struct {
	writing sync.Mutex // one reply at a time
	w       io.Writer

	mu      sync.Mutex
	running map[uint64]context.CancelFunc // by request
}

// serve answers the requests of one connection until it ends. Requests run at
// the same time as each other.
func (a *agent) serve(rw io.ReadWriter) {
	c := &connection{w: rw, running: map[uint64]context.CancelFunc{}}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	lines := bufio.NewScanner(rw)
	lines.Buffer(make([]byte, 4096), maxRequest)
	for lines.Scan() {
		line := lines.Bytes()
		if len(line) == 0 {
			continue
		}
		var req wire.Request
		if err := json.Unmarshal(line, &req); err != nil {
			c.reply(wire.Reply{Error: "not a request: " + err.Error()})
			continue
		}
		a.start(ctx, c, req)
	}
}

func (a *agent) start(ctx context.Context, c *connection, req wire.Request) {
	ctx, cancel := context.WithCancel(ctx)
	c.mu.Lock()
	c.running[req.ID] = cancel
	c.mu.Unlock()
	go func() {
		result, err := a.do(ctx, c, req)
		cancel()
		c.mu.Lock()
		delete(c.running, req.ID)
		c.mu.Unlock()
		reply := wire.Reply{ID: req.ID}
		if err == nil && result != nil {
			reply.Result, err = json.Marshal(result)
		}
		if err != nil {
			reply.Error = err.Error()
		}
		c.reply(reply)
	}()
}

func (c *connection) cancel(id uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	cancel, ok := c.running[id]
	if !ok {
		return fmt.Errorf("no request %d is running on this connection", id)
	}
	cancel()
	return nil
}

func (c *connection) reply(r wire.Reply) {
	line, err := json.Marshal(r)
	if err != nil {
		line, _ = json.Marshal(wire.Reply{ID: r.ID, Error: err.Error()})
	}
	out := append([]byte{wire.RecordSeparator}, line...)
	c.writing.Lock()
	defer c.writing.Unlock()
	_, _ = c.w.Write(append(out, '\n')) // a peer that is gone needs no answer
}

// do runs one request.
func (a *agent) do(ctx context.Context, c *connection, req wire.Request) (any, error) {
	if req.Command == wire.CommandCancel {
		return nil, call(req.Args, func(args wire.CancelArgs) error { return c.cancel(args.ID) })
	}
	f, ok := commands[req.Command]
	if !ok {
		return nil, fmt.Errorf("no command %q", req.Command)
	}
	result, err := f(ctx, a, req.Args)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", req.Command, err)
	}
	return result, nil
}

// call decodes arguments for f.
func call[A any](raw json.RawMessage, f func(A) error) error {
	var args A
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &args); err != nil {
			return err
		}
	}
	return f(args)
}

// listenVirtioConsole serves the first virtio console unless it is the
// machine's console already.
func (a *agent) listenVirtioConsole(console *terminal) {
	const name = "hvc0"
	if console != nil && console.name == name {
		return
	}
	fd, err := unix.Open("/dev/"+name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // there is none
	}
	t := &terminal{name: name, file: os.NewFile(uintptr(fd), "/dev/"+name)}
	if t.raw() == nil {
		go a.serve(t.file)
	}
}
