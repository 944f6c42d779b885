package qmp_test

import (
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func mapKeys[V any](m map[string]V) iter.Seq[string] { return maps.Keys(m) }

// schemaEntry is SchemaInfo of QEMU's qapi/introspect.json.
type schemaEntry struct {
	Name     string
	MetaType string `json:"meta-type"`
	JSONType string `json:"json-type"`
	Element  string `json:"element-type"`
	ArgType  string `json:"arg-type"`
	RetType  string `json:"ret-type"`
	AllowOOB bool   `json:"allow-oob"`
	Tag      string
	Values   []string
	Members  []map[string]any
	Variants []struct{ Case, Type string }
}

type schema map[string]schemaEntry

func readSchema(t *testing.T, w *wire) schema {
	t.Helper()
	var r struct{ Return []schemaEntry }
	if err := json.Unmarshal([]byte(w.ask(`{"execute": "query-qmp-schema"}`)[0]), &r); err != nil {
		t.Fatal(err)
	}
	s := schema{}
	for _, e := range r.Return {
		if _, ok := s[e.Name]; ok {
			t.Errorf("%s is described twice", e.Name)
		}
		s[e.Name] = e
	}
	return s
}

// TestSchema checks that the schema is closed, and that what QEMU has, too, has QEMU's shape.
func TestSchema(t *testing.T) {
	ours := readSchema(t, negotiated(t, newMachine(t).path))
	used := map[string]bool{}
	refer := func(from, to string) {
		used[to] = true
		if _, ok := ours[to]; !ok {
			t.Errorf("%s refers to %q, which is not described", from, to)
		}
	}
	for name, e := range ours {
		switch e.MetaType {
		case "command":
			refer(name, e.RetType)
			fallthrough
		case "event":
			refer(name, e.ArgType)
			used[name] = true
		case "array":
			refer(name, e.Element)
		case "builtin":
		case "enum":
			if len(e.Values) == 0 || len(e.Members) != len(e.Values) {
				t.Errorf("enumeration %s has values %v and members %v", name, e.Values, e.Members)
			}
		case "object", "alternate":
			for _, m := range e.Members {
				refer(name, m["type"].(string))
			}
			for _, v := range e.Variants {
				refer(name, v.Type)
			}
		default:
			t.Errorf("%s has meta-type %q", name, e.MetaType)
		}
	}
	for name := range ours {
		if !used[name] {
			t.Errorf("%s is described and not referred to", name)
		}
	}
	qemu := readSchema(t, negotiated(t, startQEMU(t)))
	compared := 0
	for name, e := range ours {
		theirs, ok := qemu[name]
		if !ok || e.MetaType != "command" && e.MetaType != "event" || strings.HasPrefix(name, "blockdev-") {
			continue
		}
		compared++
		if a, b := qemu.shape(theirs.ArgType, 0), ours.shape(e.ArgType, 0); a != b {
			t.Errorf("arguments of %s: QEMU has\n%s, we\n%s", name, a, b)
		}
		if name == "query-jobs" || name == "query-qmp-schema" {
			continue // job types are a string of ours; QEMU's release has features that we do not name
		}
		if a, b := qemu.shape(theirs.RetType, 0), ours.shape(e.RetType, 0); !strings.Contains(name, "status") && a != b {
			t.Errorf("result of %s: QEMU has\n%s, we\n%s", name, a, b)
		}
	}
	if compared < 15 {
		t.Errorf("only %d commands and events compared", compared)
	}
}

// shape writes a type out with its names for types left out.
func (s schema) shape(name string, depth int) string {
	e := s[name]
	switch {
	case e.MetaType == "builtin" || depth > 5:
		return e.JSONType
	case e.MetaType == "array":
		return "[" + s.shape(e.Element, depth+1) + "]"
	case e.MetaType == "enum":
		return strings.Join(e.Values, "|")
	}
	var members []string
	for _, m := range e.Members {
		text := s.shape(m["type"].(string), depth+1)
		if name, ok := m["name"].(string); ok {
			text = name + ": " + text
		}
		if v, ok := m["default"]; ok {
			text += fmt.Sprintf(" = %v", v)
		}
		members = append(members, text)
	}
	for _, v := range e.Variants {
		members = append(members, v.Case+" -> "+s.shape(v.Type, depth+1))
	}
	slices.Sort(members)
	return e.Tag + "{" + strings.Join(members, ", ") + "}"
}

// badArguments is how an argument is refused before a command runs.
var badArguments = regexp.MustCompile(`"desc": "(Parameter '[^']*' |Invalid parameter type )`)

// TestSchemaIsEnforced makes arguments from the schema alone: good ones pass the checks of every command, and ones with one
// mistake do not, and have no effect.
func TestSchemaIsEnforced(t *testing.T) {
	m := newMachine(t)
	w := negotiated(t, m.path)
	s := readSchema(t, w)
	for _, name := range slices.Sorted(mapKeys(s)) {
		e := s[name]
		if e.MetaType != "command" || name == "test-block" || name == "test-long" || name == "qmp_capabilities" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				g := &generator{t: t, schema: s}
				good := g.value(e.ArgType, 0).(map[string]any)
				if answer := w.ask(call(name, good))[0]; badArguments.MatchString(answer) {
					t.Fatalf("%v were refused: %s", good, answer)
				}
				calls := m.called()
				bad := g.spoil(e.ArgType, good)
				if answer := w.ask(call(name, bad))[0]; !badArguments.MatchString(answer) {
					t.Fatalf("%v were accepted: %s", bad, answer)
				}
				if m.called() != calls {
					t.Fatalf("%v had an effect", bad)
				}
			})
		})
	}
}

func call(name string, args any) string {
	b, err := json.Marshal(map[string]any{"execute": name, "arguments": args})
	if err != nil {
		panic(err)
	}
	return string(b)
}

type generator struct {
	t      *rapid.T
	schema schema
}

func (g *generator) value(name string, depth int) any {
	e := g.schema[name]
	switch e.MetaType {
	case "builtin":
		switch e.JSONType {
		case "string":
			// No digit at the beginning, and nothing that commands make files of.
			return rapid.StringMatching(`[a-z]{1,8}`).Draw(g.t, "string")
		case "int":
			return rapid.IntRange(0, 100).Draw(g.t, "int")
		case "number":
			return rapid.Float64Range(-1e9, 1e9).Draw(g.t, "number")
		case "boolean":
			return rapid.Bool().Draw(g.t, "bool")
		default:
			return rapid.SampledFrom([]any{nil, 1, "x", true, []any{}, map[string]any{"a": 1}}).Draw(g.t, "any")
		}
	case "enum":
		return rapid.SampledFrom(e.Values).Draw(g.t, "enum")
	case "array":
		out := []any{}
		if depth < 4 {
			for range rapid.IntRange(0, 3).Draw(g.t, "length") {
				out = append(out, g.value(e.Element, depth+1))
			}
		}
		return out
	case "alternate":
		m := e.Members[len(e.Members)-1] // ends the recursion
		if depth <= 3 {
			m = rapid.SampledFrom(e.Members).Draw(g.t, "choice")
		}
		return g.value(m["type"].(string), depth+1)
	}
	out := map[string]any{}
	g.members(e, out, depth)
	if e.Tag != "" {
		for _, v := range e.Variants {
			if v.Case == out[e.Tag] {
				g.members(g.schema[v.Type], out, depth)
			}
		}
	}
	return out
}

func (g *generator) members(e schemaEntry, out map[string]any, depth int) {
	for _, m := range e.Members {
		if _, optional := m["default"]; optional && (depth > 3 || rapid.Bool().Draw(g.t, "leave out")) {
			continue
		}
		out[m["name"].(string)] = g.value(m["type"].(string), depth+1)
	}
}

// spoil makes one mistake in good arguments of an object type.
func (g *generator) spoil(name string, good map[string]any) map[string]any {
	bad := maps.Clone(good)
	var required, typed []string
	types := map[string]string{}
	for _, m := range g.schema[name].Members {
		n := m["name"].(string)
		types[n] = m["type"].(string)
		if _, optional := m["default"]; !optional {
			required = append(required, n)
		}
		if types[n] != "any" {
			typed = append(typed, n)
		}
	}
	mistakes := []string{"extra"}
	if len(required) > 0 {
		mistakes = append(mistakes, "missing")
	}
	if len(typed) > 0 {
		mistakes = append(mistakes, "type", "type")
	}
	switch rapid.SampledFrom(mistakes).Draw(g.t, "mistake") {
	case "extra":
		bad["no-such-argument"] = g.value("any", 0)
	case "missing":
		delete(bad, rapid.SampledFrom(required).Draw(g.t, "missing"))
	default:
		n := rapid.SampledFrom(typed).Draw(g.t, "wrong")
		bad[n] = g.wrong(types[n])
	}
	return bad
}

// wrong returns a value that is not of the type.
func (g *generator) wrong(name string) any {
	e := g.schema[name]
	all := map[string]any{
		"null": nil, "string": "no such value", "int": 1, "number": 1.5, "boolean": true, "array": []any{nil}, "object": map[string]any{"nonsense": 1},
	}
	switch e.MetaType {
	case "builtin":
		delete(all, e.JSONType)
		if e.JSONType == "number" {
			delete(all, "int")
		}
	case "alternate":
		for _, m := range e.Members {
			delete(all, g.schema[m["type"].(string)].JSONType)
		}
	}
	return all[rapid.SampledFrom(slices.Sorted(maps.Keys(all))).Draw(g.t, "wrong type")]
}
