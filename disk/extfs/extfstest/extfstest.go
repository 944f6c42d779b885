// Package extfstest makes ext file systems for tests, and tells what is in them,
// by e2fsprogs.
package extfstest

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Run runs one of e2fsprogs' programs, which live where only root looks.
func Run(t testing.TB, stdin, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME=1700000000", "MKE2FS_DEVICE_PHYS_SECTSIZE=512")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return string(out)
}

// Modern are the features that an ext4 usually has.
const Modern = "has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize,sparse_super,large_file,filetype"

// Make makes a file of size bytes and a file system in it.
func Make(t testing.TB, size int64, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs")
	Sparse(t, path, size)
	Run(t, "", "mke2fs", append(append([]string{"-q", "-F"}, args...), path)...)
	return path
}

// Sparse makes an empty file of size bytes.
func Sparse(t testing.TB, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// Populate writes files of random sizes into a file system, and deletes some.
func Populate(t testing.TB, path string, files int, largest int64, seed uint64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	dir := t.TempDir()
	var script strings.Builder
	for i := range files {
		host := filepath.Join(dir, strconv.Itoa(i))
		content := make([]byte, rng.Int64N(largest)+1)
		rand.NewChaCha8([32]byte{byte(i)}).Read(content)
		if err := os.WriteFile(host, content, 0o600); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&script, "write %s f%d\n", host, i)
		if i%7 == 3 {
			fmt.Fprintf(&script, "mkdir d%d\n", i)
		}
	}
	for i := range files {
		if rng.IntN(2) == 0 {
			fmt.Fprintf(&script, "rm f%d\n", i)
		}
	}
	Run(t, script.String(), "debugfs", "-w", "-f", "-", path)
}

// Extent is a run of bytes.
type Extent struct{ Start, End int64 }

var (
	blockSizeLine = regexp.MustCompile(`(?m)^Block size:\s+(\d+)`)
	blockCount    = regexp.MustCompile(`(?m)^Block count:\s+(\d+)`)
	superLine     = regexp.MustCompile(`(?m)^  (?:Primary|Backup) superblock at (\d+)`)
	clusterLine   = regexp.MustCompile(`(?m)^Cluster size:\s+(\d+)`)
)

// Superblocks are the blocks that dumpe2fs says the superblock and its backups are in.
func Superblocks(t testing.TB, path string) (blocks []int64) {
	t.Helper()
	for _, found := range superLine.FindAllStringSubmatch(Run(t, "", "dumpe2fs", path), -1) {
		n, err := strconv.ParseInt(found[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		blocks = append(blocks, n)
	}
	return blocks
}

// Free is what dumpe2fs says is free.
func Free(t testing.TB, path string) []Extent {
	t.Helper()
	out := Run(t, "", "dumpe2fs", path)
	number := func(re *regexp.Regexp) int64 {
		n, err := strconv.ParseInt(re.FindStringSubmatch(out)[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	blockSize, blocks := number(blockSizeLine), number(blockCount)
	// With bigalloc a range ends with the first block of its last cluster.
	last := int64(1)
	if clusterLine.MatchString(out) {
		last = number(clusterLine) / blockSize
	}
	var free []Extent
	lines := bufio.NewScanner(strings.NewReader(out))
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		list, ok := strings.CutPrefix(lines.Text(), "  Free blocks: ")
		if !ok {
			continue
		}
		for run := range strings.SplitSeq(list, ", ") {
			if run == "" {
				continue
			}
			from, to, isRange := strings.Cut(run, "-")
			if !isRange {
				to = from
			}
			a, err1 := strconv.ParseInt(from, 10, 64)
			b, err2 := strconv.ParseInt(to, 10, 64)
			if err1 != nil || err2 != nil {
				t.Fatalf("dumpe2fs: %q", lines.Text())
			}
			e := Extent{a * blockSize, min(b+last, blocks) * blockSize}
			if n := len(free); n > 0 && free[n-1].End == e.Start {
				free[n-1].End = e.End
				continue
			}
			free = append(free, e)
		}
	}
	if len(free) == 0 && !strings.Contains(out, "Free blocks:") {
		t.Fatalf("dumpe2fs tells no free blocks:\n%s", out)
	}
	return free
}
