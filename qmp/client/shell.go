package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrSyntax means a command line that ParseCommand does not understand.
var ErrSyntax = errors.New("bad QMP command line")

// ParseCommand turns words as QEMU's qmp-shell takes them into a command in JSON: the command's name, then KEY=VALUE.
// A key with dots, a.b.c, is that of an object within objects. A value is an integer, true or false, JSON where it begins
// with one of { [ ", and a string otherwise. A line that is JSON altogether is passed on.
func ParseCommand(words []string) ([]byte, error) {
	if len(words) == 0 || words[0] == "" {
		return nil, fmt.Errorf("%w: the name of a command is missing", ErrSyntax)
	}
	if strings.HasPrefix(words[0], "{") {
		line := strings.Join(words, " ")
		if !json.Valid([]byte(line)) {
			return nil, fmt.Errorf("%w: %s is not JSON", ErrSyntax, line)
		}
		return []byte(line), nil
	}
	args := map[string]any{}
	for _, word := range words[1:] {
		key, text, ok := strings.Cut(word, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("%w: expected KEY=VALUE, got %q", ErrSyntax, word)
		}
		value, err := parseValue(text)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrSyntax, key, err)
		}
		if err := setPath(args, key, value); err != nil {
			return nil, err
		}
	}
	command := request{Execute: words[0]}
	if len(args) > 0 {
		command.Arguments = args
	}
	return json.Marshal(command)
}

func setPath(into map[string]any, key string, value any) error {
	path := strings.Split(key, ".")
	for _, name := range path[:len(path)-1] {
		next, ok := into[name]
		if !ok {
			next = map[string]any{}
			into[name] = next
		}
		if into, ok = next.(map[string]any); !ok {
			return fmt.Errorf("%w: %s is a value and cannot have members, as %s says", ErrSyntax, name, key)
		}
	}
	last := path[len(path)-1]
	if _, ok := into[last]; ok {
		return fmt.Errorf("%w: %s is set twice", ErrSyntax, key)
	}
	into[last] = value
	return nil
}

func parseValue(text string) (any, error) {
	if i, err := strconv.ParseInt(text, 10, 64); err == nil {
		return i, nil
	}
	if u, err := strconv.ParseUint(text, 10, 64); err == nil {
		return u, nil
	}
	switch text {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	if text == "" || !strings.Contains(`{["`, text[:1]) {
		return text, nil
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("%s is not JSON: %w", text, err)
	}
	if d.More() {
		return nil, fmt.Errorf("%s is more than one value", text)
	}
	return v, nil
}

// SplitWords splits a line at blanks outside quotes, braces and brackets. Quotes are kept: they make a value a JSON string.
func SplitWords(line string) []string {
	var words []string
	start, depth, quoted := -1, 0, false
	for i := 0; i < len(line); i++ {
		c := line[i]
		blank := c == ' ' || c == '\t'
		switch {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			depth--
		case blank && depth <= 0:
			if start >= 0 {
				words = append(words, line[start:i])
				start = -1
			}
		}
		if start < 0 && !blank {
			start = i
		}
	}
	if start >= 0 {
		words = append(words, line[start:])
	}
	return words
}
