package tests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

const (
	survivorSize  = 8 << 20
	survivorBlock = 4 << 10
	roundBytes    = 4 * survivorBlock // what a guest writes between two flushes
)

// survivor is a disk that lives through many deaths of what works on it. Whatever is
// written has a seed of its own, so that each of its blocks tells by which write it
// is.
type survivor struct {
	t      *testing.T
	ctx    context.Context
	dir    string
	path   string // of the image that is the disk
	random *rand.Rand
	files  int
	seed   uint64   // the last that was used
	blocks []uint64 // the seed of what each holds; 0: zeroes

	flushed int // what guests told of while they were about to be killed
}

// write is one of a block.
type write struct {
	seed  uint64
	block int64
}

func newSurvivor(ctx context.Context, t *testing.T, seed uint64) *survivor {
	s := &survivor{t: t, ctx: ctx, dir: t.TempDir(), random: rand.New(rand.NewPCG(seed, 1)), blocks: make([]uint64, survivorSize/survivorBlock)}
	s.begin()
	return s
}

// begin makes another disk.
func (s *survivor) begin() {
	s.path = s.file()
	s.must(qcow2.Create(s.path, qcow2.CreateOptions{Size: survivorSize, ClusterSize: survivorBlock}))
	clear(s.blocks)
	s.fill()
}

// file is a name that no image has had.
func (s *survivor) file() string {
	s.files++
	return filepath.Join(s.dir, fmt.Sprintf("%d.qcow2", s.files))
}

func (s *survivor) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// chain is the images of which the disk consists, the newest first.
func (s *survivor) chain() (images []string) {
	n, err := disk.Open(s.path, disk.Options{ReadOnly: true})
	s.must(err)
	defer n.Close()
	info := n.Info()
	for i := &info; i != nil; i = i.Backing {
		images = append(images, i.Filename)
	}
	return images
}

// grow has the disk consist of so many images, of which the newest hold something.
func (s *survivor) grow(images int) {
	for have := len(s.chain()); have < images; have++ {
		overlay := s.file()
		s.must(qcow2.Create(overlay, qcow2.CreateOptions{Size: survivorSize, ClusterSize: survivorBlock, Backing: s.path, BackingFormat: "qcow2"}))
		s.path = overlay
		s.fill()
	}
}

// fill writes blocks everywhere on the disk.
func (s *survivor) fill() {
	n, err := disk.Open(s.path, disk.Options{})
	s.must(err)
	data := make([]byte, survivorBlock)
	for range len(s.blocks) / 4 {
		s.seed++
		b := s.random.Int64N(int64(len(s.blocks)))
		probe.Pattern(data, s.seed, uint64(b*survivorBlock))
		s.must(n.Writev([][]byte{data}, b*survivorBlock))
		s.blocks[b] = s.seed
	}
	s.must(n.Close())
}

// guestRounds is how many a guest may be ahead of what it has told.
const guestRounds = 64

// words have a guest write rounds of random blocks, with the seeds from first on.
func (s *survivor) words() (words string, first, order uint64) {
	first, order = s.seed+1, s.random.Uint64()>>1
	return fmt.Sprintf("blk op=randwrite qd=4 total=%d span=%d rounds=1000000 flush=1 seed=%d order=%d", roundBytes, survivorSize, first, order), first, order
}

// rounds are what the words had a guest write.
func (s *survivor) rounds(first, order uint64, n int) (all []write) {
	for i := range n {
		for range roundBytes / survivorBlock {
			all = append(all, write{first + uint64(i), int64(probe.Random(&order) % uint64(len(s.blocks)))})
		}
	}
	s.seed = first + uint64(n)
	return all
}

// sound tells what is wrong with an image, but for leaked clusters.
func (s *survivor) sound(path string) error {
	cmd := exec.CommandContext(s.ctx, "qemu-img", "check", "-q", path)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 3 {
		return fmt.Errorf("qemu-img check %s: %w: %s", path, err, out)
	}
	return nil
}

// holds tells whether the disk at path is sound and holds what it did, the first
// writes, and of the later ones any. Then that is what it holds from now on.
func (s *survivor) holds(path string, writes []write, durable int) error {
	if err := s.sound(path); err != nil {
		return err
	}
	n, err := disk.Open(path, disk.Options{})
	if err != nil {
		return err
	}
	data := make([]byte, survivorSize)
	err = errors.Join(n.Readv([][]byte{data}, 0), n.Close())
	if err != nil {
		return err
	}
	possible := make([][]uint64, len(s.blocks))
	for b, seed := range s.blocks {
		possible[b] = []uint64{seed}
	}
	for i, w := range writes {
		if i < durable {
			possible[w.block] = possible[w.block][:0]
		}
		possible[w.block] = append(possible[w.block], w.seed)
	}
	found, want := make([]uint64, len(s.blocks)), make([]byte, survivorBlock)
blocks:
	for b := range found {
		got := data[b*survivorBlock:][:survivorBlock]
		for _, seed := range possible[b] {
			clear(want)
			if seed != 0 {
				probe.Pattern(want, seed, uint64(b*survivorBlock))
			}
			if bytes.Equal(got, want) {
				found[b] = seed
				continue blocks
			}
		}
		return fmt.Errorf("%s: block %d is none of the writes %v", path, b, possible[b])
	}
	s.path, s.blocks = path, found
	return nil
}

// window is the time within which something is killed: about half of it is done by
// then.
type window struct {
	time.Duration
	complete, partial int
}

func newWindow() *window { return &window{Duration: 20 * time.Millisecond} }

func (w *window) random(r *rand.Rand) time.Duration {
	return time.Duration(r.Int64N(int64(w.Duration)))
}

func (w *window) count(complete bool) {
	if complete {
		w.complete++
		w.Duration = max(w.Duration*8/10, 100*time.Microsecond)
		return
	}
	w.partial++
	if w.Duration = w.Duration * 10 / 8; w.complete == 0 {
		w.Duration = w.Duration * 8 / 5 // on a slow host it starts far off
	}
}

// spread tells that not all kills came too early or too late.
func (w *window) spread(t *testing.T) {
	t.Helper()
	t.Logf("%d were complete, %d were not; killed within %s at last", w.complete, w.partial, w.Duration)
	if w.complete == 0 || w.partial == 0 {
		t.Errorf("%d were complete and %d were not: the kills were not spread", w.complete, w.partial)
	}
}

// sweep removes what does not belong to the disk: images that are sound, and what was
// never an image.
func (s *survivor) sweep() {
	chain := s.chain()
	files, err := os.ReadDir(s.dir)
	s.must(err)
	files = slices.DeleteFunc(files, func(f os.DirEntry) bool { return slices.Contains(chain, filepath.Join(s.dir, f.Name())) })
	for _, f := range files {
		if !strings.HasPrefix(f.Name(), ".") {
			s.must(s.sound(filepath.Join(s.dir, f.Name())))
		}
	}
	for _, f := range files {
		s.must(os.Remove(filepath.Join(s.dir, f.Name())))
	}
}

// guestFailed is what a guest says that cannot write.
var guestFailed = regexp.MustCompile("failed=[1-9]|probe: (error|fault)")

// machineJob is one that works on a disk in use.
type machineJob struct {
	name   string
	images int // that the disk consists of at first
	kills  int
	// run does the job, until it is done or a command fails.
	run func(m *killedMachine) error
}

// killedMachine is a machine that is about to be killed.
type killedMachine struct {
	*survivor
	process *process
	events  <-chan client.Event
	turn    int
	images  []string // of the disk, the newest first
	may     []string // that the disk may be, more likely the later
}

// do runs a command.
func (m *killedMachine) do(name string, args map[string]any) error {
	return m.process.qmp.Execute(m.ctx, name, args, nil)
}

// await waits for an event.
func (m *killedMachine) await(name string) error {
	for e := range m.events {
		switch {
		case e.Event == name && e.Data["error"] == nil:
			return nil
		case e.Event == name, e.Event == "BLOCK_JOB_COMPLETED":
			return fmt.Errorf("%s: %v", e.Event, e.Data["error"])
		}
	}
	return errors.New("the machine ended")
}

// job runs a job that ends by itself.
func (m *killedMachine) job(command string, args map[string]any) error {
	args["device"], args["job-id"] = "disk0", "job"
	if err := m.do(command, args); err != nil {
		return err
	}
	return m.await("BLOCK_JOB_COMPLETED")
}

// moveJob runs a job after which the disk is another image.
func (m *killedMachine) moveJob(to, command string, args map[string]any) error {
	args["device"], args["job-id"] = "disk0", "job"
	if err := m.do(command, args); err != nil {
		return err
	}
	if err := m.await("BLOCK_JOB_READY"); err != nil {
		return err
	}
	m.may = append(m.may, to)
	if err := m.do("job-complete", map[string]any{"id": "job"}); err != nil {
		return err
	}
	if err := m.await("BLOCK_JOB_COMPLETED"); err != nil {
		return err
	}
	m.may = []string{to}
	return nil
}

// add makes an image and adds it as a node.
func (m *killedMachine) add(path string) error {
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: survivorSize, ClusterSize: survivorBlock}); err != nil {
		return err
	}
	return m.do("blockdev-add", map[string]any{"driver": "qcow2", "node-name": "target", "file": map[string]any{"driver": "file", "filename": path}})
}

var machineJobs = []machineJob{
	{"block-commit", 3, 20, func(m *killedMachine) error {
		return m.moveJob(m.path, "block-commit", map[string]any{}) // an empty overlay by the old name
	}},
	{"block-commit of a lower image", 4, 20, func(m *killedMachine) error {
		return m.job("block-commit", map[string]any{"top": m.images[1], "base": m.images[2]})
	}},
	{"block-stream", 3, 20, func(m *killedMachine) error {
		args := map[string]any{}
		if m.turn%2 == 1 {
			args["base"] = m.images[2]
		}
		return m.job("block-stream", args)
	}},
	{"mirror", 1, 20, func(m *killedMachine) error {
		target := m.file()
		if m.turn%2 == 0 {
			return m.moveJob(target, "drive-mirror", map[string]any{"target": target, "sync": "full", "format": "qcow2"})
		}
		if err := m.add(target); err != nil {
			return err
		}
		return m.moveJob(target, "blockdev-mirror", map[string]any{"target": "target", "sync": "full"})
	}},
	{"backup", 2, 20, func(m *killedMachine) error {
		target := m.file()
		if m.turn%2 == 0 {
			return m.job("drive-backup", map[string]any{"target": target, "sync": "full", "format": "qcow2"})
		}
		if err := m.add(target); err != nil {
			return err
		}
		return m.job("blockdev-backup", map[string]any{"target": "target", "sync": "full"})
	}},
	{"blockdev-snapshot-sync", 1, 20, func(m *killedMachine) error {
		for range 4 {
			overlay := m.file()
			m.may = append(m.may, overlay)
			if err := m.do("blockdev-snapshot-sync", map[string]any{"device": "disk0", "snapshot-file": overlay, "format": "qcow2"}); err != nil {
				return err
			}
			m.may = []string{overlay}
		}
		return nil
	}},
	{"block_resize", 1, 20, func(m *killedMachine) error {
		for range 8 {
			if err := m.do("block_resize", map[string]any{"device": "disk0", "size": survivorSize + m.random.Int64N(survivorSize)}); err != nil {
				return err
			}
		}
		return nil
	}},
}

// A machine that is killed at any time of a job on its disk leaves a disk that opens,
// with all that the guest had flushed, on which the job can begin again.
func TestKilledJobs(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	for i, j := range machineJobs {
		t.Run(j.name, func(t *testing.T) {
			s, w := newSurvivor(ctx, t, uint64(i)), newWindow()
			for turn := range j.kills {
				if len(s.chain()) > 5 {
					s.begin()
				}
				s.grow(j.images)
				w.count(s.killMachine(kernel, j, turn, w.random(s.random)))
				s.sweep()
			}
			w.spread(t)
			t.Logf("guests flushed %d times meanwhile", s.flushed)
			if s.flushed == 0 {
				t.Error("no guest wrote anything meanwhile")
			}
		})
	}
}

// killMachine starts a machine, has it do a job while its guest writes, kills it
// after a time, and looks at what it left. It tells whether the job was done.
func (s *survivor) killMachine(kernel string, j machineJob, turn int, after time.Duration) bool {
	t := s.t
	images := s.chain()
	words, first, order := s.words()
	p, serial := launch(t, "--kernel", kernel, "--append", words, "--memory", "32M", "--net", "none", "--disk", "file="+s.path)
	said := readUntil(serial, "failed=0")
	p.connect(s.ctx, t)
	m := &killedMachine{survivor: s, process: p, events: p.qmp.Subscribe(s.ctx), turn: turn, images: images, may: []string{s.path}}
	rest := make(chan string)
	go func() {
		b, _ := io.ReadAll(serial)
		rest <- string(b)
	}()
	var killed atomic.Bool
	time.AfterFunc(after, func() {
		killed.Store(true)
		p.Process.Kill()
	})
	err := j.run(m)
	early := err != nil && !killed.Load()
	<-p.stopped
	more := <-rest
	durable := strings.Count(said+more, "failed=0")
	if early || !killed.Load() || durable == 0 || guestFailed.MatchString(said+more) {
		t.Fatalf("turn %d: %v, %v\n%s%s", turn, err, p.err, said, more)
	}
	s.flushed += strings.Count(more, "failed=0")
	writes := s.rounds(first, order, durable+guestRounds)
	var problems error
	for _, path := range slices.Backward(m.may) {
		problem := s.holds(path, writes, durable*roundBytes/survivorBlock)
		if problem == nil {
			return err == nil
		}
		problems = errors.Join(problems, problem)
	}
	t.Fatalf("turn %d: %v; the guest had flushed %d times: %v", turn, err, durable, problems)
	return false
}

// toolJob is a command that works on a disk which no machine uses.
type toolJob struct {
	name   string
	images int
	kills  int
	args   func(s *survivor, images []string) []string
	// same are two images that hold the same once it is done.
	same func(images, args []string) (a, b string)
}

var toolJobs = []toolJob{
	{
		"convert", 3, 15, func(s *survivor, images []string) []string { return []string{"convert", images[0], s.file()} },
		func(_, args []string) (a, b string) { return args[1], args[2] },
	},
	{
		"commit", 3, 15, func(_ *survivor, images []string) []string { return []string{"commit", images[0]} },
		func(images, _ []string) (a, b string) { return images[0], images[1] },
	},
	{
		"rebase", 4, 15, func(s *survivor, images []string) []string {
			base := []string{"", images[2], images[3]}[s.random.IntN(3)]
			return []string{"rebase", images[0], "-b", base, "-F", "qcow2"}
		}, nil,
	},
	{
		"resize", 1, 15, func(s *survivor, images []string) []string {
			return []string{"resize", "--shrink", images[0], fmt.Sprint(survivorSize + s.random.Int64N(survivorSize))}
		}, nil,
	},
	{
		"commit -b", 4, 15, func(s *survivor, images []string) []string {
			return []string{"commit", images[0], "-b", images[2+s.random.IntN(len(images)-2)]}
		},
		func(_, args []string) (a, b string) { return args[1], args[3] },
	},
}

// A command on a disk that is killed at any time leaves the disk with all that it
// held, and can begin again.
func TestKilledDiskCommands(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for i, j := range toolJobs {
		t.Run(j.name, func(t *testing.T) {
			s, w := newSurvivor(ctx, t, uint64(100+i)), newWindow()
			for turn := range j.kills {
				s.grow(j.images)
				s.fill()
				images := s.chain()
				args := j.args(s, images)
				cmd := exec.Command(gnomon, append([]string{"disk"}, args...)...)
				var stderr strings.Builder
				cmd.Stderr = &stderr
				s.must(cmd.Start())
				timer := time.AfterFunc(w.random(s.random), func() { cmd.Process.Kill() })
				err := cmd.Wait()
				timer.Stop()
				if err != nil && cmd.ProcessState.ExitCode() != -1 {
					t.Fatalf("turn %d: %v: %v: %s", turn, args, err, &stderr)
				}
				if err := s.holds(s.path, nil, 0); err != nil {
					t.Fatalf("turn %d: %v: %v", turn, args, err)
				}
				for _, image := range images {
					if err := s.sound(image); err != nil {
						t.Fatalf("turn %d: %v: %v", turn, args, err)
					}
				}
				if err == nil && j.same != nil {
					a, b := j.same(images, args)
					qemuImg(ctx, t, "compare", "-q", a, b)
				}
				w.count(err == nil)
				s.sweep()
			}
			w.spread(t)
		})
	}
}
