package nbd

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
)

// errAborted is a client that ends the negotiation as it should.
var errAborted = errors.New("the client has ended the negotiation")

// negotiate goes through the handshake and the options ("Fixed newstyle
// negotiation") until the client has an export, which it has entered.
func (c *connection) negotiate() error {
	if err := c.conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return err
	}
	var greeting [18]byte
	binary.BigEndian.PutUint64(greeting[:], magicServer)
	binary.BigEndian.PutUint64(greeting[8:], magicOption)
	binary.BigEndian.PutUint16(greeting[16:], handshakeFixed|handshakeNoZeroes)
	if _, err := c.stream.Write(greeting[:]); err != nil {
		return err
	}
	var answer [4]byte
	if _, err := io.ReadFull(c.in, answer[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(answer[:])
	if flags&^uint32(handshakeFixed|handshakeNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x", ErrProtocol, flags)
	}
	c.fixed, c.noZeroes = flags&handshakeFixed != 0, flags&handshakeNoZeroes != 0
	for c.export == nil {
		if err := c.option(); err != nil {
			return err
		}
	}
	if err := c.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	return c.useSocket()
}

// option reads one option and answers it.
func (c *connection) option() error {
	var head [optionSize]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint64(head[:]); magic != magicOption {
		return fmt.Errorf("%w: an option begins with %#x", ErrProtocol, magic)
	}
	option, length := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
	if length > maxOptionData {
		c.refuse(option, repErrTooBig, "at most 64 KiB are possible")
		return fmt.Errorf("%w: option %d has %d bytes", ErrProtocol, option, length)
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(c.in, data); err != nil {
		return err
	}
	if !c.fixed && option != optExportName {
		return fmt.Errorf("%w: option %d without fixed newstyle", ErrProtocol, option)
	}
	if c.server.options.TLS != nil && !c.encrypted {
		switch option {
		case optStartTLS, optAbort:
		case optExportName:
			return fmt.Errorf("%w: an export is asked for before TLS", ErrRefused)
		default:
			return c.refuse(option, repErrTLSRequired, "this server wants TLS")
		}
	}
	switch option {
	case optExportName:
		return c.exportName(string(data))
	case optAbort:
		if err := c.reply(option, repAck, nil); err != nil {
			return err
		}
		return errAborted
	case optList:
		return c.list(data)
	case optStartTLS:
		return c.startTLS(data)
	case optInfo, optGo:
		return c.info(option, data)
	case optStructured:
		if len(data) != 0 {
			return c.refuse(option, repErrInvalid, "no data belongs here")
		}
		c.structured = true
		return c.reply(option, repAck, nil)
	case optListMeta, optSetMeta:
		return c.metaContexts(option, data)
	}
	return c.refuse(option, repErrUnsupported, "")
}

// reply sends a reply to an option.
func (c *connection) reply(option, kind uint32, data []byte) error {
	message := make([]byte, replySize, replySize+len(data))
	binary.BigEndian.PutUint64(message, magicReply)
	binary.BigEndian.PutUint32(message[8:], option)
	binary.BigEndian.PutUint32(message[12:], kind)
	binary.BigEndian.PutUint32(message[16:], uint32(len(data)))
	_, err := c.stream.Write(append(message, data...))
	return err
}

func (c *connection) refuse(option, kind uint32, why string) error {
	return c.reply(option, kind, []byte(why))
}

func (c *connection) exportName(name string) error {
	x := c.server.find(name)
	if x == nil || !c.enter(x) {
		return fmt.Errorf("%w: no export %.80q", ErrRefused, name)
	}
	message := make([]byte, 10, 134)
	binary.BigEndian.PutUint64(message, uint64(c.size))
	binary.BigEndian.PutUint16(message[8:], c.flags())
	if !c.noZeroes {
		message = message[:134]
	}
	_, err := c.stream.Write(message)
	return err
}

// flags are the transmission flags of c's export.
func (c *connection) flags() uint16 {
	if c.structured {
		return c.export.flags | flagDontFragment
	}
	return c.export.flags
}

func (c *connection) list(data []byte) error {
	if len(data) != 0 {
		return c.refuse(optList, repErrInvalid, "no data belongs here")
	}
	c.server.mu.Lock()
	var all []*exported
	for _, x := range c.server.exports {
		if !x.leaving {
			all = append(all, x)
		}
	}
	c.server.mu.Unlock()
	slices.SortFunc(all, func(a, b *exported) int { return strings.Compare(a.Name, b.Name) })
	for _, x := range all {
		entry := binary.BigEndian.AppendUint32(nil, uint32(len(x.Name)))
		entry = append(append(entry, x.Name...), x.Description...)
		if err := c.reply(optList, repServer, entry); err != nil {
			return err
		}
	}
	return c.reply(optList, repAck, nil)
}

func (c *connection) startTLS(data []byte) error {
	switch {
	case len(data) != 0:
		return c.refuse(optStartTLS, repErrInvalid, "no data belongs here")
	case c.server.options.TLS == nil:
		return c.refuse(optStartTLS, repErrPolicy, "this server has no certificate")
	case c.encrypted:
		return c.refuse(optStartTLS, repErrInvalid, "TLS is on")
	case c.in.Buffered() > 0:
		// What came in the clear must not be taken for what comes encrypted.
		return fmt.Errorf("%w: %d bytes follow the option that starts TLS", ErrProtocol, c.in.Buffered())
	}
	if err := c.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	encrypted := tls.Server(c.conn, c.server.options.TLS)
	if err := encrypted.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	c.encrypted = true // nothing was agreed on before, since nothing else was answered
	c.use(encrypted)
	return nil
}

// info answers optInfo and optGo.
func (c *connection) info(option uint32, data []byte) error {
	d := decoder{data}
	name := d.text()
	kinds := make([]uint16, 0, 4)
	for range d.uint16() {
		kinds = append(kinds, d.uint16())
		if d.failed() {
			break
		}
	}
	if d.failed() || len(d.rest) != 0 {
		return c.refuse(option, repErrInvalid, "a name and a list of information requests belong here")
	}
	x := c.server.find(name)
	if x == nil {
		return c.refuse(option, repErrUnknown, fmt.Sprintf("there is no export %.80q", name))
	}
	send := func(kind uint16, data []byte) error {
		return c.reply(option, repInfo, append(binary.BigEndian.AppendUint16(nil, kind), data...))
	}
	if slices.Contains(kinds, infoName) {
		if err := send(infoName, []byte(x.Name)); err != nil {
			return err
		}
	}
	if slices.Contains(kinds, infoDescription) && x.Description != "" {
		if err := send(infoDescription, []byte(x.Description)); err != nil {
			return err
		}
	}
	minimum, preferred, maximum := x.blockSizes()
	sizes := binary.BigEndian.AppendUint32(nil, minimum)
	sizes = binary.BigEndian.AppendUint32(sizes, preferred)
	sizes = binary.BigEndian.AppendUint32(sizes, maximum)
	if err := send(infoBlockSize, sizes); err != nil {
		return err
	}
	size, flags := x.Node.Size(), x.flags
	if option == optGo {
		if !c.enter(x) {
			return c.refuse(option, repErrUnknown, fmt.Sprintf("export %.80q is leaving", name))
		}
		size = c.size
	}
	if c.structured {
		flags |= flagDontFragment
	}
	if err := send(infoExport, binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(nil, uint64(size)), flags)); err != nil {
		return err
	}
	return c.reply(option, repAck, nil)
}

// metaContexts answers optListMeta and optSetMeta.
func (c *connection) metaContexts(option uint32, data []byte) error {
	if option == optSetMeta {
		c.contextsOf, c.contexts = "", nil
	}
	d := decoder{data}
	name := d.text()
	count := d.uint32()
	var queries []string
	for i := uint32(0); i < count && !d.failed(); i++ {
		queries = append(queries, d.text())
	}
	switch {
	case d.failed() || len(d.rest) != 0:
		return c.refuse(option, repErrInvalid, "a name and a list of queries belong here")
	case !c.structured:
		return c.refuse(option, repErrInvalid, "structured replies come first")
	}
	x := c.server.find(name)
	if x == nil {
		return c.refuse(option, repErrUnknown, fmt.Sprintf("there is no export %.80q", name))
	}
	var chosen []contextID
	for id, context := range x.contexts() {
		if !asksFor(queries, context, option == optListMeta) {
			continue
		}
		chosen = append(chosen, contextID(id))
		told := contextID(id)
		if option == optListMeta {
			told = 0 // there it has no meaning
		}
		if err := c.reply(option, repMetaContext, append(binary.BigEndian.AppendUint32(nil, told), context...)); err != nil {
			return err
		}
	}
	if option == optSetMeta {
		c.contextsOf, c.contexts = name, chosen
	}
	return c.reply(option, repAck, nil)
}

// asksFor tells whether the queries name the context. A list may also name
// all that begin with "base:", "qemu:" or "qemu:dirty-bitmap:", or, by no query, all.
func asksFor(queries []string, context string, list bool) bool {
	if list && len(queries) == 0 {
		return true
	}
	return slices.ContainsFunc(queries, func(q string) bool {
		return q == context || list && strings.HasSuffix(q, ":") && strings.HasPrefix(context, q)
	})
}

// decoder takes apart the data of an option; rest is nil once something was
// missing.
type decoder struct{ rest []byte }

func (d *decoder) failed() bool { return d.rest == nil }

func (d *decoder) take(n uint32) []byte {
	if uint64(n) > uint64(len(d.rest)) {
		d.rest = nil
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) uint16() uint16 {
	if b := d.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// text takes a string and its length.
func (d *decoder) text() string {
	n := d.uint32()
	if n > maxString {
		d.rest = nil
	}
	return string(d.take(n))
}

// use sends and receives by conn from now on.
func (c *connection) use(conn net.Conn) {
	c.stream = conn
	c.in = bufio.NewReaderSize(source{c}, 64<<10)
}
