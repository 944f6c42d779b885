package extfs

// superBlock is the block that the superblock is in.
func (f *fileSystem) superBlock() int64 {
	if f.blockSize == 1024 {
		return 1
	}
	return 0
}

func (f *fileSystem) hasMetaBG() bool      { return f.incompat&incompatMetaBG != 0 }
func (f *fileSystem) descsPerBlock() int64 { return f.blockSize / f.descSize }

// groupStart is a group's first block, groupEnd the block behind its last.
func (f *fileSystem) groupStart(g int64) int64 { return f.firstBlock + g*f.blocksPerGroup }

func (f *fileSystem) groupEnd(g int64) int64 {
	return min(f.groupStart(g)+f.blocksPerGroup, f.blocks)
}

// superIn is where in a group the superblock, or its backup, would be.
func (f *fileSystem) superIn(g int64) int64 {
	if g == 0 {
		return f.superBlock()
	}
	return f.groupStart(g)
}

// hasSuper tells whether a group has the superblock or a backup of it.
func (f *fileSystem) hasSuper(g int64) bool {
	switch {
	case g == 0:
		return true
	case f.compat&compatSparseSuper2 != 0:
		return g == f.backups[0] || g == f.backups[1]
	case g == 1 || !f.hasRO(roSparseSuper):
		return true
	}
	for _, base := range [...]int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

// inMetaGroup tells that a group's descriptors are with it, not behind the
// superblocks.
func (f *fileSystem) inMetaGroup(g int64) bool {
	return f.hasMetaBG() && g/f.descsPerBlock() >= f.firstMetaBG
}

// descBlock is the i-th block of descriptors.
func (f *fileSystem) descBlock(i int64) int64 {
	g := i * f.descsPerBlock()
	if !f.inMetaGroup(g) {
		return f.superBlock() + 1 + i
	}
	at := f.superIn(g)
	if f.hasSuper(g) {
		at++
	}
	return at
}

// baseBlocks are the blocks at a group's beginning that hold superblock and
// descriptors, and those reserved for more descriptors: n from first on.
func (f *fileSystem) baseBlocks(g int64) (first, n int64) {
	first = f.superIn(g)
	super := f.hasSuper(g)
	if super {
		n = 1
	}
	if f.inMetaGroup(g) {
		switch last := f.descsPerBlock() - 1; g % f.descsPerBlock() {
		case 0, 1, last:
			n++
		}
		return first, n
	}
	if super {
		if f.hasMetaBG() {
			n += f.firstMetaBG
		} else {
			n += f.descBlocks + f.reservedGDT
		}
	}
	return first, n
}
