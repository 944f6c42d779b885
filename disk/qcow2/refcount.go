package qcow2

import (
	"encoding/binary"
	"fmt"
)

// recount counts the references to each cluster, writes the counts, and takes
// the mark away that says they are not right. Nothing else uses the image.
func (n *Node) recount() error {
	counts, err := n.references()
	if err != nil {
		return fmt.Errorf("count references: %w", err)
	}
	if err := n.writeCounts(counts); err != nil {
		return fmt.Errorf("write reference counts: %w", err)
	}
	if err := n.writeIncompatible(n.header.Incompatible &^ FeatureDirty); err != nil {
		return err
	}
	n.w.marked = false
	return nil
}

// counts are references by cluster of the file.
type counts struct {
	bits uint32
	of   []uint16
}

// add counts one reference to each cluster that length bytes at off touch.
func (c *counts) add(off, length int64) error {
	for i := off >> c.bits; i <= (off+length-1)>>c.bits; i++ {
		for int64(len(c.of)) <= i {
			c.of = append(c.of, 0)
		}
		if c.of[i] == 1<<16-1 {
			return fmt.Errorf("%w: cluster %d has too many references", ErrCorrupt, i)
		}
		c.of[i]++
	}
	return nil
}

// references counts what header, L1 and L2 tables refer to.
func (n *Node) references() (*counts, error) {
	h, size := n.header, n.header.ClusterSize()
	c := &counts{bits: h.ClusterBits, of: make([]uint16, 0, n.w.end/size+8)}
	if err := c.add(0, size); err != nil {
		return nil, err
	}
	if h.L1Entries > 0 {
		if err := c.add(h.L1Offset, int64(h.L1Entries)*entrySize); err != nil {
			return nil, err
		}
	}
	for i, entry := range n.l1 {
		at := int64(entry & offsetMask)
		if at == 0 {
			continue
		}
		if at%size != 0 || at >= n.w.end {
			return nil, fmt.Errorf("%w: L2 table at %#x (L1 entry %d)", ErrCorrupt, at, i)
		}
		if err := c.add(at, size); err != nil {
			return nil, err
		}
		t, err := n.w.table(&n.image, at)
		if err != nil {
			return nil, err
		}
		for j := int64(0); j < int64(len(t)); j += entrySize {
			v := binary.BigEndian.Uint64(t[j:])
			e, err := n.decode(v, int64(i)*n.header.l2Entries()+j/entrySize)
			if err != nil {
				return nil, err
			}
			switch {
			case e.kind == compressed:
				err = c.add(e.host, e.csize)
			case e.kind == data || e.kind == zero && e.host != 0:
				err = c.add(e.host, size)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

// writeCounts writes the counts to the image's reference count blocks, and adds
// blocks, and a larger table of them, where there are too few. The image is
// marked as dirty meanwhile, so that it can be interrupted.
func (n *Node) writeCounts(c *counts) error {
	h, size := n.header, n.header.ClusterSize()
	perBlock := size / 2
	table := make([]byte, int64(h.RefcountTables)*size)
	tableAt := h.RefcountOffset
	if tableAt <= 0 || tableAt%size != 0 || tableAt+int64(len(table)) > n.file.Size() || len(table) == 0 || len(table) > 8<<20 {
		table = nil // useless: made anew
	} else if err := n.file.Readv([][]byte{table}, tableAt); err != nil {
		return err
	}
	entry := func(i int64) int64 { return int64(binary.BigEndian.Uint64(table[i*entrySize:]) & offsetMask) }
	// Blocks that lie where something else does, or twice, are not used again.
	blocks := map[int64]int64{} // place by index
	taken := map[int64]bool{}
	for i := range int64(len(table)) / entrySize {
		at := entry(i)
		if at == 0 || at%size != 0 || at >= n.w.end || taken[at] || at>>c.bits < int64(len(c.of)) && c.of[at>>c.bits] != 0 {
			continue
		}
		taken[at] = true
		blocks[i] = at
	}
	if table != nil {
		for at := tableAt; at < tableAt+int64(len(table)); at += size {
			if i := at >> c.bits; taken[at] || i < int64(len(c.of)) && c.of[i] != 0 {
				table = nil
				break
			}
		}
	}
	// Each block, and the table, may make another block necessary.
	for {
		clusters := (n.w.end + size - 1) / size
		need := (clusters + perBlock - 1) / perBlock
		grown := false
		if need*entrySize > int64(len(table)) {
			length := (need*entrySize*3/2 + size - 1) / size * size
			table, tableAt, grown = make([]byte, length), n.w.alloc(length), true
		}
		for i := range need {
			if blocks[i] == 0 {
				blocks[i], grown = n.w.alloc(size), true
			}
		}
		if !grown {
			break
		}
	}
	for i, at := range blocks {
		if i >= int64(len(table))/entrySize {
			continue
		}
		if err := c.add(at, size); err != nil {
			return err
		}
	}
	if err := c.add(tableAt, int64(len(table))); err != nil {
		return err
	}
	clear(table)
	b := make([]byte, size)
	for i, at := range blocks {
		if i >= int64(len(table))/entrySize {
			continue
		}
		binary.BigEndian.PutUint64(table[i*entrySize:], uint64(at))
		for j := range perBlock {
			v := uint16(0)
			if k := i*perBlock + j; k < int64(len(c.of)) {
				v = c.of[k]
			}
			binary.BigEndian.PutUint16(b[j*2:], v)
		}
		if err := n.file.Writev([][]byte{b}, at); err != nil {
			return err
		}
	}
	if err := n.file.Writev([][]byte{table}, tableAt); err != nil {
		return err
	}
	if err := n.file.Flush(); err != nil {
		return err
	}
	clusters := uint32(int64(len(table)) / size)
	if tableAt == h.RefcountOffset && clusters == h.RefcountTables {
		return nil
	}
	where := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, uint64(tableAt)), clusters)
	if err := n.file.Writev([][]byte{where}, 48); err != nil {
		return err
	}
	h.RefcountOffset, h.RefcountTables = tableAt, clusters
	return n.file.Flush()
}
