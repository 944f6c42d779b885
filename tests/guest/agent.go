package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// Errors of an Agent.
var (
	// ErrAgent is a request that the guest could not do; the guest's words
	// follow.
	ErrAgent = errors.New("guest")
	// ErrAgentGone is a stream that ended with requests outstanding.
	ErrAgentGone = errors.New("the guest's agent is gone")
)

// Agent asks the Linux kit's init for things, over its serial console, its
// virtio console or vsock port wire.VsockAgentPort. Its methods may be called
// at the same time; the guest works on all requests at once.
type Agent struct {
	log   io.Writer // what is not a reply; nil: dropped
	ready chan struct{}
	gone  chan struct{} // closed when the stream has ended

	writing sync.Mutex // one request at a time
	w       io.Writer

	mu      sync.Mutex
	last    uint64                     // the newest request's ID
	waiting map[uint64]chan wire.Reply // by request; nil once the stream has ended
	err     error                      // why it ended
}

// NewAgent makes an Agent of a stream to the guest. Lines that are not replies,
// such as the kernel's on a console, go to log, which may be nil. The Agent
// reads until the stream ends; closing it is the caller's.
func NewAgent(rw io.ReadWriter, log io.Writer) *Agent {
	a := &Agent{
		log:     log,
		ready:   make(chan struct{}),
		gone:    make(chan struct{}),
		w:       rw,
		waiting: map[uint64]chan wire.Reply{},
	}
	go a.read(rw)
	return a
}

func (a *Agent) read(r io.Reader) {
	lines := bufio.NewReader(r)
	ready := false
	var err error
	for err == nil {
		var line []byte
		line, err = readLine(lines)
		before, reply, found := bytes.Cut(line, []byte{wire.RecordSeparator})
		if a.log != nil && len(before) > 0 {
			_, _ = a.log.Write(append(before, '\n')) // a log that fails must not fail the guest
		}
		if !ready && bytes.Contains(before, []byte(wire.Ready)) {
			ready = true
			close(a.ready)
		}
		if found {
			a.deliver(reply)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
	a.waiting = nil
	close(a.gone)
}

// maxLine bounds what one line of the guest may take here.
const maxLine = 4 * wire.MaxOutput

// readLine returns the next line without its end. What is longer than maxLine
// comes in pieces.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		piece, err := r.ReadSlice('\n')
		line = append(line, piece...)
		if errors.Is(err, bufio.ErrBufferFull) && len(line) < maxLine {
			continue
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			err = nil
		}
		return bytes.TrimRight(line, "\r\n"), err
	}
}

func (a *Agent) deliver(line []byte) {
	var reply wire.Reply
	if err := json.Unmarshal(line, &reply); err != nil {
		if a.log != nil {
			fmt.Fprintf(a.log, "agent: a reply that is none (%v): %q\n", err, line)
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c, ok := a.waiting[reply.ID]; ok {
		delete(a.waiting, reply.ID)
		c <- reply // there is room: one reply for each channel
	}
}

// WaitReady waits until the guest's init says on this stream that it is ready,
// as it does on the console once. A caller that restores a guest need not wait.
func (a *Agent) WaitReady(ctx context.Context) error {
	select {
	case <-a.ready:
		return nil
	default:
	}
	select {
	case <-a.ready:
		return nil
	case <-a.gone:
		return fmt.Errorf("before the guest was ready: %w", a.gonerr())
	case <-ctx.Done():
		return fmt.Errorf("before the guest was ready: %w", ctx.Err())
	}
}

// Gone is closed when the stream has ended.
func (a *Agent) Gone() <-chan struct{} { return a.gone }

func (a *Agent) gonerr() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return fmt.Errorf("%w: %w", ErrAgentGone, a.err)
}

// Call is a request that the guest is working on.
type Call struct {
	agent   *Agent
	command wire.Command
	id      uint64
	reply   chan wire.Reply
}

// Start sends a request with args, which may be nil. Follow it with Wait.
func (a *Agent) Start(command wire.Command, args any) (*Call, error) {
	id, reply, err := a.send(command, args)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	return &Call{agent: a, command: command, id: id, reply: reply}, nil
}

// Cancel tells the guest to end the request early. The reply still comes:
// Churn then counts what it did so far, others answer with an error.
func (c *Call) Cancel(ctx context.Context) error {
	return c.agent.Do(ctx, wire.CommandCancel, wire.CancelArgs{ID: c.id}, nil)
}

// Wait decodes the reply into result, which may be nil.
func (c *Call) Wait(ctx context.Context, result any) error {
	var r wire.Reply
	select {
	case r = <-c.reply:
	case <-c.agent.gone:
		select {
		case r = <-c.reply: // the last thing said before the stream ended
		default:
			return fmt.Errorf("%s: %w", c.command, c.agent.gonerr())
		}
	case <-ctx.Done():
		c.agent.forget(c.id)
		return fmt.Errorf("%s: %w", c.command, ctx.Err())
	}
	if r.Error != "" {
		return fmt.Errorf("%w: %s", ErrAgent, r.Error)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Result, result); err != nil {
		return fmt.Errorf("%s: decode the result: %w", c.command, err)
	}
	return nil
}

// Do is Start and Wait. When ctx is done first the guest is told to cancel.
func (a *Agent) Do(ctx context.Context, command wire.Command, args, result any) error {
	c, err := a.Start(command, args)
	if err != nil {
		return err
	}
	err = c.Wait(ctx, result)
	if err != nil && ctx.Err() != nil && command != wire.CommandCancel {
		id, _, sendErr := a.send(wire.CommandCancel, wire.CancelArgs{ID: c.id})
		if sendErr == nil {
			a.forget(id) // nobody waits for this answer
		}
	}
	return err
}

func (a *Agent) forget(id uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting, id)
}

// send writes a request and returns where its reply will be.
func (a *Agent) send(command wire.Command, args any) (id uint64, reply chan wire.Reply, err error) {
	req := wire.Request{Command: command}
	if args != nil {
		if req.Args, err = json.Marshal(args); err != nil {
			return 0, nil, err
		}
	}
	reply = make(chan wire.Reply, 1)
	a.mu.Lock()
	if a.waiting == nil {
		a.mu.Unlock()
		return 0, nil, a.gonerr()
	}
	a.last++
	req.ID = a.last
	a.waiting[req.ID] = reply
	a.mu.Unlock()
	line, err := json.Marshal(req)
	if err == nil {
		a.writing.Lock()
		_, err = a.w.Write(append(line, '\n'))
		a.writing.Unlock()
	}
	if err != nil {
		a.forget(req.ID)
		return 0, nil, err
	}
	return req.ID, reply, nil
}
