package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"sort"

	"github.com/spf13/pflag"
)

// applyConfig sets flags from a JSON file: an object whose keys are flag names
// and whose values are strings, numbers, booleans, or lists of strings for
// flags that can be repeated. Flags set on the command line stay.
func applyConfig(flags *pflag.FlagSet, path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var values map[string]any
	bad := func(format string, args ...any) error {
		return usageError(fmt.Errorf("configuration %s: %w", path, fmt.Errorf(format, args...)))
	}
	if err := d.Decode(&values); err != nil {
		return bad("%w: write an object whose keys are flags of gnomon run, such as {\"kernel\": \"bzImage\", \"cpus\": 2}", err)
	}
	if d.More() {
		return bad("something follows the object")
	}
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		flag := flags.Lookup(key)
		if flag == nil || key == "config" || key == "help" {
			return bad("%q is not a flag of gnomon run", key)
		}
		if flag.Changed {
			continue
		}
		list, ok := values[key].([]any)
		if !ok {
			list = []any{values[key]}
		} else if _, repeats := flag.Value.(pflag.SliceValue); !repeats {
			return bad("%s takes one value, not a list", key)
		}
		for _, v := range list {
			switch v.(type) {
			case string, bool, json.Number:
			default:
				return bad("%s: a string, a number or true/false is needed", key)
			}
			if err := flags.Set(key, fmt.Sprint(v)); err != nil {
				return bad("%w", err)
			}
		}
	}
	return nil
}
