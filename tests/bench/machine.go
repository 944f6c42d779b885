package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

const pageSize = 4096

// A machine is a guest that several runs use, with a QMP connection.
type machine struct {
	*guest
	qmp    *qmpClient
	socket string
}

// startMachine starts a VMM that listens for QMP; input is what its serial port
// gets at once.
func (b *bench) startMachine(ctx context.Context, v vmm, words, input string) (*machine, error) {
	socket, err := b.scratch("qmp")
	if err != nil {
		return nil, err
	}
	v.patience = time.Hour
	flags := []string{"--qmp", "unix:" + socket}
	if v.binary == b.qemu {
		flags = []string{"-qmp", "unix:" + socket + ",server=on,wait=off"}
	}
	g, err := v.start(ctx, words, flags...)
	if err != nil {
		return nil, err
	}
	m := &machine{guest: g, socket: socket}
	if _, err = io.WriteString(g.stdin, input); err == nil {
		m.qmp, err = openQMP(ctx, socket)
	}
	if err != nil {
		m.close()
		return nil, errors.Join(err, g.end())
	}
	return m, nil
}

func (m *machine) close() {
	if m == nil {
		return
	}
	if m.qmp != nil {
		m.qmp.conn.Close()
	}
	m.kill()
	os.Remove(m.socket)
}

// scratch is the path of a file that is not there.
func (b *bench) scratch(name string) (string, error) {
	b.files++
	path := filepath.Join(b.dir, fmt.Sprintf("%s-%d", name, b.files))
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	return path, nil
}

// openQMP connects and says hello.
func openQMP(ctx context.Context, socket string) (*qmpClient, error) {
	conn, err := dialQMP(ctx, socket)
	if err != nil {
		return nil, err
	}
	c := &qmpClient{conn, bufio.NewReader(conn)}
	if _, err = c.r.ReadString('\n'); err == nil { // the greeting
		err = c.ask("qmp_capabilities")
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// execute has a command with arguments done. An open file goes with it if there
// is one.
func (c *qmpClient) execute(command string, arguments, result any, file *os.File) error {
	line, err := json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if err != nil {
		return err
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	if _, _, err := c.conn.(*net.UnixConn).WriteMsgUnix(append(line, '\n'), rights, nil); err != nil {
		return err
	}
	for {
		text, err := c.r.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		switch err := json.Unmarshal(text, &answer); {
		case err != nil:
			return fmt.Errorf("%s: %w", command, err)
		case answer.Error != nil:
			return fmt.Errorf("%s: %s", command, answer.Error.Desc)
		case answer.Return == nil: // an event
		case result == nil:
			return nil
		default:
			return json.Unmarshal(answer.Return, result)
		}
	}
}

// poll is how often it is asked whether something is over.
const poll = 5 * time.Millisecond

// until asks until the answer is yes.
func until(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(every):
		}
	}
}

// a saved is what Gnomon tells of a checkpoint.
type saved struct {
	Prepared int64 `json:"prepared-ns"`
	Pause    int64 `json:"pause-ns"`
	Total    int64 `json:"total-ns"`
	Pages    int64 `json:"pages"`
	Zero     int64 `json:"zero-pages"`
	Bytes    int64 `json:"file-bytes"`
	Writes   int64 `json:"writes"`
	// Touched is how many bytes of memory were not zero.
	Touched int64 `json:"-"`
}

// checkpoint saves Gnomon's machine. It returns when the file is on disk.
func (m *machine) checkpoint(ctx context.Context, file, parent, mode string) (*saved, error) {
	arguments := map[string]any{"file": file, "mode": mode}
	if parent != "" {
		arguments["parent"] = parent
	}
	return m.checkpointWith(ctx, arguments)
}

// checkpointWith saves Gnomon's machine.
func (m *machine) checkpointWith(ctx context.Context, arguments map[string]any) (*saved, error) {
	arguments["job-id"] = "save"
	if err := m.qmp.execute("__org.gnomon_checkpoint", arguments, nil, nil); err != nil {
		return nil, err
	}
	if err := until(ctx, poll, func() (bool, error) {
		var jobs []struct{ ID, Status, Error string }
		if err := m.qmp.execute("query-jobs", struct{}{}, &jobs, nil); err != nil {
			return false, err
		}
		for _, j := range jobs {
			if j.ID == "save" && j.Status == "concluded" && j.Error != "" {
				return false, errors.New(j.Error)
			} else if j.ID == "save" && j.Status != "concluded" {
				return false, nil
			}
		}
		return true, nil
	}); err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	if err := m.qmp.execute("job-dismiss", map[string]any{"id": "save"}, nil, nil); err != nil {
		return nil, err
	}
	var s saved
	err := m.qmp.execute("__org.gnomon_query-checkpoint", struct{}{}, &s, nil)
	s.Touched = (s.Pages - s.Zero) * pageSize
	return &s, err
}

// migrate saves QEMU's machine, which stands still, into a file, by its own
// hands or by a program that it writes to.
func (m *machine) migrate(ctx context.Context, file string, program bool) error {
	uri := "exec:cat > " + file
	if !program {
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := m.qmp.execute("getfd", map[string]any{"fdname": "file"}, nil, f); err != nil {
			return err
		}
		uri = "fd:file"
	}
	for _, step := range []struct {
		command   string
		arguments map[string]any
	}{
		{"migrate-set-parameters", map[string]any{"max-bandwidth": 100 << 30}},
		{"migrate", map[string]any{"uri": uri}},
	} {
		if err := m.qmp.execute(step.command, step.arguments, nil, nil); err != nil {
			return err
		}
	}
	return until(ctx, poll, func() (bool, error) {
		var state struct {
			Status string
			Error  string `json:"error-desc"`
		}
		err := m.qmp.execute("query-migrate", struct{}{}, &state, nil)
		if state.Status == "failed" || state.Status == "cancelled" {
			err = fmt.Errorf("migrate: %s: %s", state.Status, state.Error)
		}
		return state.Status == "completed", err
	})
}

// counting waits until the guest's counter in the mailbox is seen to move, and
// tells when. It looks by reading the file: who looks at a mapping of a page
// that is not there yet makes one.
func (g *guest) counting(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var f *os.File
	if err := until(ctx, lookEvery, func() (found bool, err error) {
		f, err = g.ramFile()
		return err == nil, nil // it may not be there yet
	}); err != nil {
		return 0, fmt.Errorf("the guest's memory: %w", err)
	}
	defer f.Close()
	page, last := make([]byte, 32), uint64(0)
	var since time.Duration // of the changes in a row
	changes := 0
	if err := until(ctx, lookEvery, func() (bool, error) {
		if n, _ := f.ReadAt(page, probe.MailboxAddr); n < len(page) {
			return false, nil // the file has no length yet
		}
		counter := binary.NativeEndian.Uint64(page[probe.MailboxCounter:])
		switch {
		case last == 0 || counter == last:
			changes = 0
		case changes == 0:
			since = clock()
			fallthrough
		default:
			changes++
		}
		last = counter
		return changes == enoughChanges, nil
	}); err != nil {
		return 0, fmt.Errorf("the guest's first count: %w", err)
	}
	return since, nil
}

// enoughChanges in a row are the guest's counting, and not a page that is
// loaded more than once, as a file of QEMU's can have it.
const enoughChanges = 5

// lookEvery is how often it is looked whether the guest counts. The kernel adds
// some tens of microseconds.
const lookEvery = 50 * time.Microsecond

// touchMemory has so many MiB of free memory been used just before it is used for
// something that is measured. This host may be a virtual machine itself, whose memory comes and
// goes: whoever is the first to use it would pay for the others.
func touchMemory(size int) error {
	for _, advice := range []int{unix.MADV_NOHUGEPAGE, unix.MADV_HUGEPAGE} { // what the page cache takes in small pieces, and in large ones
		b, err := unix.Mmap(-1, 0, size*mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		_ = unix.Madvise(b, advice) // a kernel without huge pages has no large pieces either
		for at := 0; at < len(b); at += pageSize {
			b[at] = 1
		}
		if err := unix.Munmap(b); err != nil {
			return err
		}
	}
	return nil
}
