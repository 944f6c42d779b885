package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// nbdLoads are fio's: how it reads or writes, in what size, how many at once.
var nbdLoads = []struct {
	metric, text, unit, rw, size string
	depth                        int
}{
	{"randread1", "4 KiB random read, 1 in flight", "1/s", "randread", "4k", 1},
	{"randread32", "4 KiB random read, 32 in flight", "1/s", "randread", "4k", 32},
	{"randwrite32", "4 KiB random write, 32 in flight", "1/s", "randwrite", "4k", 32},
	{"seqread", "1 MiB sequential read, 8 in flight", "MB/s", "read", "1M", 8},
	{"seqwrite", "1 MiB sequential write, 8 in flight", "MB/s", "write", "1M", 8},
}

// nbd measures images served by NBD, in the page cache or past it, with fio as the
// client.
func (b *bench) nbd(format, cache string) experiment {
	img := b.image(format)
	name, ready, direct, other := "NBD "+format, image.make, "off", "threads"
	if cache == "none" {
		name, ready, direct, other = name+" direct", image.makeDirect, "on", "native"
	}
	socket := filepath.Join(b.dir, "nbd.sock")
	daemon := func(aio string) []string {
		return []string{
			"qemu-storage-daemon",
			"--blockdev", "driver=file,node-name=f,filename=" + img.path + ",aio=" + aio + ",cache.direct=" + direct,
			"--blockdev", "driver=" + format + ",node-name=d,file=f",
			"--nbd-server", "addr.type=unix,addr.path=" + socket,
			"--export", "type=nbd,id=e,node-name=d,name=d,writable=on",
		}
	}
	run := func(command []string) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			if err := ready(img); err != nil {
				return nil, err
			}
			return b.nbdOnce(ctx, command, socket)
		}
	}
	e := experiment{
		name: name,
		contenders: []contender{
			{"gnomon disk serve", run([]string{b.gnomon, "disk", "serve", img.path, "-f", format, "--cache", cache, "--listen", "unix:" + socket, "--export-name", "d"})},
			{"qemu-storage-daemon, " + other, run(daemon(other))},
			{"qemu-storage-daemon, io_uring", run(daemon("io_uring"))},
		},
	}
	for _, l := range nbdLoads {
		e.promises = append(e.promises, promise{metric: l.metric, text: name + " " + l.text, unit: l.unit, higher: true, bound: bound{"ratio", ">=", 1}})
	}
	return e
}

func (b *bench) nbdOnce(ctx context.Context, command []string, socket string) (figures, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	server := exec.CommandContext(ctx, command[0], command[1:]...)
	var said strings.Builder
	server.Stderr = &said
	if err := server.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	defer func() {
		cancel()
		<-ended
	}()
	if err := until(ctx, poll, func() (bool, error) {
		select {
		case err := <-ended:
			ended <- err
			return false, fmt.Errorf("%s: %w: %s", command[0], err, said.String())
		default:
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	}); err != nil {
		return nil, err
	}
	f := figures{}
	for _, l := range nbdLoads {
		x, err := fio(ctx, "--ioengine=nbd", "--uri=nbd+unix:///d?socket="+socket, "--rw="+l.rw, "--bs="+l.size,
			fmt.Sprint("--iodepth=", l.depth), "--time_based", "--ramp_time=200ms", fmt.Sprintf("--runtime=%dms", b.pick(1500, 400)))
		if err != nil {
			return nil, err
		}
		if f[l.metric] = x.IOPS; l.unit == "MB/s" {
			f[l.metric] = x.Bytes / 1e6
		}
	}
	return f, nil
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
