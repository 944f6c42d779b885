package tests

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest"
)

// Linux with 1 vCPU and little memory: the balloon gives what the guest once used
// back to the host, a restored guest meets few faults, and a panic is told apart
// from a power-off.
func TestLinuxOneCPU(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	m := &linux{dir: t.TempDir(), bytes: 64 << 20}
	memory := int64(192 << 20)
	if interpreted(t) {
		m.bytes, memory = 16<<20, 96<<20
	}
	m.process, m.agent = bootLinux(ctx, t, "--memory", fmt.Sprint(memory>>20, "M"), "--net", "none")
	m.connect(ctx, t)
	start := time.Now()
	took := func(name string) {
		t.Logf("%s took %v", name, time.Since(start).Round(time.Millisecond))
		start = time.Now()
	}
	testBalloon(ctx, t, m, memory)
	took("the balloon")
	testRestores(ctx, t, m)
	took("restores")
	testPanic(ctx, t, m)
	took("panic")
}

func testBalloon(ctx context.Context, t *testing.T, m *linux, memory int64) {
	events := m.qmp.Subscribe(ctx)
	// The balloon takes so much that it must take what was in use, but for what
	// the guest's kernel goes on to use meanwhile: half of it is for that.
	const used, left = 16 << 20, 6 << 20
	if _, err := m.agent.Fill(ctx, "ballast", 1, used); err != nil {
		t.Fatal(err)
	}
	before := m.residentRAM(t)
	if err := m.agent.Forget(ctx, "ballast"); err != nil {
		t.Fatal(err)
	}
	info, err := m.agent.MemInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if info.Free < used {
		t.Fatalf("only %d KiB are free in the guest", info.Free>>10)
	}
	target := memory - int64(info.Free-left)&^(1<<20-1)
	m.do(ctx, t, "balloon", map[string]any{"value": target}, nil)
	for {
		var now struct{ Actual int64 }
		m.do(ctx, t, "query-balloon", nil, &now)
		if now.Actual == target {
			break
		}
		waitEvent(ctx, t, events, "BALLOON_CHANGE")
	}
	after := m.residentRAM(t)
	t.Logf("a balloon of %d KiB: from %d to %d KiB resident", (memory-target)>>10, before>>10, after>>10)
	if after > before-(used-left)/2 {
		t.Errorf("the guest's memory takes %d KiB of the host's before, %d KiB with a balloon of %d KiB", before>>10, after>>10, (memory-target)>>10)
	}
	m.do(ctx, t, "balloon", map[string]any{"value": memory}, nil)
}

// testRestores restores the guest from one checkpoint by each policy: it is as it
// was, and a program in it that reads its heap meets few faults. The last of the
// restored machines takes the place of the first.
func testRestores(ctx context.Context, t *testing.T, m *linux) {
	file := filepath.Join(t.TempDir(), "linux")
	sum, err := m.agent.Fill(ctx, "heap", 11, m.bytes)
	if err != nil {
		t.Fatal(err)
	}
	before, err := m.agent.Clocks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	command(ctx, t, "checkpoint", m.name, "--to", file)
	restore := func(prefetch string) (f restoreFigures) {
		t.Helper()
		m.do(ctx, t, "quit", nil, nil)
		if status := m.status(ctx, t); status != 0 {
			t.Errorf("before %s: status %d", prefetch, status)
		}
		var rw io.ReadWriter
		m.process, rw = launchCommand(t, "restore", file, "--prefetch", prefetch, "--no-background", "--record")
		m.agent = guest.NewAgent(rw, &m.log)
		got, err := m.agent.Verify(ctx, "heap")
		if err != nil || got != sum {
			t.Fatalf("%s: the heap is %+v, want %+v: %v", prefetch, got, sum, err)
		}
		after, err := m.agent.Clocks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if after.Monotonic < before.Monotonic || after.Boottime < before.Boottime || after.Realtime < before.Realtime {
			t.Errorf("%s: clocks went from %+v to %+v", prefetch, before, after)
		}
		m.connect(ctx, t)
		m.do(ctx, t, "__org.gnomon_query-restore", nil, &f)
		metric := fmt.Sprintf("gnomon_restore_guest_faults{machine=%q} ", m.name)
		var faults int64 // there may be more by now
		out := command(ctx, t, "stats", m.name, "--output", "prometheus")
		if _, rest, ok := strings.Cut(out, metric); !ok {
			t.Errorf("%q is not among\n%s", metric, out)
		} else if _, err := fmt.Sscan(rest, &faults); err != nil || faults < f.GuestFaults {
			t.Errorf("%d guest faults, then %d: %v", f.GuestFaults, faults, err)
		}
		t.Logf("%s: %+v", prefetch, f)
		return f
	}
	none, locality := restore("none"), restore("locality")
	recorded := restore("locality,recorded")
	if locality.GuestFaults*20 > none.GuestFaults {
		t.Errorf("%d faults by locality, more than 5 %% of %d without", locality.GuestFaults, none.GuestFaults)
	}
	if recorded.GuestFaults*100 > none.GuestFaults {
		t.Errorf("%d faults with a recorded run, more than 1 %% of %d without", recorded.GuestFaults, none.GuestFaults)
	}
	if locality.CopyCalls*4 > locality.DemandPages+locality.AheadPages {
		t.Errorf("%d calls installed %d pages: fewer than 4 a call", locality.CopyCalls, locality.DemandPages+locality.AheadPages)
	}
}

func testPanic(ctx context.Context, t *testing.T, m *linux) {
	events := m.qmp.Subscribe(ctx)
	if err := m.agent.Panic(ctx); err != nil {
		t.Fatal(err)
	}
	waitEvent(ctx, t, events, "GUEST_PANICKED")
	if status := m.status(ctx, t); status != 3 {
		t.Errorf("exit status %d, want 3", status)
	}
}
