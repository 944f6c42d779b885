package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"

	"github.com/spf13/pflag"
)

// applyConfig sets flags from a JSON file: an object whose keys are flag names
// and whose values are strings, numbers, booleans, or lists of strings for
// flags that can be repeated. Flags set on the command line stay.
func applyConfig(flags *pflag.FlagSet, path string) error {
	raw, err := readConfig(path)
	if err != nil {
		return err
	}
	if err := applyValues(flags, raw); err != nil {
		return usageError(fmt.Errorf("configuration %s: %w", path, flagError(err)))
	}
	return nil
}

// notAnObject says why a text was not read as a JSON object.
func notAnObject(err error) string {
	var syntax *json.SyntaxError
	switch {
	case errors.Is(err, io.EOF):
		return "it is empty"
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "it ends too early"
	case errors.As(err, &syntax):
		return fmt.Sprintf("at byte %d: %v", syntax.Offset, err)
	}
	return "it is not an object"
}

// applyValues sets the flags that a JSON object names and that are not set yet.
func applyValues(flags *pflag.FlagSet, object []byte) error {
	d := json.NewDecoder(bytes.NewReader(object))
	d.UseNumber()
	var values map[string]any
	if err := d.Decode(&values); err != nil || values == nil {
		return fmt.Errorf("%s: write an object whose keys are flags of gnomon run, such as {\"kernel\": \"bzImage\", \"cpus\": 2}", notAnObject(err))
	}
	if d.More() {
		return errors.New("something follows the object")
	}
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		flag := flags.Lookup(key)
		if flag == nil || key == "config" || key == "help" {
			return fmt.Errorf("%q is not a flag of gnomon run", key)
		}
		if flag.Changed {
			continue
		}
		list, ok := values[key].([]any)
		if !ok {
			list = []any{values[key]}
		} else if _, repeats := flag.Value.(pflag.SliceValue); !repeats {
			return fmt.Errorf("%s takes one value, not a list", key)
		}
		for _, v := range list {
			switch v.(type) {
			case string, bool, json.Number:
			default:
				return fmt.Errorf("%s: a string, a number or true/false is needed", key)
			}
			if err := flags.Set(key, fmt.Sprint(v)); err != nil {
				return err
			}
		}
	}
	return nil
}

// valuesOf is what applyValues sets flags from to have them as they are now,
// those named in without left out.
func valuesOf(flags *pflag.FlagSet, without ...string) ([]byte, error) {
	values := map[string]any{}
	flags.VisitAll(func(f *pflag.Flag) {
		if slices.Contains(without, f.Name) {
			return
		}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values[f.Name] = list.GetSlice()
			return
		}
		values[f.Name] = f.Value.String()
	})
	return json.Marshal(values)
}
