package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"sync"
	"time"
)

const (
	// maxSessions bounds the connections of a server; further ones are closed at once.
	maxSessions = 1024
	// closeGrace is how long Close lets running commands finish and their responses reach the clients.
	closeGrace = time.Second
)

// Sentinel errors of this package.
var (
	// ErrAddress means an address that Listen does not understand or does not allow.
	ErrAddress = errors.New("bad QMP address")
	// ErrListen means that a socket could not be made.
	ErrListen = errors.New("cannot listen for QMP")
	// ErrClosed means that the server has been closed.
	ErrClosed = errors.New("QMP server closed")
	// ErrEvent means an event that is not registered, or data of another type than it was registered with.
	ErrEvent = errors.New("bad QMP event")
)

// Server serves a registry's commands on any number of sockets.
type Server struct {
	reg     *Registry
	version Version
	jobs    *Jobs
	fds     FDSets

	ctx    context.Context // ends when the server closes
	cancel context.CancelFunc

	// inBand is held while an in-band command runs.
	inBand sync.Mutex

	wg sync.WaitGroup // accept loops and sessions

	mu        sync.Mutex
	closed    bool                    // guarded by mu
	listeners map[*listener]bool      // guarded by mu
	sessions  map[*Session]bool       // guarded by mu
	limits    map[limitKey]*rateLimit // guarded by mu
}

// limitKey is an event whose rate is limited, and what of.
type limitKey struct{ event, key string }

// rateLimit is the state of an event that was sent less than its interval ago.
type rateLimit struct {
	timer   *time.Timer
	pending []byte // the last one held back; nil if none
}

// NewServer returns a server of reg's commands that listens nowhere yet.
func NewServer(reg *Registry, v Version) *Server {
	s := &Server{
		reg: reg, version: v,
		listeners: map[*listener]bool{},
		sessions:  map[*Session]bool{},
		limits:    map[limitKey]*rateLimit{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.jobs = newJobs(s.ctx, s.emitJobStatus)
	return s
}

// Jobs returns the server's jobs.
func (s *Server) Jobs() *Jobs { return s.jobs }

// FDSets returns the sets of descriptors that clients have added with add-fd.
func (s *Server) FDSets() *FDSets { return &s.fds }

// Emit sends an event, with the time of now, to every session that has negotiated. data must have the type that the event
// was registered with; nil stands for Empty. It never waits: a session that has more than 1 MiB unread is disconnected, so
// that a client either sees every event or learns that it did not. The error is ErrEvent, a mistake in the program.
func (s *Server) Emit(name string, data any) error {
	e := s.reg.event(name)
	if e == nil {
		return fmt.Errorf("%w: %s is not registered", ErrEvent, name)
	}
	if data == nil {
		data = Empty{}
	}
	v := reflect.ValueOf(data)
	if v.Type() != e.data.goType {
		return fmt.Errorf("%w: %s carries %v, not %v", ErrEvent, name, e.data.goType, v.Type())
	}
	line := appendEvent(make([]byte, 0, 256), e, v, time.Now())

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	limited, key := false, limitKey{event: name}
	if e.interval > 0 {
		key.key, limited = e.key(data)
	}
	if !limited {
		s.broadcastLocked(line)
		return nil
	}
	if l := s.limits[key]; l != nil {
		l.pending = line
		return nil
	}
	s.broadcastLocked(line)
	l := &rateLimit{}
	l.timer = time.AfterFunc(e.interval, func() { s.intervalOver(e, key, l) })
	s.limits[key] = l
	return nil
}

// intervalOver sends the event held back, if there is one, and begins a new interval with it.
func (s *Server) intervalOver(e *event, key limitKey, l *rateLimit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if l.pending == nil {
		delete(s.limits, key)
		return
	}
	s.broadcastLocked(l.pending)
	l.pending = nil
	l.timer.Reset(e.interval)
}

func appendEvent(b []byte, e *event, data reflect.Value, now time.Time) []byte {
	b = append(b, `{"timestamp": {"seconds": `...)
	b = appendValue(b, now.Unix())
	b = append(b, `, "microseconds": `...)
	b = appendValue(b, int64(now.Nanosecond()/1000))
	b = append(b, `}, "event": `...)
	b = appendString(b, e.name)
	if e.data.goType != emptyType {
		b = append(b, `, "data": `...)
		b = appendTyped(b, e.data, data)
	}
	return append(b, "}\r\n"...)
}

// broadcastLocked requires mu.
func (s *Server) broadcastLocked(line []byte) {
	for session := range s.sessions {
		if session.negotiated.Load() {
			session.out.event(line)
		}
	}
}

// start begins a session on c. It fails when the server is closed or has too many.
func (s *Server) start(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.sessions) >= maxSessions {
		return false
	}
	session := newSession(s, c)
	s.sessions[session] = true
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		session.serve()
		s.mu.Lock()
		delete(s.sessions, session)
		last := len(s.sessions) == 0
		s.mu.Unlock()
		if last {
			s.fds.dropUnused()
		}
	}()
	return true
}

// Close stops listening, removes the sockets, cancels jobs and commands, and disconnects every session. Commands that are
// running get a second to finish and to have their responses delivered, and so do jobs that have been cancelled.
// A command must not call Close itself: it would wait for its own end.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.closed = true
	for _, l := range s.limits {
		l.timer.Stop()
	}
	var errs []error
	for l := range s.listeners {
		errs = append(errs, l.close())
	}
	for session := range s.sessions {
		session.shutdown()
	}
	s.mu.Unlock()

	s.cancel()
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		s.jobs.close()
		close(done)
	}()
	grace := time.NewTimer(closeGrace)
	defer grace.Stop()
	select {
	case <-done:
	case <-grace.C:
		s.mu.Lock()
		for session := range s.sessions {
			session.conn.Close()
		}
		s.mu.Unlock()
	}
	s.fds.closeAll()
	return errors.Join(errs...)
}
