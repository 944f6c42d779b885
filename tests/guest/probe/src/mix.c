/*
 * Memory, a disk and a network used all at once, each in a way that shows what
 * is lost, old or wrong: every page and every block holds the pattern of how
 * often it was written, and frames, which the other end sends back in their
 * order, are numbered.
 */
#include "devices.h"

#define BLOCK PAGE
#define FLUSH_EVERY 32 /* requests */
#define FRAME_LENGTH 600
#define PAGES_A_TURN 8
#define PATIENCE_MS 20000
#define MAX_DEPTH 64

/* Patterns of different things are those of different places. */
#define PLACE_DISK (1ull << 40)
#define PLACE_FRAMES (1ull << 41)

static u64 seed, random;

static struct {
	u64 va, pages;
	u32 *versions;
	u64 writes, bad;
} memory;

static struct {
	u64 blocks, depth, under_way, submitted;
	u32 *versions; /* 0: never written */
	bool *busy;    /* blocks that a request is under way for */
	u8 *buffers;
	u16 ids[MAX_DEPTH]; /* that are free, depth - under_way of them */
	struct { u32 type; u64 block; } requests[MAX_DEPTH];
	u64 writes, reads, flushes, failed, bad;
	struct wait wait;
} disk;

static struct {
	u64 depth, free;
	u16 ids[MAX_DEPTH];
	u64 sent, received, next; /* next: the number of the frame that comes next */
	u64 lost, again, bad;
	struct wait wait;
} net;

/* rewrite checks a page and writes its next version. */
static void rewrite(u64 i, bool write)
{
	u64 *p = (u64 *)(memory.va + i * PAGE);
	memory.bad += pattern_check(p, PAGE, seed + memory.versions[i], i * PAGE) != 0;
	if (!write)
		return;
	pattern_fill(p, PAGE, seed + ++memory.versions[i], i * PAGE);
	memory.writes++;
}

static void disk_submit(u64 block, u32 type)
{
	u16 id = disk.ids[disk.depth - ++disk.under_way];
	u64 *data = (u64 *)(disk.buffers + id * BLOCK), bytes = type == BLK_FLUSH ? 0 : BLOCK;
	disk.requests[id].type = type;
	disk.requests[id].block = block;
	disk.submitted++;
	if (bytes)
		disk.busy[block] = true;
	if (type == BLK_OUT)
		pattern_fill(data, BLOCK, seed + ++disk.versions[block], PLACE_DISK + block * BLOCK);
	blk_submit(id, type, block * BLOCK, data, bytes, 1);
}

/* disk_collect takes what is done. */
static void disk_collect(void)
{
	u8 status;
	int id;
	while ((id = blk_done(&status)) >= 0 && disk.under_way) {
		u64 block = disk.requests[id].block;
		disk.ids[disk.depth - disk.under_way--] = id;
		wait_begin(&disk.wait);
		disk.failed += status != 0;
		switch (disk.requests[id].type) {
		case BLK_FLUSH:
			disk.flushes++;
			continue;
		case BLK_OUT:
			disk.writes++;
			break;
		case BLK_IN:
			disk.reads++;
			disk.bad += pattern_check((u64 *)(disk.buffers + id * BLOCK), BLOCK,
				seed + disk.versions[block], PLACE_DISK + block * BLOCK) != 0;
		}
		disk.busy[block] = false;
	}
}

static void disk_turn(void)
{
	bool kick = false;
	disk_collect();
	while (disk.under_way < disk.depth) {
		u64 block = random_next(&random) % disk.blocks;
		if (disk.submitted % FLUSH_EVERY == FLUSH_EVERY - 1)
			disk_submit(0, BLK_FLUSH);
		else if (disk.busy[block])
			break;
		else
			disk_submit(block, disk.versions[block] && random_next(&random) & 1 ? BLK_IN : BLK_OUT);
		kick = true;
	}
	if (kick)
		blk_kick();
}

/* net_collect takes what has come back. */
static void net_collect(void)
{
	const u8 *frame;
	u64 length, number, body[FRAME_LENGTH / 8];
	int id;
	while ((id = net_sent()) >= 0 && net.free < net.depth)
		net.ids[net.free++] = id;
	while ((frame = net_received(&length))) {
		wait_begin(&net.wait);
		__builtin_memcpy(&number, frame + FRAME_BODY, 8);
		__builtin_memcpy(body, frame + FRAME_BODY + 8, FRAME_LENGTH);
		if (length != FRAME_BODY + 8 + FRAME_LENGTH || number >= net.sent ||
			pattern_check(body, FRAME_LENGTH, seed + number, PLACE_FRAMES)) {
			net.bad++;
			continue;
		}
		if (number < net.next) {
			net.again++;
			continue;
		}
		net.received++;
		net.lost += number - net.next;
		net.next = number + 1;
	}
}

static void net_turn(void)
{
	net_collect();
	while (net.free && net.sent - net.next < net.depth) {
		u16 id = net.ids[--net.free];
		u64 body[FRAME_LENGTH / 8];
		u8 *frame = net_frame(id);
		pattern_fill(body, FRAME_LENGTH, seed + net.sent, PLACE_FRAMES);
		__builtin_memcpy(frame + FRAME_BODY, &net.sent, 8);
		__builtin_memcpy(frame + FRAME_BODY + 8, body, FRAME_LENGTH);
		net_send(id, FRAME_BODY + 8 + FRAME_LENGTH);
		net.sent++;
	}
	net_kick();
}

/* begin makes all that there is to use. */
static bool begin(const struct work *w)
{
	struct arena *a = arena_for(w);
	u64 depth = number(w, "qd", 8);
	if (!a)
		return false;
	if (!depth || depth > MAX_DEPTH)
		return fail("mix", "qd"), false;
	if (!blk_open(w, 1))
		return false;
	if (!net_open(w, depth))
		return blk_close(), false;
	__builtin_memset(&memory, 0, sizeof memory);
	__builtin_memset(&disk, 0, sizeof disk);
	__builtin_memset(&net, 0, sizeof net);
	random = seed = number(w, "seed", 1);
	memory.va = a->va;
	memory.pages = a->pages;
	disk.depth = depth < blk_depth() ? depth : blk_depth();
	disk.blocks = blk_capacity() / BLOCK;
	net.depth = net.free = depth;
	memory.versions = meta_alloc(memory.pages * sizeof *memory.versions);
	disk.versions = meta_alloc(disk.blocks * sizeof *disk.versions);
	disk.busy = meta_alloc(disk.blocks * sizeof *disk.busy);
	disk.buffers = dma_alloc(disk.depth * BLOCK);
	if (!disk.blocks || !memory.versions || !disk.versions || !disk.busy || !disk.buffers)
		return net_close(), blk_close(), fail("mix", "memory"), false;
	for (u64 i = 0; i < memory.pages; i++)
		pattern_fill((u64 *)(memory.va + i * PAGE), PAGE, seed, i * PAGE);
	for (u16 i = 0; i < depth; i++)
		disk.ids[i] = net.ids[i] = i;
	wait_begin(&disk.wait);
	wait_begin(&net.wait);
	return true;
}

/* stuck says so when a device has not answered for too long. */
static bool stuck(void)
{
	if (disk.under_way && wait_over(&disk.wait, PATIENCE_MS))
		return fail("mix", "disk-timeout"), true;
	if (net.next < net.sent && wait_over(&net.wait, PATIENCE_MS))
		return fail("mix", "net-timeout"), true;
	return false;
}

/* drain waits for all that is under way. */
static bool drain(void)
{
	while (disk.under_way || net.next < net.sent || net.free < net.depth) {
		disk_collect();
		net_collect();
		net_kick(); /* with buffers for what is still to come */
		if (stuck())
			return false;
		relax();
	}
	return true;
}

/* reread checks every block that was ever written, and what was in none. */
static bool reread(void)
{
	for (u64 block = 0; block < disk.blocks; block++) {
		if (disk.versions[block]) {
			disk_submit(block, BLK_IN);
			blk_kick();
		}
		while (disk.under_way == disk.depth || (disk.under_way && block == disk.blocks - 1)) {
			disk_collect();
			if (stuck())
				return false;
			relax();
		}
	}
	return true;
}

static void report(u64 turns)
{
	line("mix");
	kvs("of", "memory");
	kv("turns", turns);
	kv("writes", memory.writes);
	kv("bad", memory.bad);
	end();
	line("mix");
	kvs("of", "disk");
	kv("writes", disk.writes);
	kv("reads", disk.reads);
	kv("flushes", disk.flushes);
	kv("failed", disk.failed);
	kv("bad", disk.bad);
	end();
	line("mix");
	kvs("of", "net");
	kv("sent", net.sent);
	kv("received", net.received);
	kv("lost", net.lost);
	kv("again", net.again);
	kv("bad", net.bad);
	end();
}

/*
 * mix goes on for count turns, or until the mailbox's stop word is set, and
 * counts them in the mailbox. size= of memory, qd= of disk and network, seed=.
 */
void work_mix(const struct work *w)
{
	u64 count = number(w, "count", ~0ull), turns = 0, meta = meta_mark(), dma = dma_mark();
	mailbox->stop = 0;
	if (begin(w)) {
		line("mix");
		kvs("of", "begin");
		end();
		bool well = true;
		while (well && turns < count && !mailbox->stop) {
			for (int i = 0; i < PAGES_A_TURN; i++)
				rewrite(random_next(&random) % memory.pages, true);
			disk_turn();
			net_turn();
			mailbox->counter = ++turns;
			well = !stuck();
		}
		mailbox->stop = 0;
		if (well && drain() && reread()) {
			for (u64 i = 0; i < memory.pages; i++)
				rewrite(i, false);
			report(turns);
		}
		net_close();
		blk_close();
	}
	dma_release(dma);
	meta_release(meta);
}
