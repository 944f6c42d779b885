package qmp

// Limits on one message. They bound what a connection can make us hold; QEMU allows 64 MiB and 2^21 tokens.
const (
	maxMessageText   = 4 << 20
	maxMessageTokens = 1 << 18
	maxNesting       = 1024
)

// retainedText is the size of the message buffer kept from one message to the next.
const retainedText = 64 << 10

type tokenKind uint8

const (
	tokenBeginObject tokenKind = iota
	tokenEndObject
	tokenBeginArray
	tokenEndArray
	tokenColon
	tokenComma
	tokenInteger
	tokenFloat
	tokenKeyword
	tokenString
)

// token is a lexical token; its text is lexer.text[start:end].
type token struct {
	kind       tokenKind
	start, end int
}

// lexState is a state of the lexer, or an outcome that ends a token.
type lexState uint8

const (
	// lexRecovery skips input after an error up to where a new message is likely to begin.
	lexRecovery lexState = iota
	lexStart
	lexSpace
	lexDouble
	lexDoubleEscape
	lexSingle
	lexSingleEscape
	lexSign
	lexZero
	lexDigits
	lexPoint
	lexFraction
	lexExponent
	lexExponentSign
	lexExponentDigits
	lexWord
	lexStates

	// Outcomes. acceptBase+kind completes a token of that kind.
	lexError   lexState = 0x3f
	acceptBase lexState = 0x20

	// lexAhead marks a transition that does not consume the byte.
	lexAhead lexState = 0x80
)

func accept(k tokenKind) lexState { return acceptBase + lexState(k) }

var lexTable = buildLexTable()

// buildLexTable describes RFC 8259 as QEMU extends it: strings may also be enclosed in apostrophes, and any sequence of
// lower-case letters is a word that the parser judges. Bytes of no use anywhere, such as 0xFF, and control characters
// inside strings are errors; after an error input is skipped up to a structural character, a control character other
// than tab, or 0xFE or 0xFF. Clients send 0xFF, or a line end, to get the lexer into a known state.
func buildLexTable() (t [lexStates][256]lexState) {
	fill := func(s lexState, lo, hi int, to lexState) {
		for c := lo; c <= hi; c++ {
			t[s][c] = to
		}
	}
	set := func(s lexState, chars string, to lexState) {
		for i := range len(chars) {
			t[s][chars[i]] = to
		}
	}
	for s := range lexStates {
		fill(s, 0, 0xff, lexError)
	}

	fill(lexRecovery, 0x20, 0xfd, lexRecovery)
	fill(lexRecovery, 0, 0x1f, lexStart|lexAhead)
	set(lexRecovery, "\t", lexRecovery)
	set(lexRecovery, "{}[]:,\xfe\xff", lexStart|lexAhead)

	set(lexStart, " \t\r\n", lexSpace)
	set(lexStart, "\"", lexDouble)
	set(lexStart, "'", lexSingle)
	set(lexStart, "-", lexSign)
	set(lexStart, "0", lexZero)
	set(lexStart, "123456789", lexDigits)
	fill(lexStart, 'a', 'z', lexWord)
	set(lexStart, "{", accept(tokenBeginObject))
	set(lexStart, "}", accept(tokenEndObject))
	set(lexStart, "[", accept(tokenBeginArray))
	set(lexStart, "]", accept(tokenEndArray))
	set(lexStart, ":", accept(tokenColon))
	set(lexStart, ",", accept(tokenComma))

	fill(lexSpace, 0, 0xff, lexStart|lexAhead)
	set(lexSpace, " \t\r\n", lexSpace)

	for _, q := range []struct {
		in, escape lexState
		quote      string
	}{{lexDouble, lexDoubleEscape, "\""}, {lexSingle, lexSingleEscape, "'"}} {
		fill(q.in, 0x20, 0xfd, q.in)
		fill(q.escape, 0x20, 0xfd, q.in)
		set(q.in, "\\", q.escape)
		set(q.in, q.quote, accept(tokenString))
	}

	const digits = "0123456789"
	set(lexSign, "0", lexZero)
	set(lexSign, "123456789", lexDigits)
	fill(lexZero, 0, 0xff, accept(tokenInteger)|lexAhead)
	set(lexZero, digits, lexError)
	set(lexZero, ".", lexPoint)
	fill(lexDigits, 0, 0xff, accept(tokenInteger)|lexAhead)
	set(lexDigits, digits, lexDigits)
	set(lexDigits, ".", lexPoint)
	set(lexDigits, "eE", lexExponent)
	set(lexPoint, digits, lexFraction)
	fill(lexFraction, 0, 0xff, accept(tokenFloat)|lexAhead)
	set(lexFraction, digits, lexFraction)
	set(lexFraction, "eE", lexExponent)
	set(lexExponent, "+-", lexExponentSign)
	set(lexExponent, digits, lexExponentDigits)
	set(lexExponentSign, digits, lexExponentDigits)
	fill(lexExponentDigits, 0, 0xff, accept(tokenFloat)|lexAhead)
	set(lexExponentDigits, digits, lexExponentDigits)

	fill(lexWord, 0, 0xff, accept(tokenKeyword)|lexAhead)
	fill(lexWord, 'a', 'z', lexWord)
	return t
}

// lexer cuts a stream of bytes into messages. It counts braces and brackets and hands over what it has once both counts
// are back to zero, or one is below it. The zero value must be initialised with reset.
type lexer struct {
	state lexState

	// text holds the tokens of the message so far, and of the token being read from tokenStart on.
	text       []byte
	tokenStart int
	tokens     []token

	braces, brackets int
}

func newLexer() *lexer { return &lexer{state: lexStart} }

// feed consumes bytes of data until a message is complete and returns how many. When done is true, value or err is the
// message. Otherwise all of data has been consumed.
func (l *lexer) feed(data []byte) (n int, value any, err *Error, done bool) {
	for n < len(data) {
		c := data[n]
		next := lexTable[l.state][c]
		if next&lexAhead == 0 {
			l.text = append(l.text, c)
			n++
		}
		next &^= lexAhead

		switch {
		case next == lexError:
			stray := cString(l.text[l.tokenStart:])
			err := Errorf("JSON parse error, stray '%s'", stray)
			l.reset(lexRecovery)
			return n, nil, err, true

		case next >= acceptBase:
			l.state = lexStart
			value, err, done := l.endToken(tokenKind(next - acceptBase))
			if done {
				l.reset(lexStart)
				return n, value, err, true
			}

		case next == lexStart || next == lexSpace || next == lexRecovery:
			l.text = l.text[:l.tokenStart]
			l.state = next

		default:
			l.state = next
			if len(l.text)-l.tokenStart > maxMessageText {
				l.reset(lexRecovery)
				return n, nil, errTokenSize, true
			}
		}
	}
	return n, nil, nil, false
}

var (
	errTokenSize  = Errorf("JSON token size limit exceeded")
	errTokenCount = Errorf("JSON token count limit exceeded")
	errNesting    = Errorf("JSON nesting depth limit exceeded")
)

// endToken files the token just read, and parses the message when that was its last.
func (l *lexer) endToken(kind tokenKind) (value any, err *Error, done bool) {
	switch kind {
	case tokenBeginObject:
		l.braces++
	case tokenEndObject:
		l.braces--
	case tokenBeginArray:
		l.brackets++
	case tokenEndArray:
		l.brackets--
	}
	switch {
	case len(l.text) > maxMessageText:
		return nil, errTokenSize, true
	case len(l.tokens) >= maxMessageTokens:
		return nil, errTokenCount, true
	case l.braces+l.brackets > maxNesting:
		return nil, errNesting, true
	}
	l.tokens = append(l.tokens, token{kind, l.tokenStart, len(l.text)})
	l.tokenStart = len(l.text)
	if (l.braces > 0 || l.brackets > 0) && l.braces >= 0 && l.brackets >= 0 {
		return nil, nil, false
	}
	value, err = parseTokens(l.text, l.tokens)
	return value, err, true
}

// reset forgets the message so far.
func (l *lexer) reset(s lexState) {
	l.state = s
	l.text, l.tokens, l.tokenStart = l.text[:0], l.tokens[:0], 0
	l.braces, l.brackets = 0, 0
	if cap(l.text) > retainedText {
		l.text, l.tokens = nil, nil
	}
}

// cString returns b up to its first NUL, which is how much of it QEMU prints.
func cString(b []byte) []byte {
	for i, c := range b {
		if c == 0 {
			return b[:i]
		}
	}
	return b
}
