package owner

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"testing"
	"time"
)

func seedRecord() *Record {
	return &Record{
		Generation: 7, Epoch: 3, State: Owned, Owner: ID{1, 2}, Address: "tcp:[::1]:4711", Name: "pid 1 on host",
		PID: 1, Boot: [16]byte{5}, Lease: time.Second, Wait: 2 * time.Second, token: [32]byte{9, 8},
	}
}

// FuzzRecord: what is read is what is written again, and is within its bounds.
func FuzzRecord(f *testing.F) {
	f.Add(seedRecord().encode())
	f.Add((&Record{Generation: 1, State: Released}).encode())
	f.Add([]byte(recordMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == recordSize { // damage behind a right checksum
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[atChecksum:], crc32.Checksum(b[:atChecksum], castagnoli))
		}
		r, err := decodeRecord(b)
		if err != nil {
			if !errors.Is(err, ErrRecord) {
				t.Error(err)
			}
			return
		}
		again, err := decodeRecord(r.encode())
		if err != nil || again != r {
			t.Errorf("%+v is written as %+v, %v", r, again, err)
		}
		if len(r.Address) > addressLimit || len(r.Name) > nameLimit || r.Wait > LeaseLimit || r.Generation == 0 {
			t.Errorf("%+v", r)
		}
	})
}

// TestRecordDamage: no changed bit goes unnoticed.
func TestRecordDamage(t *testing.T) {
	b := seedRecord().encode()
	for i := range 8 * len(b) {
		b[i/8] ^= 1 << (i % 8)
		if _, err := decodeRecord(b); !errors.Is(err, ErrRecord) {
			t.Fatalf("bit %d: %v", i, err)
		}
		b[i/8] ^= 1 << (i % 8)
	}
	if r, err := decodeRecord(b); err != nil || r != *seedRecord() {
		t.Errorf("%+v, %v", r, err)
	}
}

func line(m any) []byte {
	b, _ := json.Marshal(m)
	return append(b, '\n')
}

// FuzzRequest: whatever a stranger sends, the owner keeps its disk.
func FuzzRequest(f *testing.F) {
	r := seedRecord()
	good := request{Execute: executeRelease, Owner: r.Owner.String(), Epoch: r.Epoch}
	f.Add(line(good))
	good.Proof = proof(r.token, "", good.Owner, good.Epoch)
	f.Add(line(good))
	f.Add([]byte("{}\n"))
	f.Add(bytes.Repeat([]byte("["), messageLimit+1))
	f.Fuzz(func(t *testing.T, sent []byte) {
		ours, theirs := net.Pipe()
		s := &server{record: *r, release: func(context.Context) error {
			t.Error("released")
			return nil
		}}
		go func() {
			defer theirs.Close()
			theirs.SetDeadline(time.Now().Add(time.Second))
			go theirs.Write(sent)
			io.Copy(io.Discard, theirs)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond) // those that say no whole line
		defer cancel()
		s.answer(ctx, ours)
		ours.Close()
	})
}

// FuzzAnswer: whatever is at an owner's address, who asks comes to an end.
func FuzzAnswer(f *testing.F) {
	r := seedRecord()
	g := line(greeting{Owner: r.Owner.String(), Nonce: "00"})
	f.Add(append(bytes.Clone(g), line(answer{State: stateReleased})...))
	f.Add(append(bytes.Clone(g), line(answer{State: stateDraining})...))
	f.Add(append(bytes.Clone(g), line(answer{State: stateRefused, Reason: "busy"})...))
	f.Add(line(answer{State: stateRefused}))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		go func() {
			theirs.Write(sent)
			theirs.Close()
		}()
		err := converse(t.Context(), ours, r, true)
		ours.Close()
		if err != nil && !errors.Is(err, ErrSilent) && !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
		if err == nil && !bytes.Contains(sent, []byte(r.Owner.String())) {
			t.Error("a stranger was believed")
		}
	})
}
