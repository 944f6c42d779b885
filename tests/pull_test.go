package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// served runs gnomon backup --serve, and f while that serves the disk at a URI.
func served(ctx context.Context, t *testing.T, f func(uri string), args ...string) {
	t.Helper()
	p, out := launchProgram(t, gnomon, append([]string{"backup"}, args...)...)
	said := readUntil(out, "as it was at")
	uri, _, ok := strings.Cut(said, ": the disk")
	if !ok {
		t.Fatalf("it says %q\n%s", said, &p.log)
	}
	f(uri)
	if err := p.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if status := p.status(ctx, t); status != 0 {
		t.Errorf("status %d\n%s", status, &p.log)
	}
}

// QEMU's tools fetch a running machine's disk as it was at an instant, and what
// changed before, while the guest writes over all of it.
func TestPulledBackups(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	const words = "blk op=randwrite qd=4 count=1000; wait for=first; blk op=randwrite qd=4 off=2M span=1M count=1000 seed=2; wait for=second; blk op=randwrite qd=4 count=100000000 seed=3"
	for _, vmm := range []string{"gnomon", "QEMU"} {
		t.Run(vmm, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			img, machine, socket := at("disk.img"), at("qmp.sock"), at("nbd.sock")
			qemuImg(ctx, t, "create", "-q", "-f", "raw", img, "16M")
			_, serial := launchEither(ctx, t, vmm, words, img, "", machine)
			readUntil(serial, "for=first")
			content := func(path string) []byte {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return b
			}
			first := content(img)
			served(ctx, t, func(uri string) {
				qemuImg(ctx, t, "convert", "-f", "raw", "-O", "raw", uri, at("first"))
			}, machine, "--serve", "unix:"+socket, "--mark", "one")
			if !bytes.Equal(content(at("first")), first) {
				t.Error("what was fetched is not the disk")
			}
			if _, err := io.WriteString(serial, "\n"); err != nil {
				t.Fatal(err)
			}
			readUntil(serial, "for=second")
			second := content(img)
			served(ctx, t, func(uri string) {
				if _, err := io.WriteString(serial, "\n"); err != nil {
					t.Fatal(err)
				}
				var extents []struct {
					Start, Length int64
					Data          bool
				}
				options := "driver=nbd,server.type=unix,server.path=" + socket + ",export=disk,x-dirty-bitmap=qemu:dirty-bitmap:changed"
				if err := json.Unmarshal([]byte(qemuImg(ctx, t, "map", "--output=json", "--image-opts", options)), &extents); err != nil {
					t.Fatal(err)
				}
				for _, e := range extents { // data is what qemu-img calls what is not dirty
					if !e.Data && (e.Start < 2<<20 || e.Start+e.Length > 3<<20) || e.Data && !bytes.Equal(first[e.Start:e.Start+e.Length], second[e.Start:e.Start+e.Length]) {
						t.Errorf("%+v", e)
					}
				}
				if len(extents) < 2 {
					t.Errorf("%+v", extents)
				}
				for bytes.Equal(content(img), second) { // until the guest has written
				}
				qemuImg(ctx, t, "convert", "-f", "raw", "-O", "raw", uri, at("second"))
			}, machine, "--serve", "unix:"+socket, "--since", "one", "--mark", "two", "--scratch", at("scratch.qcow2"))
			if !bytes.Equal(content(at("second")), second) {
				t.Error("what was fetched is not the disk as it was")
			}
			if _, err := os.Stat(at("scratch.qcow2")); err == nil {
				t.Error("the scratch image is still there")
			}
			for _, tt := range []struct {
				args   []string
				status int
				says   string
			}{
				{[]string{machine, "--serve", "unix:" + socket, "--since", "three"}, 1, "does not know what changed since three"},
				{[]string{machine, "--serve", "unix:" + socket, "--mark", "two"}, 1, "two is there already"},
				{[]string{machine, "--serve", "nowhere"}, 2, "unix:PATH and localhost:PORT"},
				{[]string{machine, "--since", "one"}, 2, "without --serve"},
				{[]string{img, "--serve", "unix:" + socket}, 2, "gnomon disk serve"},
				{[]string{machine, "--serve", "unix:/no/such/directory/s"}, 1, "directory"},
			} {
				cmd := exec.CommandContext(ctx, gnomon, append([]string{"backup"}, tt.args...)...)
				out, err := cmd.CombinedOutput()
				if cmd.ProcessState.ExitCode() != tt.status || !strings.Contains(string(out), tt.says) {
					t.Errorf("backup %v: %v, %q; want status %d and %q", tt.args, err, out, tt.status, tt.says)
				}
			}
			// What failed has left nothing behind.
			served(ctx, t, func(string) {}, machine, "--serve", fmt.Sprintf("localhost:%d", freePort(t)), "--since", "two")
		})
	}
}

// What a command that was killed has left on a machine is taken back by the next, of
// one that still runs it is left alone.
func TestPullKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, vmm := range []string{"gnomon", "QEMU"} {
		t.Run(vmm, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			machine, socket, scratch := at("qmp.sock"), at("nbd.sock"), at("scratch.qcow2")
			launchWriting(ctx, t, vmm, at("disk.img"), machine)
			served(ctx, t, func(string) {}, machine, "--serve", "unix:"+socket, "--mark", "one")
			serve := []string{"backup", machine, "--serve", "unix:" + socket, "--since", "one", "--scratch", scratch}
			for range 2 {
				p, out := launchProgram(t, gnomon, serve...)
				readUntil(out, "as it was at")
				if vmm == "gnomon" { // QEMU's monitor has one client
					said, err := exec.CommandContext(ctx, gnomon, serve...).CombinedOutput()
					if err == nil || !strings.Contains(string(said), "that still runs") {
						t.Errorf("while another serves the disk: %v, %q", err, said)
					}
				}
				if said := qemuImg(ctx, t, "info", "nbd+unix:///disk?socket="+socket); !strings.Contains(said, "16 MiB") {
					t.Error(said)
				}
				if err := p.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				<-p.stopped
			}
			served(ctx, t, func(uri string) {
				qemuImg(ctx, t, "convert", "-f", "raw", "-O", "raw", uri, at("fetched"))
			}, serve[1:]...)
			if fetched, err := os.ReadFile(at("fetched")); err != nil || len(fetched) != 16<<20 {
				t.Errorf("%d bytes: %v", len(fetched), err)
			}
			if _, err := os.Stat(scratch); err == nil {
				t.Error("the scratch image is still there")
			}
			said, err := exec.CommandContext(ctx, gnomon, "qmp", machine, "query-jobs").CombinedOutput()
			if err != nil || strings.Contains(string(said), "pull") {
				t.Errorf("%v: %s", err, said)
			}
		})
	}
}
