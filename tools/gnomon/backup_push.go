package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"

	"github.com/gnomon-vmm/gnomon/disk/archive"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// Changes that are kept in raw files are pushed to us by the machine, by NBD: what a raw
// file was given it does not tell, and an image that does would be written beside it.

const (
	pushExport = "changes"
	pushFolder = "gnomon-push-" // begins the name of the socket's directory
)

// pushName is what a machine knows a backup into a directory by: the job, and the node that
// it is pushed to. Nobody else uses the directory meanwhile.
func pushName(archiveID string) string { return "gnomon-" + archiveID }

// push serves what a machine copies changes to, which has it as a node.
type push struct {
	undo []func() error
}

// servePush serves the backup, and has the machine attach it as a node.
func servePush(ctx context.Context, c *client.Client, node string, p *archive.Pending) (_ *push, err error) {
	s := &push{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	var target block.Node
	if target, err = p.Target(); err != nil {
		return nil, err
	}
	s.undo = append(s.undo, target.Close)
	dir, err := os.MkdirTemp("", pushFolder)
	if err != nil {
		return nil, err
	}
	s.undo = append(s.undo, func() error { return os.RemoveAll(dir) })
	socket := filepath.Join(dir, "nbd.sock")
	l, err := nbd.Listen("unix:" + socket)
	if err != nil {
		return nil, err
	}
	server := nbd.NewServer(nbd.ServerOptions{})
	if err := server.Add(nbd.Export{Name: pushExport, Node: target, FastZero: true}); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(l) // when it ends early the machine's job fails
	}()
	s.undo = append(s.undo, func() error {
		err := server.Close()
		<-ended
		return err
	})
	if err := c.Execute(ctx, "blockdev-add", map[string]any{
		"driver": "nbd", "node-name": node, "server": map[string]any{"type": "unix", "path": socket}, "export": pushExport, "discard": "unmap",
	}, nil); err != nil {
		return nil, err
	}
	s.undo = append(s.undo, func() error {
		return c.Execute(context.WithoutCancel(ctx), "blockdev-del", map[string]any{"node-name": node}, nil)
	})
	return s, nil
}

// close takes the node from the machine and ends the serving.
func (s *push) close() (err error) {
	for _, undo := range slices.Backward(s.undo) {
		err = errors.Join(err, undo())
	}
	s.undo = nil
	return err
}

// takeBackPush takes back what a backup into a directory that was killed has left on a
// machine, and tells whether there was something.
func takeBackPush(ctx context.Context, c *client.Client, archiveID string) (left bool, err error) {
	name := pushName(archiveID)
	var jobs []jobInfo
	if err := c.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return false, err
	}
	if slices.ContainsFunc(jobs, func(j jobInfo) bool { return j.ID == name }) {
		left = true
		_ = endJob(ctx, c, name) // it may have failed
	}
	files, err := nodeFiles(ctx, c)
	if _, there := files[name]; !there || err != nil {
		return left, err
	}
	err = c.Execute(ctx, "blockdev-del", map[string]any{"node-name": name}, nil)
	if err != nil {
		// That its server is gone may be told; the node goes nevertheless.
		files, again := nodeFiles(ctx, c)
		if _, there := files[name]; !there && again == nil {
			err = nil
		}
	}
	return true, err
}
