package qmp

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxQueue is how many in-band commands of a session in out-of-band mode may wait; then it is not read further.
	maxQueue = 8
	// readSize is how much is read at once.
	readSize = 16 << 10
	// maxPassedFDs is how many descriptors are taken from one message; the kernel drops further ones.
	maxPassedFDs = 16
	// retainedOutput is the size of the response buffer kept from one command to the next.
	retainedOutput = 64 << 10
)

// Session is one client's connection.
type Session struct {
	srv    *Server
	conn   net.Conn
	out    *output
	ctx    context.Context
	cancel context.CancelFunc

	negotiated atomic.Bool // the client gets events and commands other than qmp_capabilities
	closing    atomic.Bool // no further command is to be run
	oob        bool        // used by the reading goroutine only

	// received are descriptors that came since the last command; used by the reading goroutine only.
	received []int

	fds sessionFDs

	mu     sync.Mutex
	wake   sync.Cond
	queue  []request // guarded by mu; in-band commands that wait for their turn, in out-of-band mode
	ending bool      // guarded by mu; the queue is not served any more
	worker sync.WaitGroup
}

// request is a message and the descriptors that came with it.
type request struct {
	value any
	err   *Error
	fds   []int
}

func newSession(srv *Server, c net.Conn) *Session {
	s := &Session{srv: srv, conn: c, out: newOutput(c)}
	s.wake.L = &s.mu
	s.ctx, s.cancel = context.WithCancel(srv.ctx)
	return s
}

// Server returns the server that the session belongs to.
func (s *Session) Server() *Server { return s.srv }

// serve talks to the client until it hangs up.
func (s *Session) serve() {
	s.greet()
	s.read()
	s.cancel()
	s.mu.Lock()
	s.ending = true
	for _, r := range s.queue {
		closeFDs(r.fds)
	}
	s.queue = nil
	s.wake.Broadcast()
	s.mu.Unlock()
	s.worker.Wait()
	s.out.close()
	closeFDs(s.received)
	s.fds.close()
}

// shutdown makes serve return once the command that is running, if any, has been answered.
func (s *Session) shutdown() {
	s.mu.Lock()
	s.closing.Store(true)
	s.wake.Broadcast()
	s.mu.Unlock()
	s.conn.SetReadDeadline(time.Unix(1, 0))
}

func (s *Session) greet() {
	b := []byte(`{"QMP": {"version": `)
	b = appendAny(b, s.srv.version.info())
	b = append(b, `, "capabilities": ["oob"]}}`...)
	s.out.response(append(b, "\r\n"...))
}

// read runs the commands that arrive. Without out-of-band mode it runs them itself, one after the other.
func (s *Session) read() {
	lex := newLexer()
	buf := make([]byte, readSize)
	var out []byte
	receive := s.receiver()
	for {
		n, err := receive(buf)
		for data := buf[:n]; len(data) > 0 && !s.closing.Load(); {
			used, value, perr, done := lex.feed(data)
			data = data[used:]
			if !done {
				break
			}
			r := request{value, perr, s.received}
			s.received = nil
			switch {
			case s.oob && !isOutOfBand(value):
				s.enqueue(r)
			default:
				out = s.execute(r, out)
			}
		}
		if err != nil {
			return
		}
	}
}

// receiver returns the function that reads from the connection, and takes descriptors where these can come.
func (s *Session) receiver() func([]byte) (int, error) {
	u, ok := s.conn.(*net.UnixConn)
	if !ok {
		return s.conn.Read
	}
	control := make([]byte, unix.CmsgSpace(maxPassedFDs*4))
	return func(buf []byte) (int, error) {
		n, cn, _, _, err := u.ReadMsgUnix(buf, control)
		if cn > 0 {
			if fds := parseRights(control[:cn]); len(fds) > 0 {
				closeFDs(s.received)
				s.received = fds
			}
		}
		if n == 0 && err == nil {
			err = errHungUp
		}
		return max(n, 0), err
	}
}

var errHungUp = errors.New("client hung up")

// enableOOB is called by qmp_capabilities, which runs on the reading goroutine.
func (s *Session) enableOOB() {
	s.oob = true
	s.worker.Add(1)
	go s.work()
}

// enqueue leaves r to the worker. It waits when that fills the queue, so that nothing more is read, as in QEMU.
func (s *Session) enqueue(r request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = append(s.queue, r)
	s.wake.Broadcast()
	for len(s.queue) >= maxQueue && !s.closing.Load() {
		s.wake.Wait()
	}
}

// work runs queued commands in their order.
func (s *Session) work() {
	defer s.worker.Done()
	var out []byte
	for {
		s.mu.Lock()
		for len(s.queue) == 0 && !s.ending {
			s.wake.Wait()
		}
		if s.ending {
			s.mu.Unlock()
			return
		}
		r := s.queue[0]
		s.queue = append(s.queue[:0], s.queue[1:]...)
		s.wake.Broadcast()
		s.mu.Unlock()
		out = s.execute(r, out)
	}
}

// execute runs a request and answers it. out is a buffer to use, and is returned for the next time.
func (s *Session) execute(r request, out []byte) []byte {
	s.fds.arrived(r.fds)
	out = s.answer(r, out[:0])
	s.out.response(out)
	if cap(out) > retainedOutput {
		return nil
	}
	return out
}

// answer appends the response to r.
func (s *Session) answer(r request, out []byte) []byte {
	if r.err != nil {
		return appendError(out, nil, false, r.err)
	}
	o, isObject := r.value.(*object)
	var id any
	var hasID bool
	if isObject {
		id, hasID = o.get("id")
	}
	out = append(out, `{"return": `...)
	out, err := s.dispatch(r.value, out)
	if err != nil {
		return appendError(out[:0], id, hasID, err)
	}
	if hasID {
		out = append(out, `, "id": `...)
		out = appendValue(out, id)
	}
	return append(out, "}\r\n"...)
}

func appendError(out []byte, id any, hasID bool, err error) []byte {
	class := GenericError
	var e *Error
	if errors.As(err, &e) && e.Class != "" {
		class = e.Class
	}
	out = append(out, '{')
	if hasID {
		out = append(out, `"id": `...)
		out = appendValue(out, id)
		out = append(out, ", "...)
	}
	out = append(out, `"error": {"class": `...)
	out = appendString(out, string(class))
	out = append(out, `, "desc": `...)
	out = appendString(out, err.Error())
	return append(out, "}}\r\n"...)
}

// isOutOfBand tells whether a message asks to be run out of band.
func isOutOfBand(value any) bool {
	o, ok := value.(*object)
	return ok && o.find("exec-oob") >= 0 && o.find("execute") < 0
}

// dispatch runs the command that value asks for and appends its result to out.
func (s *Session) dispatch(value any, out []byte) ([]byte, error) {
	negotiated := s.negotiated.Load()
	call, err := parseCall(value, negotiated && s.oob)
	if err != nil {
		return out, err
	}
	if !negotiated && call.name != negotiationCommand {
		return out, &Error{CommandNotFound, "Expecting capabilities negotiation with '" + negotiationCommand + "'"}
	}
	c := s.srv.reg.command(call.name)
	if c == nil {
		return out, &Error{CommandNotFound, "The command " + call.name + " has not been found"}
	}
	if call.oob {
		if !c.allowOOB {
			return out, Errorf("The command %s does not support OOB", call.name)
		}
		return c.run(s.ctx, s, call.args, nil, out)
	}
	return c.run(s.ctx, s, call.args, &s.srv.inBand, out)
}

// call is a message that has the form of a command.
type call struct {
	name string
	oob  bool
	args *object // nil if there are none
}

func parseCall(value any, allowOOB bool) (c call, err error) {
	o, ok := value.(*object)
	if !ok {
		return c, Errorf("QMP input must be a JSON object")
	}
	var key string
	for i := range o.members {
		m := &o.members[i]
		switch {
		case m.name == "execute" || m.name == "exec-oob" && allowOOB:
			name, ok := m.value.(string)
			if !ok {
				return c, Errorf("QMP input member '%s' must be a string", m.name)
			}
			if key != "" {
				return c, Errorf("QMP input member 'execute' clashes with 'exec-oob'")
			}
			key, c.name, c.oob = m.name, name, m.name == "exec-oob"
		case m.name == "arguments":
			if c.args, ok = m.value.(*object); !ok {
				return c, Errorf("QMP input member 'arguments' must be an object")
			}
		case m.name != "id":
			return c, Errorf("QMP input member '%s' is unexpected", m.name)
		}
	}
	if key == "" {
		return c, Errorf("QMP input lacks member 'execute'")
	}
	return c, nil
}
