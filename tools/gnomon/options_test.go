package main

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]uint64{
		"64": 64 << 20, "64M": 64 << 20, "64m": 64 << 20, "64MiB": 64 << 20, "2G": 2 << 30, "1T": 1 << 40, "4k": 4096, "512B": 512,
		"1.5G": 3 << 29, "0x10": 16 << 20, "0x1bk": 27 << 10, "0.25k": 256, "1.": 1 << 20, "1.0b": 1, "2P": 2 << 50, "0": 0,
	} {
		if got, err := parseSize(text, 1<<20); err != nil || got != want {
			t.Errorf("%s: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "M", "12X", "-1", "1.5B", ".5G", "0x", "0x1.8", "1e3", "1,5", "5E", "1..5G", "1MM", "99999999999999999999", "9999999999T", "1 G"} {
		if got, err := parseSize(text, 1<<20); err == nil {
			t.Errorf("%q is %d bytes", text, got)
		}
	}
}

func TestParseOptions(t *testing.T) {
	o, err := parseOptions("disk", "file=a,,b=c,readonly=on", "file", "readonly")
	if err != nil || !maps.Equal(o.values, map[string]string{"file": "a,b=c", "readonly": "on"}) {
		t.Errorf("%v, %v", o, err)
	}
	for text, why := range map[string]string{
		"":                "not key=value",
		"file":            "not key=value",
		"file=a,file=b":   "twice",
		"file=a,colour=b": "no \"colour\"",
		"file=a,":         "not key=value",
	} {
		if _, err := parseOptions("disk", text, "file"); err == nil || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "--disk") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestConfigFile(t *testing.T) {
	apply := func(text string, args ...string) (*pflag.FlagSet, error) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "vm.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		flags := newRunCommand().Flags()
		if err := flags.Parse(args); err != nil {
			t.Fatal(err)
		}
		return flags, applyConfig(flags, path)
	}
	flags, err := apply(`{"kernel": "k", "cpus": 3, "paused": true, "memory": 512, "disk": ["file=a", "file=b"], "net": "none"}`,
		"--cpus", "2", "--net", "user")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]any{}
	for _, name := range []string{"kernel", "cpus", "paused", "memory"} {
		got[name] = flags.Lookup(name).Value.String()
	}
	for _, name := range []string{"disk", "net"} {
		got[name] = flags.Lookup(name).Value.(pflag.SliceValue).GetSlice()
	}
	want := map[string]any{
		"kernel": "k", "cpus": "2", "paused": "true", "memory": "512",
		"disk": []string{"file=a", "file=b"}, "net": []string{"user"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, text := range []string{
		``, `[]`, `{"kernel": "k"} {}`, `{"kernle": "k"}`, `{"config": "x"}`, `{"help": true}`,
		`{"cpus": "many"}`, `{"cpus": [1, 2]}`, `{"kernel": null}`, `{"kernel": {}}`, `{"disk": [["file=a"]]}`,
	} {
		if _, err := apply(text); err == nil || !strings.Contains(err.Error(), "vm.json") {
			t.Errorf("%s: %v", text, err)
		}
	}
}
