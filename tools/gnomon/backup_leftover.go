package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// A command that serves a disk holds a lock on its scratch image (flock, which is
// nothing to those of machines on images). So the next one can tell whether what it
// finds on a machine is of a command that was killed, and takes that back.

const (
	pullFile   = pullNode + "-file" // the node of the scratch image's file
	pullJob    = "pull-"            // begins the job's id
	pullFolder = "gnomon-pull-"     // begins the name of the scratch image's directory
)

// hold locks a scratch image until the returned file is closed.
func hold(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// takeBackLeftover takes back what a killed command has left on a machine, and tells
// whether there was something.
func (p *pull) takeBackLeftover(ctx context.Context) (bool, error) {
	files, err := nodeFiles(ctx, p.c)
	if _, there := files[pullNode]; !there || err != nil {
		return false, err
	}
	scratch := files[pullFile]
	lock, err := hold(scratch)
	if err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, errors.New("a disk of this machine is served already, by a gnomon backup --serve that still runs: interrupt that first")
		}
		return false, fmt.Errorf("a disk of this machine is served already, and it cannot be told by whom (%w): if that was killed, run gnomon qmp: "+
			"job-cancel and job-dismiss its job %s..., nbd-server-stop, blockdev-del %s", err, pullJob, pullNode)
	}
	defer lock.Close()
	if err := p.dismantle(ctx); err != nil {
		return false, fmt.Errorf("what a gnomon backup --serve that was killed has left: %w", err)
	}
	if err := os.Remove(scratch); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return true, err
	}
	if dir := filepath.Dir(scratch); strings.HasPrefix(filepath.Base(dir), pullFolder) {
		_ = os.Remove(dir) // it may have been somebody's own of that name
	}
	return true, nil
}

// nodeFiles are the files of a machine's nodes, by the nodes' names.
func nodeFiles(ctx context.Context, c *client.Client) (map[string]string, error) {
	var nodes []struct {
		NodeName string `json:"node-name"`
		File     string `json:"file"`
	}
	if err := c.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	files := map[string]string{}
	for _, n := range nodes {
		files[n.NodeName] = n.File
	}
	return files, nil
}

// dismantle takes back what a command did to the machine, as far as it came.
func (p *pull) dismantle(ctx context.Context) error {
	var exports []struct {
		ID string `json:"id"`
	}
	if err := p.c.Execute(ctx, "query-block-exports", nil, &exports); err != nil {
		return err
	}
	var jobs []jobInfo
	if err := p.c.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return err
	}
	var ours []string
	for _, j := range jobs {
		if strings.HasPrefix(j.ID, pullJob) {
			ours = append(ours, j.ID)
		}
	}
	switch {
	case len(exports) == 1 && exports[0].ID == pullNode:
		if err := p.c.Execute(ctx, "nbd-server-stop", nil, nil); err != nil {
			return err
		}
	case len(exports) == 0 && len(ours) > 0:
		// It may have come as far as to start the server.
		_ = p.c.Execute(ctx, "nbd-server-stop", nil, nil)
	default:
		for _, x := range exports {
			if x.ID == pullNode {
				return fmt.Errorf("the machine serves more than its export %s: end that first (block-export-del)", pullNode)
			}
		}
	}
	for _, id := range ours {
		if err := endJob(ctx, p.c, id); err != nil {
			return err
		}
	}
	if err := p.c.Execute(ctx, "blockdev-del", map[string]any{"node-name": pullNode}, nil); err != nil {
		return err
	}
	var disks []attachedDisk
	if err := p.c.Execute(ctx, "query-block", nil, &disks); err != nil {
		return err
	}
	for i := range disks {
		if d := &disks[i]; d.Inserted != nil && d.bitmap(pullBitmap) != nil {
			if err := p.c.Execute(ctx, "block-dirty-bitmap-remove", map[string]any{"node": d.Inserted.NodeName, "name": pullBitmap}, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// again finds the disk once more, whose nodes may be others.
func (d *attachedDisk) again(ctx context.Context, c *client.Client) (*attachedDisk, error) {
	name := d.Device
	if name == "" {
		name = filepath.Base(strings.TrimSuffix(d.Qdev, "/virtio-backend"))
	}
	return findAttached(ctx, c, name)
}
