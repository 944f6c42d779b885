package qmp

import (
	"math"
	"strconv"
	"unicode/utf8"
)

// Output is ASCII with QEMU's spacing: one blank after colons and commas.

const hexDigits = "0123456789ABCDEF"

// appendString appends s as a JSON string. Bytes that are not UTF-8 become U+FFFD.
func appendString[T string | []byte](b []byte, s T) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			b = appendASCII(b, c)
			i++
			continue
		}
		r, n := decodeRune([]byte(s[i:min(i+6, len(s))]))
		i += n
		switch {
		case r < 0:
			b = appendEscape(b, utf8.RuneError)
		case r > 0xffff:
			b = appendEscape(b, 0xd800+(r-0x10000)>>10)
			b = appendEscape(b, 0xdc00+(r-0x10000)&0x3ff)
		default:
			b = appendEscape(b, r)
		}
	}
	return append(b, '"')
}

func appendASCII(b []byte, c byte) []byte {
	switch c {
	case '"', '\\':
		return append(b, '\\', c)
	case '\b':
		return append(b, `\b`...)
	case '\f':
		return append(b, `\f`...)
	case '\n':
		return append(b, `\n`...)
	case '\r':
		return append(b, `\r`...)
	case '\t':
		return append(b, `\t`...)
	}
	if c < 0x20 || c == 0x7f {
		return appendEscape(b, rune(c))
	}
	return append(b, c)
}

func appendEscape(b []byte, r rune) []byte {
	return append(b, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}

// appendFloat writes 17 significant digits, enough to read the same number back. JSON has no infinities: they become the
// largest finite number.
func appendFloat(b []byte, f float64) []byte {
	switch {
	case math.IsNaN(f):
		return append(b, '0')
	case math.IsInf(f, 0):
		f = math.Copysign(math.MaxFloat64, f)
	}
	return strconv.AppendFloat(b, f, 'g', 17, 64)
}

// appendValue appends a value as the parser makes them.
func appendValue(b []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return append(b, "null"...)
	case bool:
		return strconv.AppendBool(b, v)
	case int64:
		return strconv.AppendInt(b, v, 10)
	case uint64:
		return strconv.AppendUint(b, v, 10)
	case float64:
		return appendFloat(b, v)
	case string:
		return appendString(b, v)
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = appendValue(b, e)
		}
		return append(b, ']')
	case *object:
		b = append(b, '{')
		for i := range v.members {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = appendString(b, v.members[i].name)
			b = append(b, ": "...)
			b = appendValue(b, v.members[i].value)
		}
		return append(b, '}')
	default:
		return append(b, "null"...)
	}
}

// plainValue returns v with Go's maps in place of objects, for commands that take any value.
func plainValue(v any) any {
	switch v := v.(type) {
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = plainValue(v[i])
		}
		return out
	case *object:
		out := make(map[string]any, len(v.members))
		for i := range v.members {
			out[v.members[i].name] = plainValue(v.members[i].value)
		}
		return out
	default:
		return v
	}
}
