package qmp

import (
	"fmt"
	"math"
	"reflect"
	"strings"
)

// decoder checks a value against a type and stores it. It changes nothing but the Go value it fills.
type decoder struct {
	// path leads to the value being decoded: member names, and list positions where the name is empty.
	path []pathStep
}

type pathStep struct {
	name string
	pos  int
}

// decodeArguments fills dst, a struct, from a command's arguments; args may be nil.
func decodeArguments(q *qtype, args *object, dst reflect.Value) *Error {
	if args == nil {
		args = new(object)
	}
	var d decoder
	return d.object(q, args, dst)
}

// fullName returns the path as QEMU writes it: a.b[2].c
func (d *decoder) fullName() string {
	var b strings.Builder
	for _, s := range d.path {
		switch {
		case s.name == "":
			fmt.Fprintf(&b, "[%d]", s.pos)
		case b.Len() > 0:
			b.WriteString("." + s.name)
		default:
			b.WriteString(s.name)
		}
	}
	return b.String()
}

// lastName is what QEMU 7.2 calls a value in errors about its range: its own name only, "null" for a list's element.
func (d *decoder) lastName() string {
	if n := len(d.path); n > 0 && d.path[n-1].name != "" {
		return d.path[n-1].name
	}
	return "null"
}

func (d *decoder) push(name string, pos int) { d.path = append(d.path, pathStep{name, pos}) }
func (d *decoder) pop()                      { d.path = d.path[:len(d.path)-1] }

func (d *decoder) wrongType(expected string) *Error {
	return Errorf("Invalid parameter type for '%s', expected: %s", d.fullName(), expected)
}

func (d *decoder) value(q *qtype, v any, dst reflect.Value) *Error {
	switch q.kind {
	case kindString, kindEnum:
		s, ok := v.(string)
		if !ok {
			return d.wrongType("string")
		}
		if q.kind == kindEnum && !q.hasValue(s) {
			return Errorf("Parameter '%s' does not accept value '%s'", d.lastName(), s)
		}
		dst.SetString(s)
	case kindBool:
		b, ok := v.(bool)
		if !ok {
			return d.wrongType("boolean")
		}
		dst.SetBool(b)
	case kindInt:
		i, ok := v.(int64)
		if !ok {
			return d.wrongType("integer")
		}
		if dst.OverflowInt(i) {
			return d.outOfRange(q)
		}
		dst.SetInt(i)
	case kindUint:
		return d.uint(q, v, dst)
	case kindNumber:
		f, ok := number(v)
		if !ok {
			return d.wrongType("number")
		}
		dst.SetFloat(f)
	case kindAny:
		if v != nil {
			dst.Set(reflect.ValueOf(plainValue(v)))
		}
	case kindArray:
		return d.array(q, v, dst)
	case kindObject:
		o, ok := v.(*object)
		if !ok {
			return d.wrongType("object")
		}
		return d.object(q, o, dst)
	case kindAlternate:
		return d.alternate(q, v, dst)
	}
	return nil
}

func (d *decoder) uint(q *qtype, v any, dst reflect.Value) *Error {
	var u uint64
	switch v := v.(type) {
	case int64:
		if v < 0 {
			return d.outOfRange(q)
		}
		u = uint64(v)
	case uint64:
		u = v
	default:
		if dst.Type().Bits() == 64 {
			return d.wrongType("uint64")
		}
		return d.wrongType("integer")
	}
	if dst.OverflowUint(u) {
		return d.outOfRange(q)
	}
	dst.SetUint(u)
	return nil
}

func (d *decoder) outOfRange(q *qtype) *Error {
	name := "int"
	if q.kind == kindUint {
		name = "uint"
	}
	return Errorf("Parameter '%s' expects %s%d_t", d.lastName(), name, q.goType.Bits())
}

func number(v any) (float64, bool) {
	switch v := v.(type) {
	case int64:
		return float64(v), true
	case uint64:
		return float64(v), true
	case float64:
		return v, !math.IsInf(v, 0)
	}
	return 0, false
}

func (d *decoder) array(q *qtype, v any, dst reflect.Value) *Error {
	list, ok := v.([]any)
	if !ok {
		return d.wrongType("array")
	}
	out := reflect.MakeSlice(q.goType, len(list), len(list))
	for i, e := range list {
		d.push("", i)
		if err := d.value(q.elem, e, out.Index(i)); err != nil {
			return err
		}
		d.pop()
	}
	dst.Set(out)
	return nil
}

// object decodes the members of o, then insists that there are no others. Missing members are reported before unexpected
// ones, as QEMU does.
func (d *decoder) object(q *qtype, o *object, dst reflect.Value) *Error {
	known, err := d.members(q, o, dst)
	if err != nil {
		return err
	}
	if q.tag >= 0 {
		choice := dst.FieldByIndex(q.members[q.tag].index).String()
		if m, ok := q.variants[choice]; ok {
			p := reflect.New(m.typ.goType)
			n, err := d.members(m.typ, o, p.Elem())
			if err != nil {
				return err
			}
			known += n
			dst.FieldByIndex(m.index).Set(p)
		}
	}
	if known == len(o.members) {
		return nil
	}
	for i := range o.members {
		if name := o.members[i].name; !q.accepts(name, dst) {
			d.push(name, 0)
			return Errorf("Parameter '%s' is unexpected", d.fullName())
		}
	}
	return nil
}

// members decodes those members of o that q declares, and counts them.
func (d *decoder) members(q *qtype, o *object, dst reflect.Value) (known int, err *Error) {
	for i := range q.members {
		m := &q.members[i]
		v, ok := o.get(m.name)
		if !ok {
			if m.optional {
				continue
			}
			d.push(m.name, 0)
			return 0, Errorf("Parameter '%s' is missing", d.fullName())
		}
		known++
		d.push(m.name, 0)
		field := dst.FieldByIndex(m.index)
		if m.pointer {
			p := reflect.New(m.typ.goType)
			field.Set(p)
			field = p.Elem()
		}
		if err := d.value(m.typ, v, field); err != nil {
			return 0, err
		}
		d.pop()
	}
	return known, nil
}

// accepts tells whether an object of type q, already decoded to v, may have a member called name.
func (q *qtype) accepts(name string, v reflect.Value) bool {
	for i := range q.members {
		if q.members[i].name == name {
			return true
		}
	}
	if q.tag < 0 {
		return false
	}
	m, ok := q.variants[v.FieldByIndex(q.members[q.tag].index).String()]
	return ok && m.typ.accepts(name, v.FieldByIndex(m.index).Elem())
}

// alternate decodes v by the choice that its JSON type selects.
func (d *decoder) alternate(q *qtype, v any, dst reflect.Value) *Error {
	for _, m := range q.choices {
		if m.typ.takes(v) {
			p := reflect.New(m.typ.goType)
			dst.FieldByIndex(m.index).Set(p)
			return d.value(m.typ, v, p.Elem())
		}
	}
	return d.wrongType(q.goType.Name())
}

// takes tells whether v is of the JSON type that q needs.
func (q *qtype) takes(v any) bool {
	ok := true
	switch q.kind {
	case kindString, kindEnum:
		_, ok = v.(string)
	case kindBool:
		_, ok = v.(bool)
	case kindInt, kindUint:
		switch v.(type) {
		case int64, uint64:
		default:
			ok = false
		}
	case kindNumber:
		_, ok = number(v)
	case kindArray:
		_, ok = v.([]any)
	case kindObject:
		_, ok = v.(*object)
	}
	return ok
}
