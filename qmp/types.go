package qmp

import (
	"fmt"
	"reflect"
	"strings"
	"sync"
	"unicode"
)

// kind is the sort of QAPI type that a Go type stands for.
type kind uint8

const (
	kindString kind = iota
	kindInt
	kindUint
	kindNumber
	kindBool
	kindAny
	kindEnum
	kindArray
	kindObject
	kindAlternate
)

// qtype describes a Go type as QAPI sees it. Decoder, encoder and schema all work from it.
type qtype struct {
	kind   kind
	goType reflect.Type

	values  []string // of an enumeration
	elem    *qtype   // of an array
	members []member // of an object, its discriminator included
	choices []member // of an alternate

	tag      int               // index in members of a union's discriminator, or -1
	variants map[string]member // of a union, by discriminator value
}

// member is a member of an object, or one of the variants of a union or choices of an alternate.
type member struct {
	name     string
	index    []int // of the Go field
	typ      *qtype
	pointer  bool
	optional bool
}

// enum is implemented by named string types that stand for enumerations.
type enum interface{ Values() []string }

var (
	enumType = reflect.TypeFor[enum]()
	anyType  = reflect.TypeFor[any]()
)

// typeCache holds every compiled type, so that a type is one type in the schema too.
var typeCache = struct {
	sync.Mutex
	types map[reflect.Type]*qtype
}{types: map[reflect.Type]*qtype{}}

// compileType returns the description of t. It panics when t cannot be a QAPI type: that is a mistake in the program.
func compileType(t reflect.Type) *qtype {
	typeCache.Lock()
	defer typeCache.Unlock()
	return compileLocked(t)
}

func compileLocked(t reflect.Type) *qtype {
	if q, ok := typeCache.types[t]; ok {
		return q
	}
	q := &qtype{goType: t, tag: -1}
	typeCache.types[t] = q // before its members, which may refer to it
	switch {
	case t.Kind() == reflect.String && t.Implements(enumType):
		q.kind = kindEnum
		q.values = reflect.Zero(t).Interface().(enum).Values()
	case t == anyType:
		q.kind = kindAny
	default:
		switch t.Kind() {
		case reflect.String:
			q.kind = kindString
		case reflect.Bool:
			q.kind = kindBool
		case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
			q.kind = kindInt
		case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
			q.kind = kindUint
		case reflect.Float64:
			q.kind = kindNumber
		case reflect.Slice:
			q.kind = kindArray
			q.elem = compileLocked(t.Elem())
		case reflect.Struct:
			q.kind = kindObject
			compileStruct(q, t, nil)
			finishStruct(q)
		default:
			panic(fmt.Sprintf("qmp: %v is not a type that QMP can carry", t))
		}
	}
	return q
}

// compileStruct adds the fields of t, found at index within q's struct, to q.
func compileStruct(q *qtype, t reflect.Type, index []int) {
	for i := range t.NumField() {
		f := t.Field(i)
		at := append(append([]int(nil), index...), i)
		if f.Anonymous && f.Type.Kind() == reflect.Struct {
			compileStruct(q, f.Type, at)
			continue
		}
		if !f.IsExported() {
			panic(fmt.Sprintf("qmp: field %v.%s is not exported", t, f.Name))
		}
		name, flags, _ := strings.Cut(f.Tag.Get("qmp"), ",")
		if name == "" {
			name = hyphenated(f.Name)
		}
		m := member{name: name, index: at}
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			m.pointer, m.optional = true, true
			ft = ft.Elem()
		}
		m.typ = compileLocked(ft)
		switch flags {
		case "":
			q.members = append(q.members, m)
		case "omitempty":
			m.optional = true
			q.members = append(q.members, m)
		case "tag":
			if m.typ.kind != kindEnum || m.optional || q.tag >= 0 {
				panic(fmt.Sprintf("qmp: %v.%s cannot be the tag of a union", t, f.Name))
			}
			q.tag = len(q.members)
			q.members = append(q.members, m)
		case "variant":
			if !m.pointer || ft.Kind() != reflect.Struct {
				panic(fmt.Sprintf("qmp: variant %v.%s is not a pointer to a struct", t, f.Name))
			}
			if q.variants == nil {
				q.variants = map[string]member{}
			}
			q.variants[name] = m
		case "alternate":
			if !m.pointer {
				panic(fmt.Sprintf("qmp: choice %v.%s is not a pointer", t, f.Name))
			}
			q.choices = append(q.choices, m)
		default:
			panic(fmt.Sprintf("qmp: %v.%s has unknown flag %q", t, f.Name, flags))
		}
	}
}

// finishStruct checks what concerns the fields of a struct together.
func finishStruct(q *qtype) {
	seen := map[string]bool{}
	for _, m := range q.members {
		if seen[m.name] {
			panic(fmt.Sprintf("qmp: %v has two members called %q", q.goType, m.name))
		}
		seen[m.name] = true
	}
	if (q.variants != nil) != (q.tag >= 0) || q.choices != nil && q.members != nil {
		panic(fmt.Sprintf("qmp: %v is neither an object, a union nor an alternate", q.goType))
	}
	if q.choices != nil {
		q.kind = kindAlternate
	}
	for value := range q.variants {
		if !q.members[q.tag].typ.hasValue(value) {
			panic(fmt.Sprintf("qmp: %v has a variant for %q, which its tag cannot be", q.goType, value))
		}
	}
}

func (q *qtype) hasValue(s string) bool {
	for _, v := range q.values {
		if v == s {
			return true
		}
	}
	return false
}

// hyphenated turns FooBar into foo-bar.
func hyphenated(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
