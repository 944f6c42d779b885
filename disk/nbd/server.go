package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// handshakeTime is what a client has to come to its first request: connections
// are few, and who says nothing must not hold one.
const handshakeTime = 30 * time.Second

// ServerOptions say how a Server serves.
type ServerOptions struct {
	// TLS, where it is not nil, is how clients must encrypt; it holds the server's
	// certificate, and with ClientAuth and ClientCAs whom to admit.
	TLS *tls.Config
	// MaxConnections is how many clients there are at once; more are turned away.
	// 0 is 100.
	MaxConnections int
	// Report, where it is not nil, hears why a connection ended that the client
	// did not end properly.
	Report func(error)
}

// Server serves exports by NBD. Its methods may be called concurrently.
type Server struct {
	options ServerOptions

	mu          sync.Mutex
	closed      bool                     // guarded by mu
	exports     map[string]*exported     // guarded by mu
	listeners   map[net.Listener]bool    // guarded by mu
	connections map[*connection]struct{} // guarded by mu

	running sync.WaitGroup // connections

	room  room
	own   int64         // bytes of requests that each client has to itself
	stall time.Duration // stallTime, but in tests
}

// NewServer makes a server without exports.
func NewServer(o ServerOptions) *Server {
	if o.MaxConnections <= 0 {
		o.MaxConnections = 100
	}
	own := min(maxOwn, maxAll/2/int64(o.MaxConnections))
	return &Server{
		room: room{free: maxAll - own*int64(o.MaxConnections)}, own: own, stall: stallTime,
		options:     o,
		exports:     map[string]*exported{},
		listeners:   map[net.Listener]bool{},
		connections: map[*connection]struct{}{},
	}
}

// Serve accepts clients until l or the server is closed, which is ErrClosed. It may
// be called for several listeners. It closes l.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.listeners[l] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return ErrClosed
		}
		if err != nil {
			var transient interface{ Temporary() bool }
			if errors.As(err, &transient) && transient.Temporary() {
				// No descriptors, say: others that end give theirs back.
				time.Sleep(10 * time.Millisecond)
				continue
			}
			return fmt.Errorf("NBD: accept: %w", err)
		}
		s.ServeConn(conn)
	}
}

// ServeConn serves one client, in the background, and closes conn in the end.
func (s *Server) ServeConn(conn net.Conn) {
	c := newConnection(s, conn)
	s.mu.Lock()
	if s.closed || len(s.connections) >= s.options.MaxConnections {
		s.mu.Unlock()
		conn.Close()
		s.report(fmt.Errorf("NBD: a client is turned away: there are %d", s.options.MaxConnections))
		return
	}
	s.connections[c] = struct{}{}
	s.running.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.running.Done()
		err := c.run()
		c.hangUp()
		s.mu.Lock()
		delete(s.connections, c)
		s.mu.Unlock()
		if err != nil && !c.dropped.Load() {
			s.report(fmt.Errorf("NBD: client %s: %w", conn.RemoteAddr(), err))
		}
	}()
}

func (s *Server) report(err error) {
	if s.options.Report != nil {
		s.options.Report(err)
	}
}

// Connections is how many clients there are.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.connections)
}

// Close ends all connections and waits for the requests under way.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.connections {
		c.hangUp()
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}
