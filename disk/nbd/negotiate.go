package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/url"
	"strings"
	"time"
)

// maxReplies is how many replies one option may have, those to a list included.
const maxReplies = 4096

// maxNegotiation is how many bytes of replies there may be in all.
const maxNegotiation = 8 << 20

// agreed is what a client and a server have agreed on.
type agreed struct {
	size                        int64
	flags                       uint16
	minimum, preferred, maximum uint32 // block sizes
	structured                  bool
	description                 string
}

// negotiation is a connection on which options are haggled over.
type negotiation struct {
	conn, stream    net.Conn // stream is conn, or TLS over it
	in              *bufio.Reader
	fixed, noZeroes bool
	structured      bool
	contexts        map[string]contextID
	bytes           int         // of replies so far
	stop            func() bool // ends the watch over the context
	ctx             context.Context
}

// optionError is a server's refusal of an option.
type optionError struct {
	kind    uint32
	message string
}

func (e *optionError) Error() string {
	why := optionErrors[e.kind]
	if why == "" {
		why = fmt.Sprintf("error %#x", e.kind)
	}
	if e.message != "" {
		return fmt.Sprintf("%s: %q", why, e.message)
	}
	return why
}

func (e *optionError) Unwrap() error { return ErrRefused }

// connect makes a connection and goes as far as TLS.
func connect(ctx context.Context, address string, config *tls.Config) (*negotiation, error) {
	conn, err := dial(ctx, address)
	if err != nil {
		return nil, err
	}
	n := negotiate(ctx, conn)
	err = n.greet()
	if err == nil && config != nil {
		if host, _, splitErr := net.SplitHostPort(address); splitErr == nil && config.ServerName == "" {
			config = config.Clone()
			config.ServerName = host
		}
		err = n.startTLS(config)
	}
	if err != nil {
		err = n.finish(err)
		conn.Close()
		return nil, fmt.Errorf("NBD server %s: %w", address, err)
	}
	return n, nil
}

// negotiate begins a negotiation that ends with ctx.
func negotiate(ctx context.Context, conn net.Conn) *negotiation {
	n := &negotiation{conn: conn, stream: conn, in: bufio.NewReaderSize(conn, 64<<10), ctx: ctx}
	n.stop = context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	return n
}

// finish ends the watch over the context, and returns its error if that is what err
// comes from.
func (n *negotiation) finish(err error) error {
	if !n.stop() {
		return errors.Join(n.ctx.Err(), err)
	}
	return err
}

func (n *negotiation) greet() error {
	var b [18]byte
	if _, err := io.ReadFull(n.in, b[:]); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if magic := binary.BigEndian.Uint64(b[:]); magic != magicServer {
		return fmt.Errorf("%w: it greets with %q, so it is no NBD server", ErrProtocol, b[:8])
	}
	if magic := binary.BigEndian.Uint64(b[8:]); magic != magicOption {
		return fmt.Errorf("%w: it greets with %#x, not with newstyle negotiation", ErrProtocol, magic)
	}
	flags := binary.BigEndian.Uint16(b[16:])
	n.fixed, n.noZeroes = flags&handshakeFixed != 0, flags&handshakeNoZeroes != 0
	var answer [4]byte
	binary.BigEndian.PutUint32(answer[:], uint32(flags&(handshakeFixed|handshakeNoZeroes)))
	_, err := n.stream.Write(answer[:])
	return err
}

func (n *negotiation) send(option uint32, data []byte) error {
	message := binary.BigEndian.AppendUint64(nil, magicOption)
	message = binary.BigEndian.AppendUint32(message, option)
	message = binary.BigEndian.AppendUint32(message, uint32(len(data)))
	_, err := n.stream.Write(append(message, data...))
	return err
}

// ask sends an option and hands each reply to f, to the last one, repAck. An error
// reply is an *optionError.
func (n *negotiation) ask(option uint32, data []byte, f func(kind uint32, data []byte) error) error {
	if err := n.send(option, data); err != nil {
		return err
	}
	for range maxReplies {
		var head [replySize]byte
		if _, err := io.ReadFull(n.in, head[:]); err != nil {
			return fmt.Errorf("reply to option %d: %w", option, err)
		}
		magic, about := binary.BigEndian.Uint64(head[:]), binary.BigEndian.Uint32(head[8:])
		kind, length := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if magic != magicReply || about != option || length > maxOptionData {
			return fmt.Errorf("%w: reply to option %d: magic %#x, option %d, type %#x, %d bytes", ErrProtocol, option, magic, about, kind, length)
		}
		if n.bytes += replySize + int(length); n.bytes > maxNegotiation {
			return fmt.Errorf("%w: replies to options of more than %d bytes", ErrProtocol, maxNegotiation)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(n.in, data); err != nil {
			return fmt.Errorf("reply to option %d: %w", option, err)
		}
		switch {
		case kind == repAck && length == 0:
			return nil
		case kind&repError != 0:
			return &optionError{kind, string(data[:min(len(data), maxString)])}
		case f == nil || kind == repAck:
			return fmt.Errorf("%w: reply to option %d: type %#x of %d bytes", ErrProtocol, option, kind, length)
		}
		if err := f(kind, data); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d replies to option %d", ErrProtocol, maxReplies, option)
}

func (n *negotiation) startTLS(config *tls.Config) error {
	if !n.fixed {
		return fmt.Errorf("%w: it cannot do TLS", ErrRefused)
	}
	if err := n.ask(optStartTLS, nil, nil); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	if n.in.Buffered() > 0 {
		return fmt.Errorf("%w: %d bytes follow the reply that starts TLS", ErrProtocol, n.in.Buffered())
	}
	encrypted := tls.Client(n.conn, config)
	if err := encrypted.HandshakeContext(n.ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	n.stream, n.in = encrypted, bufio.NewReaderSize(encrypted, 64<<10)
	return nil
}

// choose takes the export; the transmission can begin.
func (n *negotiation) choose(export string, contexts []string) (agreed, error) {
	if len(export) > maxString {
		return agreed{}, fmt.Errorf("%w: names are at most %d bytes", ErrExport, maxString)
	}
	if !n.fixed {
		return n.chooseOld(export, contexts)
	}
	if err := n.askStructured(); err != nil {
		return agreed{}, err
	}
	if n.structured {
		if err := n.setContexts(export, append([]string{ContextAllocation}, contexts...)); err != nil {
			return agreed{}, err
		}
	}
	for _, context := range contexts {
		if _, ok := n.contexts[context]; !ok {
			return agreed{}, fmt.Errorf("%w: it has no metadata context %q", ErrRefused, context)
		}
	}
	a, err := n.askExport(optGo, export)
	if refusal := (*optionError)(nil); errors.As(err, &refusal) && refusal.kind == repErrUnsupported {
		return n.chooseOld(export, contexts)
	}
	return a, err
}

func (n *negotiation) askStructured() error {
	err := n.ask(optStructured, nil, nil)
	n.structured = err == nil
	if errors.Is(err, ErrRefused) {
		return nil
	}
	return err
}

// chooseOld takes the export from a server that does not know optGo.
func (n *negotiation) chooseOld(export string, contexts []string) (agreed, error) {
	if len(contexts) > len(n.contexts) {
		return agreed{}, fmt.Errorf("%w: it has no metadata contexts", ErrRefused)
	}
	if err := n.send(optExportName, []byte(export)); err != nil {
		return agreed{}, err
	}
	b := make([]byte, 10, 134)
	if !n.noZeroes {
		b = b[:134]
	}
	if _, err := io.ReadFull(n.in, b); err != nil {
		return agreed{}, fmt.Errorf("%w: it ends the connection instead of giving the export: %w", ErrRefused, err)
	}
	return n.agree(binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:]), agreed{minimum: 1, preferred: 4096, maximum: maxPayload})
}

// agree checks what a server tells of an export.
func (n *negotiation) agree(size uint64, flags uint16, a agreed) (agreed, error) {
	a.structured = n.structured
	switch {
	case size > math.MaxInt64-maxPayload:
		return a, fmt.Errorf("%w: an export of %d bytes", ErrProtocol, size)
	case flags&flagHasFlags == 0:
		flags = 0
	}
	a.size, a.flags = int64(size), flags
	unit := a.minimum
	switch {
	case unit == 0 || unit&(unit-1) != 0 || unit > 64<<10,
		a.preferred < unit || a.preferred&(a.preferred-1) != 0,
		a.maximum < unit || a.maximum < math.MaxUint32 && a.maximum%unit != 0:
		return a, fmt.Errorf("%w: block sizes %d, %d and %d", ErrProtocol, a.minimum, a.preferred, a.maximum)
	case a.size%int64(unit) != 0:
		return a, fmt.Errorf("%w: an export of %d bytes with blocks of %d", ErrProtocol, size, unit)
	}
	a.maximum = min(a.maximum, maxPayload)
	return a, nil
}

// askExport asks by optGo or optInfo.
func (n *negotiation) askExport(option uint32, export string) (agreed, error) {
	a := agreed{minimum: 1, preferred: 4096, maximum: maxPayload}
	var size uint64
	var flags uint16
	known := false
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = append(data, 0, 2, 0, infoBlockSize, 0, infoDescription)
	err := n.ask(option, data, func(kind uint32, data []byte) error {
		d := decoder{data}
		about := d.uint16()
		switch {
		case kind != repInfo || d.failed():
			return fmt.Errorf("%w: reply of type %#x to an export", ErrProtocol, kind)
		case about == infoExport && len(d.rest) == 10:
			size, flags, known = binary.BigEndian.Uint64(d.rest), binary.BigEndian.Uint16(d.rest[8:]), true
		case about == infoBlockSize && len(d.rest) == 12:
			a.minimum, a.preferred, a.maximum = d.uint32(), d.uint32(), d.uint32()
		case about == infoDescription:
			a.description = string(d.rest[:min(len(d.rest), maxString)])
		case about == infoExport || about == infoBlockSize:
			return fmt.Errorf("%w: %d bytes of information %d", ErrProtocol, len(data), about)
		}
		return nil
	})
	if err != nil {
		return a, err
	}
	if !known {
		return a, fmt.Errorf("%w: it tells no size of the export", ErrProtocol)
	}
	return n.agree(size, flags, a)
}

func (n *negotiation) metaQuery(export string, queries []string) []byte {
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = binary.BigEndian.AppendUint32(data, uint32(len(queries)))
	for _, q := range queries {
		data = append(binary.BigEndian.AppendUint32(data, uint32(len(q))), q...)
	}
	return data
}

func (n *negotiation) setContexts(export string, names []string) error {
	n.contexts = map[string]contextID{}
	used := map[contextID]bool{}
	err := n.ask(optSetMeta, n.metaQuery(export, names), func(kind uint32, data []byte) error {
		d := decoder{data}
		id := d.uint32()
		name := string(d.rest)
		if _, again := n.contexts[name]; kind != repMetaContext || d.failed() || again || used[id] {
			return fmt.Errorf("%w: metadata context %.80q, ID %d, type %#x", ErrProtocol, name, id, kind)
		}
		if len(used) == len(names) {
			return fmt.Errorf("%w: more metadata contexts than were asked for", ErrProtocol)
		}
		n.contexts[name], used[id] = id, true
		return nil
	})
	if errors.Is(err, ErrRefused) { // the export is told about by what comes next
		return nil
	}
	return err
}

// ExportInfo is what a server tells of an export.
type ExportInfo struct {
	Name, Description string
	Size              int64 // bytes
	ReadOnly          bool
	Contexts          []string // metadata contexts
}

// List asks the server at address, "unix:PATH" or "HOST:PORT", for its exports.
func List(ctx context.Context, address string, config *tls.Config) ([]ExportInfo, error) {
	n, err := connect(ctx, address, config)
	if err != nil {
		return nil, err
	}
	defer n.conn.Close()
	list, err := n.list()
	if err = n.finish(err); err != nil {
		return nil, fmt.Errorf("NBD server %s: list of exports: %w", address, err)
	}
	return list, nil
}

func (n *negotiation) list() ([]ExportInfo, error) {
	if !n.fixed {
		return nil, fmt.Errorf("%w: it does not list exports", ErrRefused)
	}
	var list []ExportInfo
	err := n.ask(optList, nil, func(kind uint32, data []byte) error {
		d := decoder{data}
		name := d.text()
		if kind != repServer || d.failed() || len(d.rest) > maxString {
			return fmt.Errorf("%w: reply of type %#x to a list", ErrProtocol, kind)
		}
		list = append(list, ExportInfo{Name: name, Description: string(d.rest)})
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := n.askStructured(); err != nil {
		return nil, err
	}
	for i := range list {
		x := &list[i]
		a, err := n.askExport(optInfo, x.Name)
		if errors.Is(err, ErrRefused) {
			continue // removed meanwhile, or a server that cannot tell
		}
		if err != nil {
			return nil, err
		}
		x.Size, x.ReadOnly = a.size, a.flags&flagReadOnly != 0
		if !n.structured {
			continue
		}
		err = n.ask(optListMeta, n.metaQuery(x.Name, nil), func(kind uint32, data []byte) error {
			if kind != repMetaContext || len(data) < 4 || len(data) > 4+maxString {
				return fmt.Errorf("%w: reply of type %#x to a list of contexts", ErrProtocol, kind)
			}
			x.Contexts = append(x.Contexts, string(data[4:]))
			return nil
		})
		if err != nil && !errors.Is(err, ErrRefused) {
			return nil, err
		}
	}
	// Leaving is a courtesy; the list is there.
	_ = n.send(optAbort, nil)
	return list, nil
}

// uri is what ParseURI takes apart.
func uri(address, export string) string {
	if path, ok := strings.CutPrefix(address, "unix:"); ok || strings.HasPrefix(address, "/") {
		return (&url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: url.Values{"socket": {path}}.Encode()}).String()
	}
	return (&url.URL{Scheme: "nbd", Host: address, Path: "/" + export}).String()
}
