package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Whatever the header has, and wherever the power fails, it names the old backing file or
// the new one, and keeps its other extensions.
func TestRenameIsAtomic(t *testing.T) {
	headers := map[string]func(cluster int64) []byte{
		"ours": func(cluster int64) []byte {
			b, err := (&CreateOptions{Size: 1 << 20, ClusterSize: cluster, Backing: "first", BackingFormat: "raw"}).encode()
			if err != nil {
				t.Fatal(err)
			}
			return b[:cluster]
		},
		"version 2": func(cluster int64) []byte {
			b, err := (&CreateOptions{Size: 1 << 20, ClusterSize: cluster, Version: 2, Backing: "first", BackingFormat: "raw"}).encode()
			if err != nil {
				t.Fatal(err)
			}
			return b[:cluster]
		},
		"QEMU's": func(cluster int64) []byte {
			path := filepath.Join(t.TempDir(), "image")
			qemuImg(t, "create", "-q", "-u", "-f", "qcow2", "-b", strings.Repeat("x", 200), "-F", "raw", "-o", fmt.Sprintf("cluster_size=%d", cluster), path, "1M")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			return b[:cluster]
		},
	}
	headers["no format"] = func(cluster int64) []byte {
		b := headers["QEMU's"](cluster)
		at := bytes.Index(b, binary.BigEndian.AppendUint32(nil, extBackingFormat))
		binary.BigEndian.PutUint32(b[at:], 0x12345678) // an extension that nobody knows
		return b
	}
	r := rand.New(rand.NewPCG(1, 2))
	for _, kind := range slices.Sorted(maps.Keys(headers)) {
		for _, cluster := range []int64{512, 1024, 2048, 4096, 64 << 10} {
			if cluster < 1024 && kind != "ours" && kind != "version 2" {
				continue
			}
			first := headers[kind](cluster)
			unsafe := 0
			for i := range 200 {
				name, format := strings.Repeat("y", 1+r.IntN(200)), []string{"raw", "qcow2"}[r.IntN(2)]
				if r.IntN(5) == 0 {
					name = ""
				}
				old, err := ParseHeader(first)
				if err != nil {
					t.Fatal(err)
				}
				b, at, err := withBacking(first, name, format)
				if err != nil {
					if cluster > 1024 {
						t.Fatalf("%s, %d: %d bytes: %v", kind, cluster, len(name), err)
					}
					continue
				}
				is := func(when string, b []byte, name, format string) {
					t.Helper()
					h, err := ParseHeader(b)
					if err != nil {
						t.Fatalf("%s, %d, rename %d, %s: %v", kind, cluster, i, when, err)
					}
					if h.BackingFile != name || name != "" && h.BackingFormat != format {
						t.Fatalf("%s, %d, rename %d, %s: it lies on %q, in %q, and not on %q, in %q", kind, cluster, i, when, h.BackingFile, h.BackingFormat, name, format)
					}
					if !maps.Equal(h.featureNames, old.featureNames) {
						t.Fatalf("%s, %d, rename %d, %s: names of features are %v", kind, cluster, i, when, h.featureNames)
					}
				}
				is("all", b, name, format)
				if at < 0 {
					unsafe++
				} else {
					// Sectors of what is written are there, or not.
					torn := bytes.Clone(first)
					tear := func(from, to int) {
						for from < to {
							end := min(from/sector*sector+sector, to)
							if r.IntN(2) == 0 {
								copy(torn[from:end], b[from:end])
							}
							from = end
						}
					}
					tear(at, at+len(name))
					is("part of the name", torn, old.BackingFile, old.BackingFormat)
					copy(torn[at:], b[at:at+len(name)])
					is("the name", torn, old.BackingFile, old.BackingFormat)
					copy(torn, b[:sector])
					is("the first sector", torn, name, format)
					tear(sector, len(b))
					is("part of the rest", torn, name, format)
				}
				first = b
			}
			if unsafe > 1 && cluster >= 2048 || unsafe > 0 && cluster >= 2048 && kind != "no format" {
				t.Errorf("%s, clusters of %d bytes: %d of 200 are not safe", kind, cluster, unsafe)
			}
		}
	}
}
