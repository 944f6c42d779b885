package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// traffic is what clients of QEMU send: libvirt's, go-qemu's and qmp-shell's manners.
var traffic = []string{
	`{"execute":"qmp_capabilities","id":"libvirt-1"}` + "\r\n",
	`{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}`,
	`{"execute":"query-status"}` + "\n" + `{"execute":"query-version","id":{"a":[1,2.5,null]}}` + "\n",
	`{"execute": "query-qmp-schema"} {"execute": "job-cancel", "arguments": {"id": "j"}}`,
	`{"exec-oob": "query-status", "id": 3}`,
	`{'execute': 'add-fd', 'arguments': {'fdset-id': 1, 'opaque': 'rdonly:/dev/null'}}`,
	"\xff{\"execute\": \"query-commands\"}",
}

// collect feeds data to a lexer in pieces of the size given, and returns every message as text, and nil where it is one that
// cannot be written the way it was read.
func collect(data []byte, size int) (messages []string) {
	l := newLexer()
	for len(data) > 0 {
		piece := data[:min(size, len(data))]
		data = data[len(piece):]
		for len(piece) > 0 {
			n, value, err, done := l.feed(piece)
			piece = piece[n:]
			switch {
			case !done:
			case err != nil:
				messages = append(messages, "error "+err.Desc)
			default:
				messages = append(messages, string(appendValue(nil, value)))
			}
		}
	}
	return messages
}

// FuzzParser holds the parser to itself: messages do not depend on how input is cut; what it reads is written as JSON that
// it, and encoding/json, read as the same; what encoding/json calls an object is one.
func FuzzParser(f *testing.F) {
	for _, s := range append(Malformed, traffic...) {
		f.Add([]byte(s))
	}
	f.Add([]byte("-0.0 "))
	// A float that is negative zero is written as -0, as QEMU does, and that is an integer.
	unsigned := func(m string) string { return strings.ReplaceAll(m, "-0", "0") }
	f.Fuzz(func(t *testing.T, data []byte) {
		whole := collect(data, len(data)+1)
		for _, size := range []int{1, 7} {
			if cut := collect(data, size); strings.Join(cut, "\n") != strings.Join(whole, "\n") {
				t.Fatalf("in pieces of %d: %q, at once: %q", size, cut, whole)
			}
		}
		for _, m := range whole {
			if strings.HasPrefix(m, "error ") {
				continue
			}
			if !json.Valid([]byte(m)) {
				t.Fatalf("wrote %s, which is not JSON", m)
			}
			if again := collect([]byte(m+" "), 1<<20); len(again) != 1 || unsigned(again[0]) != unsigned(m) {
				t.Fatalf("%s was read as %q", m, again)
			}
		}
		trimmed := bytes.TrimSpace(data)
		if json.Valid(trimmed) && len(trimmed) > 0 && trimmed[0] == '{' && utf8.Valid(trimmed) && !stricter(whole) && !zeroExponent.Match(trimmed) {
			if len(whole) != 1 || strings.HasPrefix(whole[0], "error ") {
				t.Fatalf("%q is an object, and was read as %q", trimmed, whole)
			}
		}
	})
}

// zeroExponent is in numbers such as 0e1, which QEMU's lexer does not take for one.
var zeroExponent = regexp.MustCompile(`(^|[^0-9.])0[eE]`)

// stricter tells whether a message was refused for what encoding/json lets pass, as QEMU's parser does.
func stricter(messages []string) bool {
	for _, m := range messages {
		for _, reason := range []string{"duplicate key", "Unicode", "UTF-8", "nesting", "stray '"} {
			if strings.HasPrefix(m, "error ") && strings.Contains(m, reason) {
				return true
			}
		}
	}
	return false
}

// FuzzSession gives a session any input at all. What it answers must be lines of JSON in ASCII, and after 0xFF, or a line end
// for good measure, it must work.
func FuzzSession(f *testing.F) {
	for _, s := range append(Malformed, traffic...) {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	reg := NewRegistry()
	Register(reg, "query-status", func(context.Context, *Session, Empty) (bool, error) { return true, nil }, AllowOOB())
	srv := NewServer(reg, Version{})
	f.Cleanup(func() { srv.Close() })
	f.Fuzz(func(t *testing.T, data []byte, negotiated bool) {
		theirs, ours := net.Pipe()
		if !srv.start(theirs) {
			t.Fatal("no session")
		}
		defer ours.Close()
		go func() {
			if negotiated {
				ours.Write([]byte(`{"execute": "qmp_capabilities"}`))
			}
			ours.Write(data)
			ours.Write([]byte("\xff\n" + `{"execute": "query-version", "id": "the end"}`))
		}()
		r := bufio.NewReader(ours)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("%q ended the session: %v", data, err)
			}
			for i := range len(line) {
				if line[i] >= utf8.RuneSelf {
					t.Fatalf("%q is not ASCII", line)
				}
			}
			if !json.Valid([]byte(line)) || !strings.HasSuffix(line, "}\r\n") {
				t.Fatalf("%q is not a line of JSON", line)
			}
			if strings.Contains(line, `"id": "the end"`) {
				return
			}
		}
	})
}

// TestLimits sends messages that are too long in every way, without end, and sees that little is kept of them.
func TestLimits(t *testing.T) {
	for name, test := range map[string]struct {
		begin, piece string
		want         string
	}{
		"string":  {`{"`, strings.Repeat("x", 1<<16), errTokenSize.Desc},
		"tokens":  {`[`, strings.Repeat("0,", 1<<15), errTokenCount.Desc},
		"text":    {`[`, `"` + strings.Repeat("x", 1<<16) + `",`, errTokenSize.Desc},
		"nesting": {``, strings.Repeat("[", 100), errNesting.Desc},
		"digits":  {`[`, strings.Repeat("1", 1<<16), errTokenSize.Desc},
		"spaces":  {`[`, strings.Repeat(" ", 1<<16), ""},
		"garbage": {"\x01", strings.Repeat("garbage ", 1<<13), "JSON parse error, stray '\x01'"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLexer()
			var got []string
			feed := func(s string) {
				for data := []byte(s); len(data) > 0; {
					n, _, err, _ := l.feed(data)
					data = data[n:]
					if err != nil {
						got = append(got, err.Desc)
					}
					if kept := cap(l.text) + 24*cap(l.tokens); kept > 4*maxMessageText+64*maxMessageTokens {
						t.Fatalf("%d bytes are held", kept)
					}
				}
			}
			feed(test.begin)
			for range 200 {
				feed(test.piece)
				if len(got) > 10 {
					break // what is left of the message is garbage, with an error each
				}
			}
			if test.want == "" && len(got) > 0 || test.want != "" && (len(got) == 0 || got[0] != test.want) {
				t.Errorf("errors: %.100q", got)
			}
		})
	}
}
