package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"time"

	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest"
	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
	"github.com/gnomon-vmm/gnomon/vmm/netdev"
)

const (
	diskSize = 16 << 20
	// volume is what is sent through the guest's kernel, which is slow where
	// ring 0 is interpreted.
	volume = 64 << 10
)

// step does one thing and tells what came of it.
type step struct {
	name string
	do   func(context.Context, *machine) (string, error)
}

var steps = []step{
	{"boot", boot},
	{"memory", guestMemory},
	{"entropy device", entropy},
	{"disk: mkfs, write, read back", disk},
	{"network: DHCP", dhcp},
	{"network: fetch from the host", fetch},
	{"vsock: echo in the guest", echo},
	{"qmp: query-status", queryStatus},
	{"qmp: query-cpus-fast", queryCPUs},
	{"qmp: stop, cont", stopAndGoOn},
	{"qmp: balloon", balloon},
	{"qmp: system_powerdown", powerDown},
}

// tour boots the kit and takes the steps, up to the first that fails.
func tour(ctx context.Context, gnomon string, kit guest.Kit) (err error) {
	began := time.Now()
	m, err := start(gnomon, kit)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	for _, s := range steps {
		start := time.Now()
		result, err := s.do(ctx, m)
		took := time.Since(start).Seconds()
		if err != nil {
			fmt.Printf("--- FAIL: %s (%.1fs)\n", s.name, took)
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Printf("--- PASS: %-30s (%.1fs)  %s\n", s.name, took, result)
	}
	fmt.Printf("PASS\nok  \ttour\t%.1fs\n", time.Since(began).Seconds())
	return nil
}

func boot(ctx context.Context, m *machine) (string, error) {
	if err := m.agent.WaitReady(ctx); err != nil {
		return "", err
	}
	f, err := m.agent.Facts(ctx)
	if err != nil {
		return "", err
	}
	if m.qmp, err = client.Dial(ctx, "unix:"+m.path("qmp")); err != nil {
		return "", err
	}
	m.events = m.qmp.Subscribe(ctx)
	return fmt.Sprintf("Linux %s, %d CPUs; init began after %.1f s of the guest's time", f.Release, f.CPUs, float64(f.BootMS)/1000), nil
}

func guestMemory(ctx context.Context, m *machine) (string, error) {
	info, err := m.agent.MemInfo(ctx)
	if err != nil {
		return "", err
	}
	if info.Total > memory {
		return "", fmt.Errorf("the guest sees %d bytes of %d", info.Total, memory)
	}
	return fmt.Sprintf("the guest's kernel has %d MiB, %d MiB of them free", info.Total>>20, info.Free>>20), nil
}

func entropy(ctx context.Context, m *machine) (string, error) {
	bytes, err := m.agent.Random(ctx, "/dev/hwrng", 16)
	return fmt.Sprintf("%x", bytes), err
}

// disk ends with the host's own check of the image.
func disk(ctx context.Context, m *machine) (string, error) {
	if err := m.agent.MakeExt4(ctx, "/dev/vda"); err != nil {
		return "", fmt.Errorf("mkfs: %w", err)
	}
	if err := m.agent.Mount(ctx, "/dev/vda", "/mnt", "ext4", ""); err != nil {
		return "", fmt.Errorf("mount: %w", err)
	}
	if _, err := m.agent.Write(ctx, wire.WriteArgs{Path: "/mnt/file", Seed: 1, Size: volume, Sync: true}); err != nil {
		return "", fmt.Errorf("write: %w", err)
	}
	if err := m.agent.DropCaches(ctx); err != nil {
		return "", fmt.Errorf("drop caches: %w", err)
	}
	got, err := m.agent.Read(ctx, wire.ReadArgs{Path: "/mnt/file"})
	if err != nil {
		return "", fmt.Errorf("read: %w", err)
	}
	if want := wire.PatternSum(1, volume); got != want {
		return "", fmt.Errorf("read %+v, wrote %+v", got, want)
	}
	if err := m.agent.Unmount(ctx, "/mnt"); err != nil {
		return "", fmt.Errorf("unmount: %w", err)
	}
	if out, err := exec.CommandContext(ctx, "e2fsck", "-f", "-n", m.path("disk.img")).CombinedOutput(); err != nil {
		return "", fmt.Errorf("e2fsck on the host: %w: %s", err, bytes.TrimSpace(out))
	}
	return fmt.Sprintf("%d KiB in a file on ext4, SHA-256 %.8s..., e2fsck on the host finds the image clean", volume>>10, got.SHA256), nil
}

func dhcp(ctx context.Context, m *machine) (string, error) {
	lease, err := m.agent.DHCP(ctx, "eth0")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s from %s, DNS %s", lease.Address, lease.Server, strings.Join(lease.DNS, " ")), nil
}

func fetch(ctx context.Context, m *machine) (string, error) {
	body := make([]byte, volume)
	wire.Pattern(body, 2, 0)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(body) }))
	defer server.Close()
	url := fmt.Sprintf("http://%s:%d/", netdev.UserGateway, server.Listener.Addr().(*net.TCPAddr).Port)
	got, err := m.agent.HTTPGet(ctx, url)
	if err != nil {
		return "", err
	}
	if want := wire.PatternSum(2, volume); got.Status != http.StatusOK || got.SumResult != want {
		return "", fmt.Errorf("fetched %+v, served %+v", got, want)
	}
	return fmt.Sprintf("%s, %d KiB, SHA-256 %.8s...", url, volume>>10, got.SHA256), nil
}

func echo(ctx context.Context, m *machine) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", m.path("vsock"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	fmt.Fprintf(conn, "CONNECT %d\n", wire.VsockEchoPort)
	r := bufio.NewReader(conn)
	answer, err := r.ReadString('\n')
	if err != nil || !strings.HasPrefix(answer, "OK ") {
		return "", fmt.Errorf("answer %q to CONNECT: %w", answer, err)
	}
	sent, got := make([]byte, volume), make([]byte, volume)
	wire.Pattern(sent, 3, 0)
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		wrote <- err
	}()
	if _, err := io.ReadFull(r, got); err != nil {
		return "", err
	}
	if err := <-wrote; err != nil {
		return "", err
	}
	if !bytes.Equal(sent, got) {
		return "", errors.New("what came back is not what was sent")
	}
	return fmt.Sprintf("%d KiB there and back", volume>>10), nil
}

func (m *machine) status(ctx context.Context, want string) (string, error) {
	var s struct{ Status string }
	if err := m.do(ctx, "query-status", nil, &s); err != nil {
		return "", err
	}
	if s.Status != want {
		return "", fmt.Errorf("status %q, want %q", s.Status, want)
	}
	return s.Status, nil
}

func queryStatus(ctx context.Context, m *machine) (string, error) { return m.status(ctx, "running") }

func queryCPUs(ctx context.Context, m *machine) (string, error) {
	var cpus []struct {
		Index  int `json:"cpu-index"`
		Thread int `json:"thread-id"`
	}
	if err := m.do(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return "", err
	}
	if len(cpus) != 2 {
		return "", fmt.Errorf("%d vCPUs", len(cpus))
	}
	return fmt.Sprintf("vCPU 0 is thread %d of the host, vCPU 1 thread %d", cpus[0].Thread, cpus[1].Thread), nil
}

// stopAndGoOn shows that the guest's time stands still while it is stopped.
func stopAndGoOn(ctx context.Context, m *machine) (string, error) {
	const pause = 2 * time.Second
	began := time.Now()
	before, err := m.agent.Clocks(ctx)
	if err != nil {
		return "", err
	}
	if err := m.do(ctx, "stop", nil, nil); err != nil {
		return "", err
	}
	if _, err := m.status(ctx, "paused"); err != nil {
		return "", err
	}
	select {
	case <-time.After(pause):
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if err := m.do(ctx, "cont", nil, nil); err != nil {
		return "", err
	}
	if _, err := m.status(ctx, "running"); err != nil {
		return "", err
	}
	after, err := m.agent.Clocks(ctx)
	if err != nil {
		return "", err
	}
	host, inGuest := time.Since(began), time.Duration(after.Monotonic-before.Monotonic)
	if inGuest < 0 || inGuest > host-pause {
		return "", fmt.Errorf("the guest's clock went on by %v of %v, of which %v was a pause", inGuest, host, pause)
	}
	return fmt.Sprintf("%.1f s went by on the host, %.1f s in the guest", host.Seconds(), inGuest.Seconds()), nil
}

func balloon(ctx context.Context, m *machine) (string, error) {
	const target = memory - 32<<20
	if err := m.do(ctx, "balloon", map[string]any{"value": target}, nil); err != nil {
		return "", err
	}
	for {
		var b struct{ Actual int64 }
		if err := m.do(ctx, "query-balloon", nil, &b); err != nil {
			return "", err
		}
		if b.Actual == target {
			return fmt.Sprintf("the guest gave back %d of its %d MiB", (memory-b.Actual)>>20, memory>>20), nil
		}
		if err := m.await(ctx, "BALLOON_CHANGE"); err != nil {
			return "", err
		}
	}
}

func powerDown(ctx context.Context, m *machine) (string, error) {
	if err := m.do(ctx, "system_powerdown", nil, nil); err != nil {
		return "", err
	}
	for _, event := range []string{"POWERDOWN", "SHUTDOWN"} {
		if err := m.await(ctx, event); err != nil {
			return "", err
		}
	}
	select {
	case <-m.ended:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if m.err != nil {
		return "", fmt.Errorf("gnomon run: %w", m.err)
	}
	return "the guest powered itself off, gnomon run ended with status 0", nil
}
