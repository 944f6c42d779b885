/*
 * Guest-physical memory and the arenas that workloads run in.
 *
 *   2 MiB   the image
 *   4 MiB   meta: page tables, permutations (grows upwards, identity mapped)
 *   heap    what arenas are made of: the rest of RAM, low and high
 *   DMA     at the top of low RAM: rings and buffers (identity mapped)
 *
 * Page tables only ever change from not present to present, so ring 3 can
 * write them itself and nothing needs a TLB flush: each arena gets a slot of
 * the top-level table of its own.
 */
#include "probe.h"

#define PTE_SMALL 0x67
#define PTE_TABLE 0x67
#define PTE_LARGE 0xe7
#define META_START (4 * MIB)
#define ARENA_SLOT 2 /* of the top-level table: 1 TiB */
#define SLOT_BYTES (512 * GIB)
#define RANGES 16

extern u64 start_info, pml4[512], pdpt[512];

static struct { u64 gpa, pages; } heap[RANGES];
static int heap_ranges;
static u64 ram;
static u64 meta_next, meta_end;
static u64 dma_next, dma_end;
static struct arena current;
static u64 arenas;

void memory_init(void)
{
	const u8 *info = (const u8 *)start_info;
	const u8 *map = (const u8 *)*(u64 *)(info + 40);
	u32 entries = *(u32 *)(info + 4) >= 1 ? *(u32 *)(info + 48) : 0;
	u64 low_end = 0;
	for (u32 i = 0; i < entries; i++, map += 24) {
		u64 gpa = *(u64 *)map, size = *(u64 *)(map + 8);
		if (*(u32 *)(map + 16) != 1)
			continue;
		ram += size;
		if (gpa <= META_START && gpa + size > META_START)
			low_end = gpa + size;
	}
	low_end &= ~(PAGE - 1);
	u64 dma = ram / 4 < 64 * MIB ? ram / 4 : 64 * MIB;
	u64 meta = ram / 64 < 4 * MIB ? 4 * MIB : ram / 64 & ~(2 * MIB - 1);
	dma &= ~(PAGE - 1);
	meta_next = META_START;
	meta_end = META_START + meta;
	if (low_end < meta_end + dma)
		return; /* too little memory: no heap, every workload that needs one says so */
	dma_end = low_end;
	dma_next = low_end - dma;
	heap[heap_ranges].gpa = meta_end;
	heap[heap_ranges++].pages = (dma_next - meta_end) / PAGE;
	map = (const u8 *)*(u64 *)(info + 40);
	for (u32 i = 0; i < entries && heap_ranges < RANGES; i++, map += 24) {
		u64 gpa = *(u64 *)map, size = *(u64 *)(map + 8);
		if (*(u32 *)(map + 16) == 1 && gpa >= low_end) {
			heap[heap_ranges].gpa = gpa;
			heap[heap_ranges++].pages = size / PAGE;
		}
	}
}

u64 ram_bytes(void) { return ram; }

u64 heap_pages(void)
{
	u64 n = 0;
	for (int i = 0; i < heap_ranges; i++)
		n += heap[i].pages;
	return n;
}

static u64 heap_frame(u64 index)
{
	for (int i = 0; i < heap_ranges; i++) {
		if (index < heap[i].pages)
			return heap[i].gpa + index * PAGE;
		index -= heap[i].pages;
	}
	return 0;
}

void *meta_alloc(u64 bytes)
{
	bytes = (bytes + PAGE - 1) & ~(PAGE - 1);
	if (bytes > meta_end - meta_next)
		return NULL;
	u64 *p = (u64 *)meta_next;
	meta_next += bytes;
	for (u64 i = 0; i < bytes / 8; i++)
		p[i] = 0;
	return p;
}

u64 meta_mark(void) { return meta_next; }
void meta_release(u64 mark) { meta_next = mark; }

void *dma_alloc(u64 bytes)
{
	bytes = (bytes + PAGE - 1) & ~(PAGE - 1);
	if (bytes > dma_end - dma_next)
		return NULL;
	void *p = (void *)dma_next;
	dma_next += bytes;
	return p;
}

u64 dma_mark(void) { return dma_next; }
void dma_release(u64 mark) { dma_next = mark; }

u32 *shuffled(u64 n, u64 seed)
{
	u32 *p = meta_alloc(n * sizeof *p);
	if (!p)
		return NULL;
	for (u64 i = 0; i < n; i++)
		p[i] = i;
	for (u64 i = n - 1; i > 0 && i < n; i--) {
		u64 j = random_next(&seed) % (i + 1);
		u32 t = p[i];
		p[i] = p[j];
		p[j] = t;
	}
	return p;
}

/*
 * map_pages builds a tree of tables over n pages and returns its root, a page
 * for one slot of the top-level table. frame gives each page's entry.
 */
static u64 *map_pages(u64 n, const u32 *order)
{
	u64 *root = meta_alloc(PAGE), *pd = NULL, *pt = NULL;
	if (!root)
		return NULL;
	for (u64 i = 0; i < n; i++) {
		if (i % (512 * 512) == 0) {
			if (!(pd = meta_alloc(PAGE)))
				return NULL;
			root[i / (512 * 512)] = (u64)pd + PTE_TABLE;
		}
		if (i % 512 == 0) {
			if (!(pt = meta_alloc(PAGE)))
				return NULL;
			pd[i / 512 % 512] = (u64)pt + PTE_TABLE;
		}
		pt[i % 512] = heap_frame(order ? order[i] : i) + PTE_SMALL;
	}
	return root;
}

/*
 * arena_for returns the current arena, or makes one where there is none yet
 * or the workload asks for a size, a scatter or a mapping seed of its own.
 */
struct arena *arena_for(const struct work *w)
{
	u64 size = number(w, "size", 0) / PAGE;
	bool remap = word(w, "scatter", NULL) || word(w, "within", NULL);
	if (current.pages && !remap && (!size || size == current.pages))
		return &current;
	u64 within = number(w, "within", 0) / PAGE;
	if (!within)
		within = size ? size : heap_pages();
	if (within > heap_pages())
		within = heap_pages();
	if (!size)
		size = within;
	if (!size || size > within || arenas >= 200) {
		fail(w->name, "size");
		return NULL;
	}
	u32 *order = NULL;
	u64 mark = meta_mark();
	if (number(w, "scatter", 1)) {
		order = shuffled(within, number(w, "scatter", 1));
		if (!order) {
			fail(w->name, "meta");
			return NULL;
		}
	}
	u64 *root = map_pages(size, order);
	if (!root) {
		meta_release(mark);
		fail(w->name, "meta");
		return NULL;
	}
	u64 slot = ARENA_SLOT + arenas++;
	pml4[slot] = (u64)root + PTE_TABLE;
	current.va = slot * SLOT_BYTES;
	current.pages = size;
	return &current;
}

bool map_device(u64 gpa, u64 bytes)
{
	for (u64 a = gpa & ~(2 * MIB - 1); a < gpa + bytes; a += 2 * MIB) {
		if (a < 4 * GIB)
			continue;
		u64 *top = &pml4[a / SLOT_BYTES % 512];
		if (a / SLOT_BYTES >= ARENA_SLOT && a / SLOT_BYTES < ARENA_SLOT + 200)
			return false;
		if (!*top) {
			void *t = meta_alloc(PAGE);
			if (!t)
				return false;
			*top = (u64)t + PTE_TABLE;
		}
		u64 *dir = (u64 *)(*top & ~(PAGE - 1)) + a / GIB % 512;
		if (!*dir) {
			void *t = meta_alloc(PAGE);
			if (!t)
				return false;
			*dir = (u64)t + PTE_TABLE;
		}
		u64 *large = (u64 *)(*dir & ~(PAGE - 1)) + a / (2 * MIB) % 512;
		if (!*large)
			*large = a + PTE_LARGE;
	}
	return true;
}

void work_map(const struct work *w)
{
	struct arena *a = arena_for(w);
	if (!a)
		return;
	line("map");
	kv("pages", a->pages);
	kvx("va", a->va);
	kvx("root", pml4[a->va / SLOT_BYTES] & ~(PAGE - 1));
	kvx("heap", heap_frame(0));
	end();
}
