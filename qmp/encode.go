package qmp

import (
	"reflect"
	"strconv"
)

// appendTyped appends the value v of type q as JSON.
func appendTyped(b []byte, q *qtype, v reflect.Value) []byte {
	switch q.kind {
	case kindString, kindEnum:
		return appendString(b, v.String())
	case kindBool:
		return strconv.AppendBool(b, v.Bool())
	case kindInt:
		return strconv.AppendInt(b, v.Int(), 10)
	case kindUint:
		return strconv.AppendUint(b, v.Uint(), 10)
	case kindNumber:
		return appendFloat(b, v.Float())
	case kindAny:
		return appendAny(b, v.Interface())
	case kindArray:
		b = append(b, '[')
		for i := range v.Len() {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = appendTyped(b, q.elem, v.Index(i))
		}
		return append(b, ']')
	case kindAlternate:
		for _, m := range q.choices {
			if f := v.FieldByIndex(m.index); !f.IsNil() {
				return appendTyped(b, m.typ, f.Elem())
			}
		}
		return append(b, "null"...)
	default:
		b = append(b, '{')
		b = appendMembers(b, q, v, len(b))
		return append(b, '}')
	}
}

// appendMembers appends the members of v to an object that begins at start.
func appendMembers(b []byte, q *qtype, v reflect.Value, start int) []byte {
	for i := range q.members {
		m := &q.members[i]
		f := v.FieldByIndex(m.index)
		if m.optional && f.IsZero() {
			continue
		}
		if m.pointer {
			f = f.Elem()
		}
		if len(b) > start {
			b = append(b, ", "...)
		}
		b = appendString(b, m.name)
		b = append(b, ": "...)
		b = appendTyped(b, m.typ, f)
	}
	if q.tag >= 0 {
		choice := v.FieldByIndex(q.members[q.tag].index).String()
		if m, ok := q.variants[choice]; ok {
			if p := v.FieldByIndex(m.index); !p.IsNil() {
				b = appendMembers(b, m.typ, p.Elem(), start)
			}
		}
	}
	return b
}

// appendAny appends a value whose type is known only now: what the parser makes, maps with string keys, or any Go type
// that a command may return.
func appendAny(b []byte, v any) []byte {
	switch v := v.(type) {
	case nil, bool, int64, uint64, float64, string, *object:
		return appendValue(b, v)
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = appendAny(b, e)
		}
		return append(b, ']')
	case map[string]any:
		b = append(b, '{')
		for i, name := range sortedKeys(v) {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = appendString(b, name)
			b = append(b, ": "...)
			b = appendAny(b, v[name])
		}
		return append(b, '}')
	default:
		rv := reflect.ValueOf(v)
		if rv.Kind() == reflect.Pointer {
			if rv.IsNil() {
				return append(b, "null"...)
			}
			rv = rv.Elem()
		}
		return appendTyped(b, compileType(rv.Type()), rv)
	}
}
