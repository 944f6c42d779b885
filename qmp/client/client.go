// Package client talks QMP to Gnomon and to QEMU.
//
// It uses the types of github.com/digitalocean/go-qemu/qmp, and a Client is a Monitor of that package, so that go-qemu's
// Domain works on it. It has a transport of its own because go-qemu's SocketMonitor cannot read lines beyond 64 KiB, such as
// the schema of any QEMU, hands out responses from a buffer that the next event overwrites, and drops the class of errors.
package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"

	goqemu "github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/qmp"
)

const (
	// maxLine is the longest line that is accepted from a server.
	maxLine = 64 << 20
	// eventBacklog is how many events a subscriber may leave unread.
	eventBacklog = 1024
)

// Sentinel errors of this package.
var (
	// ErrConnect means that no QMP session could be begun.
	ErrConnect = errors.New("cannot connect to QMP socket")
	// ErrConnection means that a session broke off.
	ErrConnection = errors.New("QMP connection lost")
)

// Event is an event as go-qemu has it.
type Event = goqemu.Event

// Client is a session with a QMP server. Its methods may be called concurrently; commands are sent one at a time.
type Client struct {
	addr string
	conn net.Conn

	// Version is what the server says it is, Capabilities what it offers. They are set by Dial.
	Version      goqemu.Version
	Capabilities []string

	running   sync.Mutex    // held while a command awaits its response
	responses chan []byte   // lines that are no events
	done      chan struct{} // closed when reading has ended
	readErr   error         // why; set before done is closed

	mu          sync.Mutex
	subscribers map[chan Event]bool // guarded by mu; nil when reading has ended
}

var _ goqemu.Monitor = (*Client)(nil)

// Dial begins a session with the server at addr, which is as in qmp.ParseAddress, or the path of a unix socket. The error
// is ErrConnect, or qmp.ErrAddress.
func Dial(ctx context.Context, addr string) (*Client, error) {
	if !strings.HasPrefix(addr, "unix:") && !strings.HasPrefix(addr, "tcp:") {
		addr = "unix:" + addr
	}
	network, address, err := qmp.ParseAddress(addr)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConnect, err)
	}
	c := &Client{
		addr: addr, conn: conn,
		responses: make(chan []byte, 1+maxLate), done: make(chan struct{}), subscribers: map[chan Event]bool{},
	}
	go c.read()
	if err := c.negotiate(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%w: %s: %w", ErrConnect, addr, err)
	}
	return c, nil
}

// maxLate is how many responses to others may come before ours. QEMU does one command of a
// client and keeps eight, and may answer those of one that left to the next.
const maxLate = 9

// negotiate begins the session. The server answers in the order of commands: so behind the
// response to qmp_capabilities, which its id tells from others, there are none to others.
func (c *Client) negotiate(ctx context.Context) error {
	type greeting struct {
		Version      goqemu.Version
		Capabilities []string
	}
	id, greeted := rand.Text(), false
	for late := 0; ; {
		line, err := c.response(ctx)
		if err != nil {
			return err
		}
		var r struct {
			QMP    *greeting
			ID     any
			Return json.RawMessage
			Error  *qmp.Error
		}
		err = json.Unmarshal(line, &r)
		switch {
		case err != nil:
			return errNoQMP
		case r.QMP != nil && !greeted:
			greeted = true
			c.Version, c.Capabilities = r.QMP.Version, r.QMP.Capabilities
			if err := c.write(fmt.Appendf(nil, `{"execute": "qmp_capabilities", "id": %q}`+"\n", id), nil); err != nil {
				return fmt.Errorf("%w: %w", ErrConnection, err)
			}
		case r.Return == nil && r.Error == nil:
			return errNoQMP
		case greeted && r.ID == id && r.Error != nil:
			return r.Error
		case greeted && r.ID == id:
			return nil
		case late == maxLate:
			return errNoQMP
		default:
			late++
		}
	}
}

var errNoQMP = errors.New("the server does not speak QMP")

// Close ends the session.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

// Done returns a channel that is closed when the session has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// read sorts what the server sends until it sends nothing more.
func (c *Client) read() {
	c.readErr = c.readLines()
	c.mu.Lock()
	for ch := range c.subscribers {
		close(ch)
	}
	c.subscribers = nil
	c.mu.Unlock()
	close(c.done)
}

func (c *Client) readLines() error {
	r := bufio.NewReaderSize(c.conn, 64<<10)
	for {
		line, err := readLine(r)
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var e Event
		if json.Unmarshal(line, &e) == nil && e.Event != "" {
			c.publish(e)
			continue
		}
		select {
		case c.responses <- line:
		default:
			return errors.New("the server answers what was not asked")
		}
	}
}

// readLine returns a line of its own memory.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if err == nil {
			return line, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
		if len(line) > maxLine {
			return nil, errors.New("the server sent a line that is too long")
		}
	}
}

func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for ch := range c.subscribers {
		select {
		case ch <- e:
		default:
			close(ch)
			delete(c.subscribers, ch)
		}
	}
}

// response waits for the next line that is no event. When it cannot wait any longer the session is of no use any more,
// because the next response would be taken for another's, and is closed.
func (c *Client) response(ctx context.Context) ([]byte, error) {
	select {
	case line := <-c.responses:
		return line, nil
	default:
	}
	select {
	case line := <-c.responses:
		return line, nil
	case <-c.done:
		select {
		case line := <-c.responses: // came just before the end, as quit's response does
			return line, nil
		default:
		}
		return nil, fmt.Errorf("%w: %w", ErrConnection, c.readErr)
	case <-ctx.Done():
		c.conn.Close()
		return nil, ctx.Err()
	}
}

type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
}

// Execute runs a command. args is anything that encoding/json makes an object of, nil for none; result, if not nil, is what
// the command returns is stored in. The server's refusal is a *qmp.Error; other errors are ErrConnection and ctx's.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	return c.ExecuteWithFile(ctx, command, args, nil, result)
}

// ExecuteWithFile runs a command as Execute does and passes file with it, for getfd and add-fd. The server must be on
// a unix socket.
func (c *Client) ExecuteWithFile(ctx context.Context, command string, args any, file *os.File, result any) error {
	line, err := json.Marshal(request{command, args})
	if err != nil {
		return fmt.Errorf("arguments of %s: %w", command, err)
	}
	value, err := c.raw(ctx, line, file)
	if err != nil || result == nil {
		return err
	}
	if err := json.Unmarshal(value, result); err != nil {
		return fmt.Errorf("result of %s: %w", command, err)
	}
	return nil
}

// ExecuteRaw sends a command that is JSON already and returns the JSON that it returns.
func (c *Client) ExecuteRaw(ctx context.Context, command []byte) (json.RawMessage, error) {
	return c.raw(ctx, command, nil)
}

func (c *Client) raw(ctx context.Context, command []byte, file *os.File) (json.RawMessage, error) {
	line, err := c.exchange(ctx, command, file)
	if err != nil {
		return nil, err
	}
	var r struct {
		Return json.RawMessage
		Error  *qmp.Error
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConnection, err)
	}
	if r.Error != nil {
		return nil, r.Error
	}
	return r.Return, nil
}

// exchange sends a line and returns the one that answers it.
func (c *Client) exchange(ctx context.Context, command []byte, file *os.File) ([]byte, error) {
	c.running.Lock()
	defer c.running.Unlock()
	command = append(bytes.TrimSpace(command), '\n')
	if err := c.write(command, file); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConnection, err)
	}
	return c.response(ctx)
}

func (c *Client) write(b []byte, file *os.File) error {
	if file == nil {
		_, err := c.conn.Write(b)
		return err
	}
	u, ok := c.conn.(*net.UnixConn)
	if !ok {
		return errors.New("files can only be passed on a unix socket")
	}
	// One byte carries the descriptor, so that it cannot be sent twice; the rest may take several writes.
	if _, _, err := u.WriteMsgUnix(b[:1], unix.UnixRights(int(file.Fd())), nil); err != nil {
		return err
	}
	_, err := u.Write(b[1:])
	return err
}

// Subscribe returns a channel of events that come from now on. It is closed when ctx ends, when the session does, and when
// more than 1024 events have been left unread.
func (c *Client) Subscribe(ctx context.Context) <-chan Event {
	ch := make(chan Event, eventBacklog)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subscribers == nil {
		close(ch)
		return ch
	}
	c.subscribers[ch] = true
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.subscribers[ch] {
			delete(c.subscribers, ch)
			close(ch)
		}
	})
	return ch
}

// Connect is part of go-qemu's Monitor. A Client is connected from the start.
func (c *Client) Connect() error { return nil }

// Disconnect is Close, for go-qemu's Monitor.
func (c *Client) Disconnect() error { return c.Close() }

// Run sends a command that is JSON already and returns the whole response, for go-qemu's Monitor.
func (c *Client) Run(command []byte) ([]byte, error) {
	line, err := c.exchange(context.Background(), command, nil)
	if err != nil {
		return nil, err
	}
	var r struct{ Error *qmp.Error }
	if err := json.Unmarshal(line, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConnection, err)
	}
	if r.Error != nil {
		return nil, r.Error
	}
	return line, nil
}

// Events is Subscribe, for go-qemu's Monitor.
func (c *Client) Events(ctx context.Context) (<-chan Event, error) { return c.Subscribe(ctx), nil }

// Commands returns the names of the commands that the server has.
func (c *Client) Commands(ctx context.Context) ([]string, error) {
	var list []struct{ Name string }
	if err := c.Execute(ctx, "query-commands", nil, &list); err != nil {
		return nil, err
	}
	names := make([]string, len(list))
	for i := range list {
		names[i] = list[i].Name
	}
	return names, nil
}
