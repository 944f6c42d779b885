package qmp

import (
	"context"
	"fmt"
)

// The types of QEMU's qapi/introspect.json.

type schemaMetaType string

func (schemaMetaType) Values() []string {
	return []string{"builtin", "enum", "array", "object", "alternate", "command", "event"}
}

type schemaInfo struct {
	Name      string           `qmp:"name"`
	MetaType  schemaMetaType   `qmp:"meta-type,tag"`
	Features  []string         `qmp:"features,omitempty"`
	Builtin   *schemaBuiltin   `qmp:"builtin,variant"`
	Enum      *schemaEnum      `qmp:"enum,variant"`
	Array     *schemaArray     `qmp:"array,variant"`
	Object    *schemaObject    `qmp:"object,variant"`
	Alternate *schemaAlternate `qmp:"alternate,variant"`
	Command   *schemaCommand   `qmp:"command,variant"`
	Event     *schemaEvent     `qmp:"event,variant"`
}

type schemaJSONType string

func (schemaJSONType) Values() []string {
	return []string{"string", "number", "int", "boolean", "null", "object", "array", "value"}
}

type schemaBuiltin struct {
	JSONType schemaJSONType `qmp:"json-type"`
}

type schemaEnum struct {
	Members []schemaEnumMember `qmp:"members"`
	Values  []string           `qmp:"values"`
}

type schemaEnumMember struct {
	Name string `qmp:"name"`
}

type schemaArray struct {
	ElementType string `qmp:"element-type"`
}

type schemaObject struct {
	Members  []schemaMember  `qmp:"members"`
	Tag      string          `qmp:"tag,omitempty"`
	Variants []schemaVariant `qmp:"variants,omitempty"`
}

type schemaMember struct {
	Name string `qmp:"name"`
	Type string `qmp:"type"`
	// Default is present, and null, where the member is optional.
	Default *any `qmp:"default"`
}

type schemaVariant struct {
	Case string `qmp:"case"`
	Type string `qmp:"type"`
}

type schemaAlternate struct {
	Members []schemaAlternateMember `qmp:"members"`
}

type schemaAlternateMember struct {
	Type string `qmp:"type"`
}

type schemaCommand struct {
	ArgType  string `qmp:"arg-type"`
	RetType  string `qmp:"ret-type"`
	AllowOOB bool   `qmp:"allow-oob,omitempty"`
}

type schemaEvent struct {
	ArgType string `qmp:"arg-type"`
}

// schemaBuilder names types by numbers, as QEMU does, so that nobody comes to rely on our names for them.
type schemaBuilder struct {
	names map[*qtype]string
	queue []*qtype
	// builtins are those in use.
	builtins map[string]schemaJSONType
	// arrays are those named so far: several Go types may be the same array.
	arrays  map[string]bool
	objects int
}

// schema describes the registry's commands and events, then every type that these refer to.
func (r *Registry) schema() []schemaInfo {
	empty := compileType(emptyType)
	b := &schemaBuilder{names: map[*qtype]string{}, builtins: map[string]schemaJSONType{}, arrays: map[string]bool{}}
	b.name(empty)

	var out []schemaInfo
	for _, c := range r.sortedCommands() {
		out = append(out, schemaInfo{Name: c.name, MetaType: "command", Command: &schemaCommand{
			ArgType: b.name(c.args), RetType: b.name(c.result), AllowOOB: c.allowOOB,
		}})
	}
	for _, e := range r.sortedEvents() {
		out = append(out, schemaInfo{Name: e.name, MetaType: "event", Event: &schemaEvent{ArgType: b.name(e.data)}})
	}
	for len(b.queue) > 0 {
		q := b.queue[0]
		b.queue = b.queue[1:]
		out = append(out, b.describe(q))
	}
	for _, name := range sortedKeys(b.builtins) {
		out = append(out, schemaInfo{Name: name, MetaType: "builtin", Builtin: &schemaBuiltin{b.builtins[name]}})
	}
	return out
}

// name returns the name of q, which will be described if it was not named before.
func (b *schemaBuilder) name(q *qtype) string {
	if q.kind == kindObject && len(q.members) == 0 && q.tag < 0 {
		q = compileType(emptyType)
	}
	if name, ok := b.names[q]; ok {
		return name
	}
	builtin := func(name string, json schemaJSONType) string {
		b.builtins[name] = json
		return name
	}
	switch q.kind {
	case kindString:
		return builtin("str", "string")
	case kindInt, kindUint:
		return builtin("int", "int")
	case kindNumber:
		return builtin("number", "number")
	case kindBool:
		return builtin("bool", "boolean")
	case kindAny:
		return builtin("any", "value")
	}
	var name string
	if q.kind == kindArray {
		name = "[" + b.name(q.elem) + "]"
		if b.arrays[name] {
			return name
		}
		b.arrays[name] = true
	} else {
		name = fmt.Sprint(b.objects)
		b.objects++
	}
	b.names[q] = name
	b.queue = append(b.queue, q)
	return name
}

func (b *schemaBuilder) describe(q *qtype) schemaInfo {
	info := schemaInfo{Name: b.names[q]}
	switch q.kind {
	case kindEnum:
		info.MetaType, info.Enum = "enum", &schemaEnum{Values: q.values}
		for _, v := range q.values {
			info.Enum.Members = append(info.Enum.Members, schemaEnumMember{v})
		}
	case kindArray:
		info.MetaType, info.Array = "array", &schemaArray{b.name(q.elem)}
	case kindAlternate:
		info.MetaType, info.Alternate = "alternate", &schemaAlternate{}
		for _, m := range q.choices {
			info.Alternate.Members = append(info.Alternate.Members, schemaAlternateMember{b.name(m.typ)})
		}
	default:
		info.MetaType, info.Object = "object", b.object(q)
	}
	return info
}

func (b *schemaBuilder) object(q *qtype) *schemaObject {
	o := &schemaObject{}
	for _, m := range q.members {
		s := schemaMember{Name: m.name, Type: b.name(m.typ)}
		if m.optional {
			s.Default = new(any)
		}
		o.Members = append(o.Members, s)
	}
	if q.tag < 0 {
		return o
	}
	tag := q.members[q.tag]
	o.Tag = tag.name
	for _, value := range tag.typ.values {
		v := schemaVariant{Case: value, Type: b.name(compileType(emptyType))}
		if m, ok := q.variants[value]; ok {
			v.Type = b.name(m.typ)
		}
		o.Variants = append(o.Variants, v)
	}
	return o
}

func querySchema(_ context.Context, s *Session, _ Empty) ([]schemaInfo, error) {
	return s.srv.reg.schema(), nil
}
