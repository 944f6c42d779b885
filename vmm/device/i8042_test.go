package device

import (
	"slices"
	"testing"
)

// kbd is a guest's view of an I8042.
type kbd struct {
	ports
	asked *requests
	dev   *I8042
}

func newKBD(t testing.TB) *kbd {
	k := &kbd{asked: &requests{}}
	k.dev = NewI8042(k.asked)
	k.ports = newPorts(t, k.dev.Map)
	return k
}

// command is Linux's i8042_command: params are sent, answers are awaited. It
// fails the test where Linux would wait half a second for nothing.
func (k *kbd) command(t *testing.T, c uint8, answers int, params ...uint8) (got []uint8) {
	t.Helper()
	const outputFull, inputFull = 1, 2
	if k.in(PortI8042Cmd)&inputFull != 0 {
		t.Fatalf("command %#x: controller takes no input", c)
	}
	k.out(PortI8042Cmd, c)
	for _, p := range params {
		if k.in(PortI8042Cmd)&inputFull != 0 {
			t.Fatalf("command %#x: controller takes no parameter", c)
		}
		k.out(PortI8042Data, p)
	}
	for range answers {
		if k.in(PortI8042Cmd)&outputFull == 0 {
			t.Fatalf("command %#x: no answer", c)
		}
		got = append(got, k.in(PortI8042Data))
	}
	if k.in(PortI8042Cmd)&outputFull != 0 {
		t.Fatalf("command %#x: answer too long", c)
	}
	return got
}

// Linux's probe (drivers/input/serio/i8042.c) must find a controller without a
// mouse port, and wait for nothing on its way.
func TestI8042LinuxProbe(t *testing.T) {
	k := newKBD(t)
	if k.in(PortI8042Cmd)&1 != 0 {
		t.Fatal("there is something to flush after reset")
	}
	if got := k.command(t, 0xAA, 1); got[0] != 0x55 {
		t.Errorf("self-test gives %#x", got[0])
	}
	first, second := k.command(t, 0x20, 1)[0], k.command(t, 0x20, 1)[0]
	if first != second {
		t.Errorf("configuration is %#x, then %#x", first, second)
	}
	if k.in(PortI8042Cmd)&0x10 == 0 {
		t.Error("keyboard is locked")
	}
	k.command(t, 0x60, 0, first|0x10)
	if got := k.command(t, 0x20, 1); got[0] != first|0x10 {
		t.Errorf("configuration written as %#x reads as %#x", first|0x10, got[0])
	}
	// i8042_check_aux: a wrong echo, and a failed port test.
	if got := k.command(t, 0xD3, 1, 0x5A); got[0] == 0x5A {
		t.Error("mouse port echoes")
	}
	if got := k.command(t, 0xA9, 1); got[0] == 0 || got[0] == 0xFA || got[0] == 0xFF {
		t.Errorf("mouse port test gives %#x: taken for a port", got[0])
	}
	if got := k.command(t, 0xD2, 1, 0x77); got[0] != 0x77 {
		t.Errorf("keyboard echo gives %#x", got[0])
	}
	k.out(PortI8042Data, 0xF2) // to the keyboard that is not there
	if k.in(PortI8042Cmd)&1 != 0 {
		t.Error("an absent keyboard answers")
	}
	if got := k.asked.take(); got != nil {
		t.Errorf("the probe asked for %q", got)
	}
}

func TestI8042Reset(t *testing.T) {
	for name, f := range map[string]func(k *kbd){
		"pulse":       func(k *kbd) { k.out(PortI8042Cmd, 0xFE) },
		"pulse of 2":  func(k *kbd) { k.out(PortI8042Cmd, 0xFC) },
		"output port": func(k *kbd) { k.out(PortI8042Cmd, 0xD1); k.out(PortI8042Data, 0x02) },
	} {
		k := newKBD(t)
		if f(k); len(k.asked.take()) != 1 {
			t.Errorf("%s: no reset", name)
		}
	}
	k := newKBD(t)
	k.out(PortI8042Cmd, 0xFF) // pulses nothing
	k.out(PortI8042Cmd, 0xD1)
	k.out(PortI8042Data, 0x03) // A20 on
	k.out(PortI8042Data, 0xFE) // data, not a command
	if got := k.asked.take(); got != nil {
		t.Errorf("reset for %q", got)
	}
}

func TestI8042SaveAndRestore(t *testing.T) {
	k := newKBD(t)
	k.out(PortI8042Cmd, 0x60) // between command and parameter
	state := throughJSON(t, k.dev.State())
	back := newKBD(t)
	back.dev.Restore(state)
	back.out(PortI8042Data, 0x47)
	if got := back.command(t, 0x20, 1); !slices.Equal(got, []uint8{0x47}) {
		t.Errorf("parameter of a restored command was lost: configuration %#x", got)
	}
}
