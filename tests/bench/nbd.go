package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

// nbdLoads are fio's.
var nbdLoads = []load{
	{"randread1", "4 KiB random read, 1 in flight", "1/s", "--rw=randread --bs=4k --iodepth=1"},
	{"randread32", "4 KiB random read, 32 in flight", "1/s", "--rw=randread --bs=4k --iodepth=32"},
	{"randwrite1", "4 KiB random write, 1 in flight", "1/s", "--rw=randwrite --bs=4k --iodepth=1"},
	{"randwrite32", "4 KiB random write, 32 in flight", "1/s", "--rw=randwrite --bs=4k --iodepth=32"},
	{"seqread", "1 MiB sequential read, 8 in flight", "MB/s", "--rw=read --bs=1M --iodepth=8"},
	{"seqwrite", "1 MiB sequential write, 8 in flight", "MB/s", "--rw=write --bs=1M --iodepth=8"},
}

// nbd measures images served by NBD, in the page cache or past it, with fio as the
// client.
func (b *bench) nbd(format, cache string) experiment {
	name, direct, other := "NBD "+format, "off", "threads"
	if cache == "none" {
		name, direct, other = name+" direct", "on", "native"
	}
	side := func(command func(image, string) []string) opener {
		return func(ctx context.Context, _ []load, _, place int) (standby, error) {
			img := b.image(format, place)
			ready := img.make
			if cache == "none" {
				ready = img.makeDirect
			}
			if err := ready(); err != nil {
				return nil, err
			}
			socket, err := b.scratch("nbd")
			if err != nil {
				return nil, err
			}
			return b.openServer(ctx, command(img, socket), socket)
		}
	}
	daemon := func(aio string) opener {
		return side(func(img image, socket string) []string {
			return []string{
				"qemu-storage-daemon",
				"--blockdev", "driver=file,node-name=f,filename=" + img.path + ",aio=" + aio + ",cache.direct=" + direct,
				"--blockdev", "driver=" + format + ",node-name=d,file=f",
				"--nbd-server", "addr.type=unix,addr.path=" + socket,
				"--export", "type=nbd,id=e,node-name=d,name=d,writable=on",
			}
		})
	}
	e := experiment{
		name: name,
		schedule: &turns{count: b.pick(1, 3), loads: nbdLoads, sides: []contestant{
			{"gnomon disk serve", side(func(img image, socket string) []string {
				return []string{b.gnomon, "disk", "serve", img.path, "-f", format, "--cache", cache, "--listen", "unix:" + socket, "--export-name", "d"}
			})},
			{"qemu-storage-daemon, " + other, daemon(other)},
			{"qemu-storage-daemon, io_uring", daemon("io_uring")},
		}},
	}
	e.promise(nbdLoads, 1)
	return e
}

// A server serves an image to fio, which uses it for a moment in each turn.
type server struct {
	socket string
	runs   string // for so long
	cancel context.CancelFunc
	ended  chan error
}

// openServer starts a server and waits until it takes connections.
func (b *bench) openServer(ctx context.Context, command []string, socket string) (*server, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	s := &server{socket: socket, runs: fmt.Sprintf("--runtime=%dms", b.pick(300, 150)), cancel: cancel, ended: make(chan error, 1)}
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	go func() { s.ended <- cmd.Wait() }()
	if err := until(ctx, poll, func() (bool, error) {
		select {
		case err := <-s.ended:
			s.ended <- err
			return false, fmt.Errorf("%s: %w: %s", command[0], err, said.String())
		default:
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	}); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *server) close() {
	s.cancel()
	<-s.ended
	os.Remove(s.socket)
}

func (s *server) turn(ctx context.Context, l load) (float64, error) {
	x, err := fio(ctx, append(strings.Fields(l.words), "--ioengine=nbd", "--uri=nbd+unix:///d?socket="+s.socket,
		"--time_based", "--ramp_time=50ms", s.runs)...)
	if l.unit == "MB/s" {
		return x.Bytes / 1e6, err
	}
	return x.IOPS, err
}

// fioSide is what fio's JSON tells of the reads or the writes of a job.
type fioSide struct {
	IOPS  float64 `json:"iops"`
	Bytes float64 `json:"bw_bytes"` // a second
}

// fio runs one job, which reads or writes but not both.
func fio(ctx context.Context, args ...string) (fioSide, error) {
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--name=job", "--output-format=json"}, args...)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return fioSide{}, fmt.Errorf("fio (Debian's package of that name): %w: %s", err, out)
	}
	var result struct {
		Jobs []struct{ Read, Write fioSide }
	}
	_, text, _ := bytes.Cut(out, []byte("\n{")) // remarks come first
	if err := json.Unmarshal(append([]byte("{"), text...), &result); err != nil || len(result.Jobs) != 1 {
		return fioSide{}, fmt.Errorf("fio: %d jobs (%v)", len(result.Jobs), err)
	}
	job := result.Jobs[0]
	return fioSide{job.Read.IOPS + job.Write.IOPS, job.Read.Bytes + job.Write.Bytes}, nil
}
