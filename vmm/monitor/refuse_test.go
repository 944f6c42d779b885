package monitor_test

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/qmp"
)

// schema is what query-qmp-schema tells, by name.
type schema map[string]*schemaType

type schemaType struct {
	Name     string
	Meta     string         `json:"meta-type"`
	JSON     string         `json:"json-type"`
	Values   []string       // of an enumeration
	Element  string         `json:"element-type"`
	Members  []schemaMember // of an object, or alternate
	Tag      string
	Variants []struct{ Case, Type string }
	ArgType  string `json:"arg-type"`
	RetType  string `json:"ret-type"`
}

type schemaMember struct {
	Name, Type string
	Optional   bool
}

// readSchema asks a peer for its schema.
func readSchema(t *testing.T, p peer) schema {
	t.Helper()
	data, err := p.ExecuteRaw(t.Context(), []byte(`{"execute": "query-qmp-schema"}`))
	if err != nil {
		t.Fatal(err)
	}
	s := schema{}
	for _, v := range decode(t, data).([]any) {
		e := v.(map[string]any)
		text := func(key string) string { v, _ := e[key].(string); return v }
		st := &schemaType{
			Name: text("name"), Meta: text("meta-type"), JSON: text("json-type"), Element: text("element-type"),
			Tag: text("tag"), ArgType: text("arg-type"), RetType: text("ret-type"),
		}
		list := func(key string) []any { v, _ := e[key].([]any); return v }
		for _, v := range list("values") {
			st.Values = append(st.Values, v.(string))
		}
		for _, v := range list("members") {
			m := v.(map[string]any)
			name, _ := m["name"].(string)
			typ, _ := m["type"].(string)
			_, optional := m["default"]
			st.Members = append(st.Members, schemaMember{name, typ, optional})
		}
		for _, v := range list("variants") {
			m := v.(map[string]any)
			st.Variants = append(st.Variants, struct{ Case, Type string }{m["case"].(string), m["type"].(string)})
		}
		s[st.Name] = st
	}
	return s
}

// variant returns the members that come with a value of an object's tag.
func (s schema) variant(o *schemaType, value string) []schemaMember {
	for _, v := range o.Variants {
		if v.Case == value {
			return s[v.Type].Members
		}
	}
	return nil
}

// valid makes a value of a type; what it asks for does not exist.
func (s schema) valid(name string) any {
	switch st := s[name]; st.Meta {
	case "enum":
		return st.Values[0]
	case "array":
		return []any{}
	case "object":
		return s.object(st)
	case "alternate":
		return s.valid(st.Members[0].Type)
	default:
		return map[string]any{"string": "/nonexistent/x", "int": 1, "number": 1, "boolean": false, "value": 1}[st.JSON]
	}
}

// object makes an object with the members that it must have.
func (s schema) object(o *schemaType) map[string]any {
	v := map[string]any{}
	for _, m := range o.Members {
		if !m.Optional {
			v[m.Name] = s.valid(m.Type)
		}
	}
	if o.Tag != "" {
		for _, m := range s.variant(o, v[o.Tag].(string)) {
			if !m.Optional {
				v[m.Name] = s.valid(m.Type)
			}
		}
	}
	return v
}

// wrong makes values that a type does not have.
func (s schema) wrong(name string) []any {
	switch st := s[name]; st.Meta {
	case "enum":
		return []any{"no-such-value", 1, nil, []any{}}
	case "array":
		return []any{map[string]any{}, "x", 1}
	case "object":
		return []any{[]any{}, "x", map[string]any{"no-such-key": 1}}
	case "alternate":
		return nil
	default:
		switch st.JSON {
		case "string":
			return []any{1, true, nil, map[string]any{}}
		case "int":
			return []any{"1", 1.5, true, nil, []any{}}
		case "boolean":
			return []any{"true", 1, nil}
		}
		return nil
	}
}

// Every command refuses an unknown key, a missing one and a value of the wrong
// type, before it has had any effect.
func TestRefusesBadArguments(t *testing.T) {
	o := everything(t, "spin")
	s := readSchema(t, o.peer)
	commands, refusals := 0, 0
	for _, name := range slices.Sorted(maps.Keys(s)) {
		if s[name].Meta != "command" || name == "qmp_capabilities" {
			continue // which is refused whatever its arguments are
		}
		commands++
		args := s[s[name].ArgType]
		refused := func(what string, a map[string]any) {
			t.Helper()
			refusals++
			got := o.refuse(t, name, a)
			if got.Class != qmp.GenericError || !strings.HasPrefix(got.Desc, "Parameter '") && !strings.HasPrefix(got.Desc, "Invalid parameter") {
				t.Errorf("%s with %s: %+v", name, what, got)
			}
		}
		with := func(key string, value any) map[string]any {
			a := s.object(args)
			a[key] = value
			return a
		}
		refused("an unknown key", with("no-such-key", 1))
		members := slices.Clone(args.Members)
		if args.Tag != "" {
			tag, _ := s.object(args)[args.Tag].(string)
			members = append(members, s.variant(args, tag)...)
		}
		for _, m := range members {
			if !m.Optional {
				a := s.object(args)
				delete(a, m.Name)
				refused("no "+m.Name, a)
			}
			for _, v := range s.wrong(m.Type) {
				refused("a bad "+m.Name, with(m.Name, v))
			}
		}
	}
	t.Logf("%d commands refused %d times", commands, refusals)
	if commands < 40 || refusals < 150 {
		t.Error("too few: is the schema understood?")
	}
	select {
	case e := <-o.events:
		t.Errorf("event %+v", e)
	default:
	}
	if status := o.status(t); status != "running" {
		t.Errorf("status %q", status)
	}
	if b := o.m.Balloon(); b.Target() != 64<<20 {
		t.Errorf("the balloon's target is %d", b.Target())
	}
	if !o.m.Nets()[0].Device.LinkUp() {
		t.Error("the link is down")
	}
	if _, err := os.Stat("/nonexistent"); err == nil {
		t.Error("there is a file")
	}
}
