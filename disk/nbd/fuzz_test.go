package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
)

// recorder copies what goes over a connection.
type recorder struct {
	net.Conn
	mu    sync.Mutex
	said  bytes.Buffer   // guarded by mu
	heard []bytes.Buffer // guarded by mu: first in the handshake, then after each request
}

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	r.said.Write(b)
	if len(b) == requestSize && binary.BigEndian.Uint32(b) == magicRequest {
		r.heard = append(r.heard, bytes.Buffer{})
	}
	r.mu.Unlock()
	return r.Conn.Write(b)
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard[len(r.heard)-1].Write(b[:n])
	return n, err
}

func fuzzed() Export {
	m := newMemory(256 << 10)
	m.holes[1] = false
	return Export{Name: "x", Node: m, FastZero: true, Bitmaps: []Bitmap{runsBitmap{"b", [][2]int64{{512, 70000}}}}}
}

// uses are what a client is used for, each with one request. Their errors do not
// matter here.
func uses(c *Client) []func() {
	data := [][]byte{make([]byte, 300), make([]byte, 70000)}
	return []func(){
		func() { c.Readv([][]byte{make([]byte, 300), make([]byte, 70000)}, 100) },
		func() { c.Map(0, 256<<10) },
		func() { c.Writev(data, 1) },
		func() { c.Status(ContextDirtyBitmap+"b", 0, 256<<10) },
		func() { c.WriteZeroes(1000, 70000, true) },
		func() { c.Discard(0, 1<<16) },
		func() { c.Flush() },
	}
}

// traffic is what our client and our server say to each other.
func traffic(f *testing.F) (client []byte, server [][]byte) {
	s := NewServer(ServerOptions{})
	if err := s.Add(fuzzed()); err != nil {
		f.Fatal(err)
	}
	ours, theirs := net.Pipe()
	s.ServeConn(theirs)
	r := &recorder{Conn: ours, heard: make([]bytes.Buffer, 1)}
	n := negotiate(context.Background(), r)
	err := n.greet()
	if err == nil {
		var a agreed
		a, err = n.choose("x", []string{ContextDirtyBitmap + "b"})
		if err == nil {
			c := newClient(n, a, ClientOptions{})
			go c.receive()
			for _, use := range uses(c) {
				use()
			}
			err = c.Close()
		}
	}
	if err = n.finish(err); err != nil {
		f.Fatal(err)
	}
	s.Close()
	for i := range r.heard {
		server = append(server, r.heard[i].Bytes())
	}
	return r.said.Bytes(), server
}

func FuzzServer(f *testing.F) {
	client, _ := traffic(f)
	f.Add(client)
	f.Fuzz(func(t *testing.T, said []byte) {
		s := NewServer(ServerOptions{})
		if err := s.Add(fuzzed()); err != nil {
			t.Fatal(err)
		}
		ours, theirs := net.Pipe()
		s.ServeConn(theirs)
		heard := make(chan struct{})
		go func() {
			defer close(heard)
			io.Copy(io.Discard, ours)
		}()
		ours.Write(said)
		ours.Close()
		<-heard
		if err := s.Remove(context.Background(), "x", RemoveWaiting); err != nil {
			t.Error(err)
		}
		s.Close()
	})
}

func FuzzClient(f *testing.F) {
	_, server := traffic(f)
	f.Add(server[0], server[1], server[2], server[3], bytes.Join(server[4:7], nil), true)
	s := entered()
	f.Add(s.handshake, s.chunk(chunkDone, chunkHole, 12).u64(100).u32(70300).bytes, []byte{}, []byte{}, []byte{}, false)
	f.Fuzz(func(t *testing.T, handshake, read, status, write, rest []byte, bitmap bool) {
		o := ClientOptions{}
		if bitmap {
			o.Contexts = []string{ContextDirtyBitmap + "b"}
		}
		// Errors are expected; a hang or a panic is not.
		_ = play(o, handshake, [][]byte{read, status, write, rest}, func(c *Client) error {
			p := c.conn.(*player)
			var all sync.WaitGroup
			for _, use := range uses(c) {
				done := make(chan struct{})
				all.Go(func() {
					use()
					close(done)
				})
				select {
				case <-p.seen:
				case <-done:
				}
			}
			close(p.released)
			all.Wait()
			return nil
		})
	})
}

func FuzzParseURI(f *testing.F) {
	f.Add("nbd://[::1]:5/a%20b")
	f.Add("nbd+unix:///x?socket=/run/a%20b")
	f.Fuzz(func(t *testing.T, s string) {
		address, export, err := ParseURI(s)
		if err != nil {
			return
		}
		if a, x, err := ParseURI(uri(address, export)); err != nil || a != address || x != export {
			t.Errorf("%q: %q and %q come back as %q: %q, %q, %v", s, address, export, uri(address, export), a, x, err)
		}
	})
}
