package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// saveCheckpoint makes a checkpoint of 16 pages, of which page 3 has a byte.
func saveCheckpoint(t *testing.T, path, parent string, b byte) {
	t.Helper()
	w, err := checkpoint.Create(path, checkpoint.CreateOptions{Memory: []guestmem.Range{{Size: 16 * guestmem.PageSize}}, Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	page := bytes.Repeat([]byte{b}, guestmem.PageSize)
	for _, err := range []error{w.Section("cpu0", 2, []byte(`{"rip":1}`)), w.Block([]uint64{3}, page), w.Commit()} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// checkpointCommand runs a subcommand of gnomon checkpoint.
func checkpointCommand(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := &cobra.Command{Use: "checkpoint", SilenceErrors: true, SilenceUsage: true}
	cmd.AddCommand(newCheckpointFileCommands()...)
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(context.Background())
	return out.String(), err
}

// checkpointJSON runs one with --output json.
func checkpointJSON(t *testing.T, args ...string) map[string]any {
	t.Helper()
	out, err := checkpointCommand(t, append(args, "--output", "json")...)
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	return v
}

func TestCheckpointFileCommands(t *testing.T) {
	dir := t.TempDir()
	parent, child, flat := filepath.Join(dir, "parent"), filepath.Join(dir, "child"), filepath.Join(dir, "flat")
	saveCheckpoint(t, parent, "", 1)
	saveCheckpoint(t, child, parent, 2)

	paths := map[string]bool{}
	jsonPaths("", checkpointJSON(t, "info", child), paths)
	for _, want := range []string{
		".chain[].file", ".chain[].id", ".chain[].parent", ".chain[].parent-id", ".chain[].file-bytes", ".chain[].memory-bytes",
		".chain[].blocks", ".chain[].block-bytes", ".chain[].data-pages", ".chain[].zero-pages", ".chain[].duplicate-pages",
		".chain[].sections", ".chain[].sections[].name", ".chain[].sections[].version", ".chain[].sections[].size",
	} {
		if !paths[want] {
			t.Errorf("info: %s is gone", want)
		}
	}
	if out, err := checkpointCommand(t, "info", child); err != nil || !strings.Contains(out, "parent (") || !strings.Contains(out, "cpu0 version 2") {
		t.Errorf("info: %q %v", out, err)
	}
	if v := checkpointJSON(t, "verify", child); v["good"] != true || len(v["files"].([]any)) != 2 || v["bytes"].(float64) < 8192 {
		t.Errorf("verify: %v", v)
	}
	if out, err := checkpointCommand(t, "extract", child, "--section", "cpu0"); err != nil || out != `{"rip":1}` {
		t.Errorf("section: %q %v", out, err)
	}
	raw := filepath.Join(dir, "raw")
	if _, err := checkpointCommand(t, "extract", child, "--to", raw); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(raw)
	want := make([]byte, 16*guestmem.PageSize)
	copy(want[3*guestmem.PageSize:], bytes.Repeat([]byte{2}, guestmem.PageSize))
	if err != nil || !bytes.Equal(b, want) {
		t.Errorf("memory: %d bytes, %v", len(b), err)
	}

	// A parent that another child needs is not deleted, and nothing is made.
	other := filepath.Join(dir, "other")
	saveCheckpoint(t, other, parent, 3)
	if _, err := checkpointCommand(t, "flatten", child, "--to", flat, "--delete-parents"); !errors.Is(err, checkpoint.ErrNeeded) || !strings.Contains(err.Error(), other) {
		t.Errorf("a parent that is needed: %v", err)
	}
	if _, err := os.Stat(flat); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was flattened: %v", err)
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	if v := checkpointJSON(t, "flatten", child, "--to", flat, "--delete-parents"); len(v["deleted"].([]any)) != 2 || v["file"] != flat {
		t.Errorf("flatten: %v", v)
	}
	if v := checkpointJSON(t, "verify", flat); len(v["files"].([]any)) != 1 {
		t.Errorf("verify: %v", v)
	}
	for _, gone := range []string{parent, child} {
		if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was not deleted: %v", gone, err)
		}
	}

	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"missing":        {[]string{"info", child}, "no such file"},
		"not one":        {[]string{"verify", raw}, "not a checkpoint"},
		"no --to":        {[]string{"extract", flat}, "no --to"},
		"no --to either": {[]string{"flatten", flat}, "no --to"},
		"there":          {[]string{"extract", flat, "--to", raw}, "exists"},
		"there, too":     {[]string{"flatten", flat, "--to", raw}, "exists"},
		"section":        {[]string{"extract", flat, "--section", "x"}, `no such section: "x"`},
		"output":         {[]string{"info", flat, "--output", "xml"}, "text and json"},
		"arguments":      {[]string{"verify"}, "arg"},
	} {
		if _, err := checkpointCommand(t, c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A checkpoint that is not good is told of in one object, and by the status.
func TestVerifyTellsInJSON(t *testing.T) {
	dir := t.TempDir()
	parent, child := filepath.Join(dir, "parent"), filepath.Join(dir, "child")
	saveCheckpoint(t, parent, "", 1)
	saveCheckpoint(t, child, parent, 2)
	good, err := os.ReadFile(parent)
	if err != nil {
		t.Fatal(err)
	}
	blocked := bytes.Clone(good)
	blocked[4100] ^= 1
	for name, c := range map[string]struct {
		parent []byte // nil: there is none
		files  int
		want   string
	}{
		"cut off": {good[:len(good)-1], 1, "damaged"},
		"damaged": {blocked, 2, "damaged"},
		"missing": {nil, 1, "missing"},
		"not one": {[]byte("a text"), 1, "not a checkpoint"},
	} {
		if err := errors.Join(os.Remove(parent), os.WriteFile(parent, c.parent, 0o600)); err != nil {
			t.Fatal(err)
		}
		if c.parent == nil {
			os.Remove(parent)
		}
		out, err := checkpointCommand(t, "verify", child, "--output", "json")
		if err == nil {
			t.Errorf("%s: it is good", name)
		}
		var v struct {
			Good  *bool
			Files []string
			Error string
		}
		d := json.NewDecoder(strings.NewReader(out))
		if err := d.Decode(&v); err != nil || v.Good == nil || *v.Good || len(v.Files) != c.files || !strings.Contains(v.Error, c.want) || !strings.Contains(v.Error, parent) || d.More() {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		if c.parent == nil {
			os.WriteFile(parent, nil, 0o600)
		}
	}
}

// A copy of a checkpoint needs the parents that the checkpoint itself does.
func TestFlattenBesideCopies(t *testing.T) {
	for name, link := range map[string]func(from, to string) error{
		"a copy": func(from, to string) error {
			b, err := os.ReadFile(from)
			return errors.Join(err, os.WriteFile(to, b, 0o600))
		},
		"a hard link": os.Link,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			saveCheckpoint(t, at("first"), "", 1)
			saveCheckpoint(t, at("second"), at("first"), 2)
			if err := link(at("second"), at("copy")); err != nil {
				t.Fatal(err)
			}
			_, err := checkpointCommand(t, "flatten", at("second"), "--to", at("flat"), "--delete-parents")
			if !errors.Is(err, checkpoint.ErrNeeded) || !strings.Contains(err.Error(), at("copy")) {
				t.Errorf("%v", err)
			}
			if _, err := checkpointCommand(t, "verify", at("copy")); err != nil {
				t.Errorf("the other is not whole any more: %v", err)
			}
			if err := os.Remove(at("copy")); err != nil {
				t.Fatal(err)
			}
			if _, err := checkpointCommand(t, "flatten", at("second"), "--to", at("flat"), "--delete-parents"); err != nil {
				t.Error(err)
			}
			// What was flattened has no parent: flattened again it is deleted, and its copy stays.
			if err := link(at("flat"), at("copy")); err != nil {
				t.Fatal(err)
			}
			if _, err := checkpointCommand(t, "flatten", at("flat"), "--to", at("again"), "--delete-parents"); err != nil {
				t.Error(err)
			}
			for _, whole := range []string{"again", "copy"} {
				if _, err := checkpointCommand(t, "verify", at(whole)); err != nil {
					t.Errorf("%s: %v", whole, err)
				}
			}
			if _, err := checkpointCommand(t, "flatten", at("copy"), "--to", at("copy"), "--delete-parents"); err == nil || !strings.Contains(err.Error(), "exists") {
				t.Errorf("to itself: %v", err)
			}
		})
	}
}

func TestCheckpointOfNoParent(t *testing.T) {
	cmd := newCheckpointCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"no-such-machine", "--to", filepath.Join(t.TempDir(), "c"), "--parent", ""})
	if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "leave out --parent") || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
}
