package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// qmp measures one client that asks one question after the other on a unix
// socket. The guest is paused, so that both processors are for client and server.
func (b *bench) qmp() experiment {
	socket := filepath.Join(b.dir, "qmp.sock")
	run := func(v vmm, flags ...string) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) { return b.qmpOnce(ctx, v, socket, flags) }
	}
	peer := []string{"-S", "-qmp", "unix:" + socket + ",server=on,wait=off"}
	return experiment{
		name: "qmp",
		schedule: contenders{
			{"gnomon", run(b.ours(128, "--net", "none"), "--paused", "--qmp", "unix:"+socket)},
			{"QEMU microvm", run(b.peer(microvm, 128), peer...)},
			{"QEMU q35", run(b.peer("q35", 128), peer...)},
		},
		promises: []promise{
			{metric: "status", text: "QMP query-status, one after the other", unit: "1/s", higher: true, bound: bound{"ratio", ">=", 1}},
			{metric: "schema", text: "QMP query-commands, one after the other", unit: "1/s", higher: true},
		},
	}
}

func (b *bench) qmpOnce(ctx context.Context, v vmm, socket string, flags []string) (figures, error) {
	g, err := v.start(ctx, "boot", flags...)
	if err != nil {
		return nil, err
	}
	defer g.kill()
	defer os.Remove(socket)
	conn, err := dialQMP(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c := qmpClient{conn, bufio.NewReader(conn)}
	if _, err := c.r.ReadString('\n'); err != nil { // the greeting
		return nil, err
	}
	if err := c.ask("qmp_capabilities"); err != nil {
		return nil, err
	}
	f := figures{}
	for metric, question := range map[string]string{"status": "query-status", "schema": "query-commands"} {
		if f[metric], err = c.rate(question, b.pick(5000, 1000)); err != nil {
			return nil, err
		}
	}
	return f, c.ask("quit")
}

// qmpClient does as little as a client can.
type qmpClient struct {
	conn net.Conn
	r    *bufio.Reader
}

// ask asks and waits for the answer.
func (c *qmpClient) ask(question string) error {
	if _, err := fmt.Fprintf(c.conn, "{\"execute\": \"%s\"}\n", question); err != nil {
		return err
	}
	for {
		answer, err := c.r.ReadString('\n')
		if err != nil {
			return err
		}
		switch {
		case strings.HasPrefix(answer, `{"return"`):
			return nil
		case strings.HasPrefix(answer, `{"error"`):
			return fmt.Errorf("%s: %s", question, answer)
		}
	}
}

// rate is how often a second the question can be asked, after a start that does not count.
func (c *qmpClient) rate(question string, n int) (float64, error) {
	var start time.Duration
	for i := range n + n/10 {
		if i == n/10 {
			start = clock()
		}
		if err := c.ask(question); err != nil {
			return 0, err
		}
	}
	return float64(n) / (clock() - start).Seconds(), nil
}

// dialQMP waits until the server is there.
func dialQMP(ctx context.Context, socket string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err == nil || !errors.Is(err, fs.ErrNotExist) && ctx.Err() != nil {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("nobody listens: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
