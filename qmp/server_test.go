package qmp_test

import (
	"testing"
)

func TestArgumentsBeforeEffect(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	w.ask(`{"execute": "set_link", "arguments": {"name": "n", "up": true, "extra": 1}}`)
	w.ask(`{"execute": "set_link", "arguments": {"name": "n", "up": 1}}`)
	w.ask(`{"execute": "set_link", "arguments": {"name": "n"}}`)
	if n := m.called(); n != 0 {
		t.Fatalf("%d commands with bad arguments were run", n)
	}
	w.ask(`{"execute": "set_link", "arguments": {"name": "n", "up": true}}`)
	if n := m.called(); n != 1 {
		t.Fatalf("a good command ran %d times", n)
	}
}
