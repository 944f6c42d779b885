package qmp

import (
	"math"
	"strconv"
	"unicode/utf8"
)

// A JSON value is nil, bool, int64, uint64 (beyond int64 only), float64, string, []any or *object. Its strings are as the
// client meant them: decoded, with U+0000 as a zero byte.

// object is a JSON object with its members in the order in which they came.
type object struct {
	members []objectMember
	// index finds members by name once there are too many to search; it is nil before.
	index map[string]int
}

type objectMember struct {
	name  string
	value any
}

const indexedObjectSize = 16

func (o *object) find(name string) int {
	if o.index != nil {
		if i, ok := o.index[name]; ok {
			return i
		}
		return -1
	}
	for i := range o.members {
		if o.members[i].name == name {
			return i
		}
	}
	return -1
}

func (o *object) get(name string) (any, bool) {
	if i := o.find(name); i >= 0 {
		return o.members[i].value, true
	}
	return nil, false
}

func (o *object) add(name string, value any) {
	o.members = append(o.members, objectMember{name, value})
	if o.index != nil {
		o.index[name] = len(o.members) - 1
	} else if len(o.members) > indexedObjectSize {
		o.index = make(map[string]int, 2*len(o.members))
		for i := range o.members {
			o.index[o.members[i].name] = i
		}
	}
}

// parser turns the tokens of one message into a value. The first error is the one reported.
type parser struct {
	text   []byte
	tokens []token
}

func parseTokens(text []byte, tokens []token) (any, *Error) {
	p := parser{text, tokens}
	return p.value()
}

// maxParseMessage is the room that QEMU has for what was wrong.
const maxParseMessage = 1023

func parseError(msg string) *Error {
	return Errorf("JSON parse error, %s", msg[:min(len(msg), maxParseMessage)])
}

var (
	errPrematureEnd   = parseError("premature EOI")
	errExpectingValue = parseError("expecting value")
	errKeyNotString   = parseError("key is not a string in object")
	errMissingColon   = parseError("missing : in object pair")
	errDuplicateKey   = parseError("duplicate key")
	errDictSeparator  = parseError("expected separator in dict")
	errListSeparator  = parseError("expected separator in list")
	errEscape         = parseError("invalid escape sequence in string")
	errUTF8           = parseError("invalid UTF-8 sequence in string")
)

func (p *parser) next() (token, *Error) {
	if len(p.tokens) == 0 {
		return token{}, errPrematureEnd
	}
	t := p.tokens[0]
	p.tokens = p.tokens[1:]
	return t, nil
}

func (p *parser) at(k tokenKind) bool { return len(p.tokens) > 0 && p.tokens[0].kind == k }

// value parses a value. Its recursion is bounded by maxNesting, which the lexer has checked.
func (p *parser) value() (any, *Error) {
	t, err := p.next()
	if err != nil {
		return nil, err
	}
	text := p.text[t.start:t.end]
	switch t.kind {
	case tokenBeginObject:
		return p.object()
	case tokenBeginArray:
		return p.array()
	case tokenString:
		return unquote(text)
	case tokenInteger:
		return integer(text), nil
	case tokenFloat:
		return float(text), nil
	case tokenKeyword:
		switch string(text) {
		case "true":
			return true, nil
		case "false":
			return false, nil
		case "null":
			return nil, nil
		}
		return nil, parseError("invalid keyword '" + string(text) + "'")
	default:
		return nil, errExpectingValue
	}
}

func (p *parser) object() (any, *Error) {
	o := new(object)
	if p.at(tokenEndObject) {
		p.tokens = p.tokens[1:]
		return o, nil
	}
	for {
		key, err := p.value()
		if err != nil {
			return nil, err
		}
		name, ok := key.(string)
		if !ok {
			return nil, errKeyNotString
		}
		t, err := p.next()
		if err != nil {
			return nil, err
		}
		if t.kind != tokenColon {
			return nil, errMissingColon
		}
		value, err := p.value()
		if err != nil {
			return nil, err
		}
		if o.find(name) >= 0 {
			return nil, errDuplicateKey
		}
		o.add(name, value)

		t, err = p.next()
		if err != nil {
			return nil, err
		}
		switch t.kind {
		case tokenEndObject:
			return o, nil
		case tokenComma:
		default:
			return nil, errDictSeparator
		}
	}
}

func (p *parser) array() (any, *Error) {
	list := []any{}
	if p.at(tokenEndArray) {
		p.tokens = p.tokens[1:]
		return list, nil
	}
	for {
		v, err := p.value()
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		t, err := p.next()
		if err != nil {
			return nil, err
		}
		switch t.kind {
		case tokenEndArray:
			return list, nil
		case tokenComma:
		default:
			return nil, errListSeparator
		}
	}
}

func integer(text []byte) any {
	s := string(text)
	if i, err := strconv.ParseInt(s, 10, 64); err == nil {
		return i
	}
	if u, err := strconv.ParseUint(s, 10, 64); err == nil {
		return u
	}
	return float(text)
}

// float returns the nearest float64, which is infinite when the number is too large, as strtod does.
func float(text []byte) float64 {
	f, _ := strconv.ParseFloat(string(text), 64)
	return f
}

// unquote decodes a string token, quotes included.
func unquote(tok []byte) (any, *Error) {
	body := tok[1 : len(tok)-1]
	plain := true
	for _, c := range body {
		if c == '\\' || c >= utf8.RuneSelf {
			plain = false
			break
		}
	}
	if plain {
		return string(body), nil
	}
	out := make([]byte, 0, len(body))
	for i := 0; i < len(body); {
		if body[i] != '\\' {
			r, n := decodeRune(body[i:])
			if r < 0 {
				return nil, errUTF8
			}
			out = utf8.AppendRune(out, r)
			i += n
			continue
		}
		// The lexer saw to it that something follows the backslash.
		c := body[i+1]
		if c == 'u' {
			r, n := unicodeEscape(tok[1+i:])
			if !validRune(r) {
				return nil, parseError(string(tok[1+i:1+i+n]) + " is not a valid Unicode character")
			}
			out = utf8.AppendRune(out, r)
			i += n
			continue
		}
		switch c {
		case '"', '\'', '\\', '/':
			out = append(out, c)
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		default:
			return nil, errEscape
		}
		i += 2
	}
	return string(out), nil
}

// unicodeEscape decodes \uXXXX, or two of them that make a surrogate pair, at the beginning of b, and returns the length
// of what it looked at. The rune is not valid when the digits are not, or when surrogates are not paired.
func unicodeEscape(b []byte) (r rune, n int) {
	r = hex4(b[2:])
	n = min(6, len(b))
	if r >= 0xd800 && r <= 0xdbff && len(b) >= 8 && b[6] == '\\' && b[7] == 'u' {
		low := hex4(b[8:])
		if low < 0xdc00 || low > 0xdfff {
			return -1, n
		}
		return 0x10000 + (r&0x3ff)<<10 + low&0x3ff, 12
	}
	return r, n
}

// hex4 returns the value of four hexadecimal digits, or -1.
func hex4(b []byte) rune {
	if len(b) < 4 {
		return -1
	}
	var r rune
	for _, c := range b[:4] {
		switch {
		case c >= '0' && c <= '9':
			r = r<<4 | rune(c-'0')
		case c >= 'a' && c <= 'f':
			r = r<<4 | rune(c-'a'+10)
		case c >= 'A' && c <= 'F':
			r = r<<4 | rune(c-'A'+10)
		default:
			return -1
		}
	}
	return r
}

// validRune tells whether QEMU would let r appear in a string: not a surrogate, not a noncharacter.
func validRune(r rune) bool {
	switch {
	case r < 0 || r > utf8.MaxRune:
		return false
	case r >= 0xd800 && r <= 0xdfff:
		return false
	case r >= 0xfdd0 && r <= 0xfdef:
		return false
	default:
		return r&0xfffe != 0xfffe
	}
}

// decodeRune decodes the first sequence of b, which is not empty, as modified UTF-8: C0 80 is U+0000. For a sequence that
// is not valid it returns -1 and the length to skip. Sequences of up to six bytes, which UTF-8 had once, are skipped as one.
func decodeRune(b []byte) (r rune, n int) {
	lead := b[0]
	var size int
	var v uint32
	switch {
	case lead < 0x80:
		return rune(lead), 1
	case lead < 0xc0 || lead >= 0xfe:
		return -1, 1
	case lead < 0xe0:
		size, v = 2, uint32(lead&0x1f)
	case lead < 0xf0:
		size, v = 3, uint32(lead&0x0f)
	case lead < 0xf8:
		size, v = 4, uint32(lead&0x07)
	case lead < 0xfc:
		size, v = 5, uint32(lead&0x03)
	default:
		size, v = 6, uint32(lead&0x01)
	}
	for n = 1; n < size; n++ {
		if n >= len(b) || b[n]&0xc0 != 0x80 {
			return -1, n
		}
		v = v<<6 | uint32(b[n]&0x3f)
	}
	if v > utf8.MaxRune || !validRune(rune(v)) {
		return -1, n
	}
	if v == 0 && size == 2 {
		return 0, n
	}
	if v < [...]uint32{2: 0x80, 3: 0x800, 4: 0x10000, 5: math.MaxUint32, 6: math.MaxUint32}[size] {
		return -1, n
	}
	return rune(v), n
}
