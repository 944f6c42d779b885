/* virtio-blk. */
#include "devices.h"

#define SECTOR 512
#define MAX_QD 256
#define MAX_SEGMENTS 16 /* of data */
#define PATIENCE_MS 20000
#define UNASSIGNED 0xd8000000 /* in the PCI hole, where nothing is */
#define BEYOND 0x0000fffffffff000 /* past all memory */

enum { CONFIG_CAPACITY = 0, CONFIG_SEG_MAX = 12, CONFIG_BLK_SIZE = 20, CONFIG_NUM_QUEUES = 34 };
#define F_SEG_MAX FEATURE(2)
#define F_RO FEATURE(5)
#define F_BLK_SIZE FEATURE(6)
#define F_FLUSH FEATURE(9)
#define F_MQ FEATURE(12)
#define F_DISCARD FEATURE(13)
#define F_WRITE_ZEROES FEATURE(14)

struct header { u32 type, reserved; u64 sector; };
struct range { u64 sector; u32 sectors, flags; };

static struct virtio dev;
static struct queue q;
static u64 capacity; /* bytes */
static struct header *headers;
static u8 *statuses;

bool blk_open(const struct work *w, u16 segments)
{
	u64 wanted = F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES;
	if (number(w, "indirect", 0))
		wanted |= F_INDIRECT;
	if (number(w, "packed", 0))
		wanted |= F_PACKED;
	if (!virtio_find(&dev, VIRTIO_BLK, number(w, "dev", 0)))
		return fail("blk", "no-device"), false;
	if (!virtio_start(&dev, wanted))
		return fail("blk", "features"), false;
	if (number(w, "packed", 0) && !(dev.features & F_PACKED))
		return fail("blk", "no-packed"), false;
	if (number(w, "indirect", 0) && !(dev.features & F_INDIRECT))
		return fail("blk", "no-indirect"), false;
	if (!queue_init(&q, &dev, number(w, "queue", 0), segments + 2))
		return fail("blk", "queue"), false;
	if (!virtio_ready(&dev))
		return fail("blk", "ready"), false;
	capacity = mmio_read32(dev.config + CONFIG_CAPACITY) * (u64)SECTOR +
		((u64)mmio_read32(dev.config + CONFIG_CAPACITY + 4) << 32) * SECTOR;
	headers = dma_alloc(MAX_QD * sizeof *headers);
	statuses = dma_alloc(MAX_QD);
	if (!headers || !statuses)
		return fail("blk", "dma"), false;
	return true;
}

/* blk_submit queues one request with bytes of data cut into so many segments. */
void blk_submit(u16 id, u32 type, u64 offset, void *data, u64 bytes, int segments)
{
	struct segment s[MAX_SEGMENTS + 2];
	int n = 0;
	headers[id] = (struct header){type, 0, offset / SECTOR};
	statuses[id] = 0xff;
	s[n++] = (struct segment){(u64)&headers[id], sizeof *headers, false};
	bool in = type == BLK_IN || type == BLK_GET_ID;
	u64 each = bytes / segments & ~(u64)(SECTOR - 1);
	for (int i = 0; bytes && i < segments; i++) {
		u64 part = i == segments - 1 || !each ? bytes - each * i : each;
		s[n++] = (struct segment){(u64)data + each * i, part, in};
		if (!each)
			break;
	}
	s[n++] = (struct segment){(u64)&statuses[id], 1, true};
	queue_push(&q, id, s, n);
}

u64 blk_capacity(void) { return capacity; }

u16 blk_depth(void) { return q.ids < MAX_QD ? q.ids : MAX_QD; }

void blk_kick(void) { queue_kick(&q); }

int blk_done(u8 *status)
{
	u32 len;
	int id = queue_pop(&q, &len);
	if (id >= 0)
		*status = statuses[id];
	return id;
}

void blk_close(void) { virtio_reset(&dev); /* nothing in flight when its memory goes */ }

/* one runs a single request and returns its status, or -1 when it never ends. */
static int one(u32 type, u64 offset, void *data, u64 bytes)
{
	u32 len;
	blk_submit(0, type, offset, data, bytes, 1);
	queue_kick(&q);
	return queue_wait(&q, &len, PATIENCE_MS) == 0 ? statuses[0] : -1;
}

static void report_one(const char *op, int status)
{
	line("blk");
	kvs("op", op);
	if (status < 0)
		kvs("status", "timeout");
	else
		kv("status", status);
}

static void blk_info(void)
{
	report_one("info", 0);
	kv("capacity", capacity);
	kvx("features", dev.features);
	kv("size", q.size);
	kv("queues", dev.features & F_MQ ? mmio_read16(dev.config + CONFIG_NUM_QUEUES) : 1);
	kv("block", dev.features & F_BLK_SIZE ? mmio_read32(dev.config + CONFIG_BLK_SIZE) : SECTOR);
	end();
}

static void blk_id(void)
{
	char *id = dma_alloc(PAGE);
	if (!id)
		return fail("blk", "dma");
	__builtin_memset(id, 0, 32);
	report_one("id", one(BLK_GET_ID, 0, id, 20));
	kvs("serial", id);
	end();
}

static void blk_range(const struct work *w, const char *op)
{
	struct range *r = dma_alloc(PAGE);
	if (!r)
		return fail("blk", "dma");
	*r = (struct range){number(w, "off", 0) / SECTOR, number(w, "total", PAGE) / SECTOR, 0};
	report_one(op, one(same(op, "discard") ? BLK_DISCARD : BLK_WRITE_ZEROES, 0, r, sizeof *r));
	end();
}

/* How many requests took how many cycles, in eighths of powers of two. */
static u32 latencies[62 * 8];

static void latency_begin(void) { __builtin_memset(latencies, 0, sizeof latencies); }

static void latency_count(u64 cycles)
{
	cycles |= 8; /* what is faster does not matter */
	int high = 63 - __builtin_clzll(cycles);
	latencies[(high - 3) * 8 + (cycles >> (high - 3) & 7)]++;
}

/* latency_percentile is the least that so many of a hundred requests did not exceed, or an eighth more. */
static u64 latency_percentile(u64 percent, u64 all)
{
	u64 seen = 0;
	for (int i = 0; i < (int)(sizeof latencies / sizeof *latencies); i++) {
		seen += latencies[i];
		if (seen && seen * 100 >= all * percent)
			return (u64)(8 + i % 8 + 1) << i / 8;
	}
	return 0;
}

/*
 * transfer keeps qd requests of bs bytes in flight until count of them are
 * done, or ms have passed, rounds times. Writes carry the pattern of seed at their place on
 * the disk; reads are compared with it if verify=1. With flush=1 a round ends with a flush, and
 * each has the next seed.
 */
static void transfer(const struct work *w, const char *op)
{
	bool sequential = op[0] == 's';
	bool write = same(op, "randwrite") || same(op, "seqwrite");
	bool verify = number(w, "verify", 0);
	u64 bs = number(w, "bs", 4096), qd = number(w, "qd", 1);
	u64 segments = number(w, "segs", 1);
	u64 off = number(w, "off", 0), span = number(w, "span", capacity - off);
	u64 ms = number(w, "ms", 0);
	u64 count = number(w, "count", ms ? ~0ull : number(w, "total", 16 * MIB) / bs);
	u64 seed = number(w, "seed", 1), random = number(w, "order", 1);
	bool pattern = !same(word(w, "data", "pattern"), "same"), flush = number(w, "flush", 0);
	if (!bs || bs % SECTOR || span < bs || off > capacity || span > capacity - off || !qd || qd > q.ids || qd > MAX_QD)
		return fail("blk", "parameters");
	if (qd > count)
		qd = count;
	u8 *buffers = dma_alloc(qd * bs);
	u64 *offsets = dma_alloc(qd * 8);
	if (!buffers || !offsets)
		return fail("blk", "dma");
	if (write && !pattern)
		pattern_fill((u64 *)buffers, qd * bs, seed, 0);

	u64 blocks = span / bs, limit = ms_to_cycles(ms);
	u64 *begun = dma_alloc(qd * 8);
	if (!begun)
		return fail("blk", "dma");
	u64 all = 0;
	latency_begin();
	for (u64 round = 0, rounds = number(w, "rounds", 1); round < rounds; round++) {
		u64 submitted = 0, done = 0, failed = 0, bad = 0, longest = 0;
		u64 kicks = round ? q.kicks : 0;
		u64 start = rdtsc(), last = start;
		struct wait wait;
		wait_begin(&wait);
		int ready = qd; /* ids 0..qd-1 are handed out first */
		u32 len;
		for (;;) {
			bool kick = false;
			for (;;) {
				int id;
				if (ready)
					id = --ready;
				else if ((id = queue_pop(&q, &len)) >= 0) {
					if ((u64)id >= qd)
						return fail("blk", "id");
					u64 now = rdtsc();
					if (now - last > longest)
						longest = now - last;
					last = now;
					latency_count(now - begun[id]);
					wait_begin(&wait);
					done++;
					failed += statuses[id] != 0;
					if (verify && !write)
						bad += pattern_check((u64 *)(buffers + id * bs), bs, seed, offsets[id]) != 0;
				} else
					break;
				if (submitted == count || (ms && last - start > limit))
					continue;
				u64 block = (sequential ? submitted : random_next(&random)) % blocks;
				offsets[id] = off + block * bs;
				if (write && pattern)
					pattern_fill((u64 *)(buffers + id * bs), bs, seed, offsets[id]);
				begun[id] = rdtsc();
				blk_submit(id, write ? BLK_OUT : BLK_IN, offsets[id], buffers + id * bs, bs, segments);
				submitted++;
				kick = true;
			}
			if (kick)
				queue_kick(&q);
			if (done == submitted)
				break;
			relax();
			if (wait_over(&wait, PATIENCE_MS))
				return fail("blk", "timeout");
		}
		if (flush) {
			failed += one(BLK_FLUSH, 0, NULL, 0) != 0;
			seed++;
		}
		u64 cycles = rdtsc() - start;
		line("blk");
		kvs("op", op);
		if (flush) { /* a short line: there are many */
			kv("round", round);
			kv("failed", failed);
			end();
			continue;
		}
		kv("bs", bs);
		kv("qd", qd);
		kv("ios", done);
		kv("bytes", done * bs);
		kv("cycles", cycles);
		kv("khz", tsc_khz());
		kv("kicks", q.kicks - kicks);
		kv("longest", longest);
		kv("p99", latency_percentile(99, all += done));
		kv("failed", failed);
		if (verify && !write)
			kv("bad", bad);
		end();
	}
}

/*
 * evil breaks the rules of the queue in one way, reports whether the device
 * says so (DEVICE_NEEDS_RESET) and what it did with the request, then resets
 * it and reads a block as a good driver would. Where the way needs an address
 * that is no memory, addr=N or addr=self (the device's own registers) names it.
 */
static void blk_evil(const struct work *w, const char *kind)
{
	u8 *data = dma_alloc(PAGE);
	if (!data)
		return fail("blk", "dma");
	if (q.packed || q.indirect)
		return fail("blk", "parameters");
	q.hold = true; /* a device may look before it is told to */
	blk_submit(0, BLK_IN, 0, data, PAGE, 1); /* three descriptors */
	u16 index = q.next;
	u64 nowhere = number(w, "addr", UNASSIGNED);
	if (same(word(w, "addr", ""), "self"))
		nowhere = dev.common;
	struct split_desc *d = q.desc;
	if (same(kind, "loop"))
		d[1].next = 1;
	else if (same(kind, "self"))
		d[0].next = 0;
	else if (same(kind, "next"))
		d[0].next = q.size + 7;
	else if (same(kind, "range"))
		d[1].addr = BEYOND;
	else if (same(kind, "wrap"))
		d[1].addr = ~0ull - 100;
	else if (same(kind, "length"))
		d[1].len = 0xfffffe00;
	else if (same(kind, "device"))
		d[1].addr = nowhere;
	else if (same(kind, "readonly"))
		d[2].flags = 0;
	else if (same(kind, "short"))
		d[0].len = 3;
	else if (same(kind, "bare"))
		d[0].flags = 0;
	else if (same(kind, "indirect"))
		d[0].flags = DESC_INDIRECT | DESC_NEXT;
	else if (same(kind, "head"))
		q.avail->ring[0] = q.size + 3;
	else if (same(kind, "jump"))
		index = q.size * 8 + 5;
	else if (same(kind, "mmio")) {
		virtio_start(&dev, 0);
		queue_place(&q, nowhere, nowhere, nowhere);
		virtio_ready(&dev);
	} else if (same(kind, "beyond")) {
		virtio_start(&dev, 0);
		queue_place(&q, BEYOND, BEYOND, BEYOND);
		virtio_ready(&dev);
	} else
		return fail("blk", "evil");
	queue_publish(&q, index);
	mmio_write16(q.notify_addr, q.index);
	u64 limit = ms_to_cycles(number(w, "ms", 300)), start = rdtsc();
	u8 status = 0;
	u32 len = 0;
	int id = -1;
	while (rdtsc() - start < limit) {
		status = virtio_status(&dev);
		if (status & STATUS_NEEDS_RESET || (id = queue_pop(&q, &len)) >= 0)
			break;
	}
	u8 answer = statuses[0];
	bool good = blk_open(w, 1) && one(BLK_IN, 0, data, PAGE) == 0;
	line("evil");
	kvs("kind", kind);
	kvx("status", status);
	kv("needs_reset", (status & STATUS_NEEDS_RESET) != 0);
	if (id >= 0)
		kv("answer", answer);
	else
		kvs("answer", "none");
	kvs("read_after", good ? "ok" : "failed");
	end();
}

void work_blk(const struct work *w)
{
	u64 mark = dma_mark();
	const char *op = word(w, "op", "randread"), *evil = word(w, "evil", NULL);
	u64 segments = number(w, "segs", 1);
	if (segments < 1 || segments > MAX_SEGMENTS) {
		fail("blk", "segs");
		return;
	}
	if (blk_open(w, segments)) {
		if (evil)
			blk_evil(w, evil);
		else if (same(op, "info"))
			blk_info();
		else if (same(op, "id"))
			blk_id();
		else if (same(op, "flush")) {
			report_one(op, one(BLK_FLUSH, 0, NULL, 0));
			end();
		} else if (same(op, "discard") || same(op, "zero"))
			blk_range(w, op);
		else if (same(op, "randread") || same(op, "randwrite") || same(op, "seqread") || same(op, "seqwrite"))
			transfer(w, op);
		else
			fail("blk", "op");
		blk_close();
	}
	dma_release(mark);
}
