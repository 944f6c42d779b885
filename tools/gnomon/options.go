package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// options are the key=value list of a flag such as --disk. As in QEMU, a comma
// in a value is written twice.
type options struct {
	flag   string
	text   string
	values map[string]string
}

// parseOptions reads a list that may hold the given keys, each once.
func parseOptions(flag, text string, keys ...string) (*options, error) {
	o := &options{flag: flag, text: text, values: map[string]string{}}
	const comma = "\x00" // no argument holds it
	for _, part := range strings.Split(strings.ReplaceAll(text, ",,", comma), ",") {
		key, value, ok := strings.Cut(strings.ReplaceAll(part, comma, ","), "=")
		switch {
		case !ok:
			return nil, o.errorf("%q is not key=value; keys are %s", part, strings.Join(keys, ", "))
		case !slices.Contains(keys, key):
			return nil, o.errorf("there is no %q; keys are %s", key, strings.Join(keys, ", "))
		case o.has(key):
			return nil, o.errorf("%s is given twice", key)
		}
		o.values[key] = value
	}
	return o, nil
}

// String writes the list as parseOptions reads it.
func (o *options) String() string {
	var parts []string
	for _, key := range slices.Sorted(maps.Keys(o.values)) {
		parts = append(parts, key+"="+strings.ReplaceAll(o.values[key], ",", ",,"))
	}
	return strings.Join(parts, ",")
}

func (o *options) errorf(format string, args ...any) error {
	return fmt.Errorf("--%s %s: %s", o.flag, o.text, fmt.Sprintf(format, args...))
}

func (o *options) has(key string) bool {
	_, ok := o.values[key]
	return ok
}

// need returns a value that must be there.
func (o *options) need(key string) (string, error) {
	v := o.values[key]
	if v == "" {
		return "", o.errorf("%s= is missing", key)
	}
	return v, nil
}

// onOff returns a switch, off where it is not given.
func (o *options) onOff(key string) (bool, error) {
	switch o.values[key] {
	case "", "off":
		return false, nil
	case "on":
		return true, nil
	}
	return false, o.errorf("%s=%s: on and off are possible", key, o.values[key])
}

// number returns a number from low to high, or absent.
func (o *options) number(key string, absent, low, high uint64) (uint64, error) {
	v, ok := o.values[key]
	if !ok {
		return absent, nil
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil || n < low || n > high {
		return 0, o.errorf("%s=%s: %d to %d are possible", key, v, low, high)
	}
	return n, nil
}

// oneOf returns one of the choices, or absent.
func (o *options) oneOf(key, absent string, choices ...string) (string, error) {
	v, ok := o.values[key]
	if !ok {
		return absent, nil
	}
	if !slices.Contains(choices, v) {
		return "", o.errorf("%s=%s: %s are possible", key, v, strings.Join(choices, ", "))
	}
	return v, nil
}

// flagError says of a flag's value that cannot be right what is possible, where
// that is a number or a switch.
func flagError(err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return err
	}
	flag := invalid.GetFlag()
	var why string
	switch flag.Value.Type() {
	case "int":
		why = "a whole number is needed"
		if errors.Is(err, strconv.ErrRange) {
			why = "the number is too large"
		}
	case "bool":
		why = "true and false are possible"
	case formatType:
		why = "raw and qcow2 are possible"
	default:
		return err
	}
	return fmt.Errorf("--%s %s: %s", flag.Name, invalid.GetValue(), why)
}
