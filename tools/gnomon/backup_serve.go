package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// pullFlags are those of gnomon backup --serve.
type pullFlags struct {
	address, since, mark, scratch string
}

// What the machine knows a served instant by. A machine serves one at a time.
const (
	pullNode   = "gnomon-pull" // of the scratch image, the job and the export
	pullBitmap = "changed"
	pullExport = "disk"
)

func (f *pullFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.address, "serve", "", "`address` at which other programs fetch the disk: unix:PATH or localhost:PORT")
	flags.StringVar(&f.since, "since", "", "`bitmap` of the machine's that tells what changed, with --serve")
	flags.StringVar(&f.mark, "mark", "", "`bitmap` to begin at this instant, for a later --since, with --serve")
	flags.StringVar(&f.scratch, "scratch", "", "`image` to make and remove, for what is written over meanwhile (default: beside temporary files)")
}

// server is the address in the machine's words, and as a URI.
func (f *pullFlags) server() (addr map[string]any, uri string, err error) {
	if path, ok := strings.CutPrefix(f.address, "unix:"); ok {
		if path, err = filepath.Abs(path); err != nil {
			return nil, "", err
		}
		return map[string]any{"type": "unix", "data": map[string]any{"path": path}}, "nbd+unix:///" + pullExport + "?socket=" + path, nil
	}
	host, port, err := net.SplitHostPort(strings.TrimPrefix(f.address, "nbd://"))
	if err != nil {
		return nil, "", usageError(fmt.Errorf("--serve %q: unix:PATH and localhost:PORT are possible", f.address))
	}
	return map[string]any{"type": "inet", "data": map[string]any{"host": host, "port": port}}, "nbd://" + net.JoinHostPort(host, port) + "/" + pullExport, nil
}

// pull is an instant of a machine's disk that is being served.
type pull struct {
	c    *client.Client
	node string // the disk's
	undo []func(context.Context) error
}

// do runs a command, and notes what takes it back.
func (p *pull) do(ctx context.Context, command string, args map[string]any, undo func(context.Context) error) error {
	if err := p.c.Execute(ctx, command, args, nil); err != nil {
		return err
	}
	if undo != nil {
		p.undo = append(p.undo, undo)
	}
	return nil
}

// back is a command that takes another back.
func (p *pull) back(command string, args map[string]any) func(context.Context) error {
	return func(ctx context.Context) error { return p.c.Execute(ctx, command, args, nil) }
}

// end takes back all that was done, the last first.
func (p *pull) end(ctx context.Context) (err error) {
	for i := len(p.undo) - 1; i >= 0; i-- {
		err = errors.Join(err, p.undo[i](ctx))
	}
	p.undo = nil
	return err
}

func (f *pullFlags) run(cmd *cobra.Command, c *client.Client, d *attachedDisk) (err error) {
	addr, uri, err := f.server()
	if err != nil {
		return err
	}
	p := &pull{c: c}
	// A command that is given up while it is under way takes the connection with it, by
	// which all is to be taken back.
	background := context.WithoutCancel(cmd.Context())
	switch left, err := p.takeBackLeftover(background); {
	case err != nil:
		return err
	case left:
		fmt.Fprintln(cmd.ErrOrStderr(), "took back what a gnomon backup --serve that was killed had left on the machine")
		if d, err = d.again(background, c); err != nil {
			return err
		}
	}
	for _, name := range []string{f.since, f.mark} {
		switch has := d.bitmap(name) != nil; {
		case name == pullBitmap:
			return usageError(fmt.Errorf("a bitmap cannot be called %s: choose another name", pullBitmap))
		case name != "" && name == f.mark && has:
			return fmt.Errorf("bitmap %s is there already: remove it (gnomon qmp, block-dirty-bitmap-remove), or choose another name", name)
		case name != "" && name == f.since && !d.hasBitmap(name):
			return fmt.Errorf("the machine does not know what changed since %s: fetch all of the disk, without --since", name)
		}
	}
	p.node = d.Inserted.NodeName
	begin := time.Now()
	defer func() {
		// However it ends, the machine is left as it was.
		err = errors.Join(err, p.end(background))
	}()
	job, err := p.begin(background, f, d, addr)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: the disk as it was at %s\n", uri, begin.Format(time.RFC3339))
	return p.keep(cmd.Context(), job)
}

// begin has the machine serve the disk as it is now, and returns the job that keeps it
// so.
func (p *pull) begin(ctx context.Context, f *pullFlags, d *attachedDisk, addr map[string]any) (string, error) {
	if err := p.addScratch(ctx, f.scratch, d.Inserted.Image.VirtualSize); err != nil {
		return "", err
	}
	if d.bitmap(pullBitmap) != nil { // of an older command that was killed
		if err := p.c.Execute(ctx, "block-dirty-bitmap-remove", map[string]any{"node": p.node, "name": pullBitmap}, nil); err != nil {
			return "", err
		}
	}
	job := fmt.Sprintf(pullJob+"%d-%d", os.Getpid(), time.Now().UnixNano())
	actions := []any{}
	act := func(kind string, data map[string]any) {
		actions = append(actions, map[string]any{"type": kind, "data": data})
	}
	export := map[string]any{"id": pullNode, "type": "nbd", "node-name": pullNode, "name": pullExport}
	if f.since != "" {
		act("block-dirty-bitmap-add", map[string]any{"node": p.node, "name": pullBitmap, "disabled": true})
		act("block-dirty-bitmap-merge", map[string]any{"node": p.node, "target": pullBitmap, "bitmaps": []string{f.since}})
		export["bitmaps"] = []any{map[string]any{"node": p.node, "name": pullBitmap}}
	}
	if f.mark != "" {
		act("block-dirty-bitmap-add", map[string]any{"node": p.node, "name": f.mark, "persistent": d.Inserted.Driver == disk.FormatQcow2})
	}
	act("blockdev-backup", map[string]any{"job-id": job, "device": p.node, "target": pullNode, "sync": "none", "auto-dismiss": false})
	if err := p.do(ctx, "transaction", map[string]any{"actions": actions}, func(ctx context.Context) error {
		var bitmap error
		if f.since != "" {
			bitmap = p.c.Execute(ctx, "block-dirty-bitmap-remove", map[string]any{"node": p.node, "name": pullBitmap}, nil)
		}
		return errors.Join(endJob(ctx, p.c, job), bitmap)
	}); err != nil {
		return "", err
	}
	if err := p.do(ctx, "nbd-server-start", map[string]any{"addr": addr}, p.back("nbd-server-stop", map[string]any{})); err != nil {
		return "", err
	}
	return job, p.do(ctx, "block-export-add", export, nil)
}

// addScratch makes the image for what is written over, of size bytes, and lays it on
// the disk.
func (p *pull) addScratch(ctx context.Context, path string, size int64) error {
	if path == "" {
		dir, err := os.MkdirTemp("", pullFolder)
		if err != nil {
			return err
		}
		p.undo = append(p.undo, func(context.Context) error { return os.Remove(dir) })
		path = filepath.Join(dir, "scratch.qcow2")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: size}); err != nil {
		return err
	}
	p.undo = append(p.undo, func(context.Context) error { return os.Remove(path) })
	lock, err := hold(path)
	if err != nil {
		return err
	}
	p.undo = append(p.undo, func(context.Context) error { return lock.Close() })
	del := p.back("blockdev-del", map[string]any{"node-name": pullNode})
	return p.do(ctx, "blockdev-add", map[string]any{
		"driver": "qcow2", "node-name": pullNode, "file": map[string]any{"driver": "file", "node-name": pullFile, "filename": path}, "backing": p.node,
	}, del)
}

// keep returns when ctx ends, or when the machine cannot keep the instant any more.
func (p *pull) keep(ctx context.Context, job string) error {
	tick := time.NewTicker(jobPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.c.Done():
			return errors.New("the machine has ended")
		case <-tick.C:
			info, err := findJob(context.WithoutCancel(ctx), p.c, job)
			switch {
			case err != nil:
				return err
			case info.Status == "concluded":
				return fmt.Errorf("what was written over could not be kept: %s", info.Error)
			}
		}
	}
}
