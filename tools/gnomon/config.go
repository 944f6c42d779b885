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
	if err := d.Decode(&values); err != nil {
		return fmt.Errorf("configuration %s: %w: write an object whose keys are flags of gnomon run, such as {\"kernel\": \"bzImage\", \"cpus\": 2}", path, err)
	}
	if d.More() {
		return fmt.Errorf("configuration %s: something follows the object", path)
	}
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		flag := flags.Lookup(key)
		if flag == nil || key == "config" || key == "help" {
			return fmt.Errorf("configuration %s: %q is not a flag of gnomon run", path, key)
		}
		if flag.Changed {
			continue
		}
		list, ok := values[key].([]any)
		if !ok {
			list = []any{values[key]}
		} else if _, repeats := flag.Value.(pflag.SliceValue); !repeats {
			return fmt.Errorf("configuration %s: %s takes one value, not a list", path, key)
		}
		for _, v := range list {
			switch v.(type) {
			case string, bool, json.Number:
			default:
				return fmt.Errorf("configuration %s: %s: a string, a number or true/false is needed", path, key)
			}
			if err := flags.Set(key, fmt.Sprint(v)); err != nil {
				return fmt.Errorf("configuration %s: %w", path, err)
			}
		}
	}
	return nil
}
