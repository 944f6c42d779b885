/* Workloads on memory. */
#include "probe.h"

/* A touch that takes longer than this many microseconds counts as slow: it met a fault. */
#define SLOW_US 5

/* A part is what a workload uses of the arena: span bytes from off on, all of it by default. */
struct part {
	u64 va, pages;
	u64 offset; /* in the arena, in bytes */
};

static bool part_for(const struct work *w, struct part *part)
{
	struct arena *a = arena_for(w);
	if (!a)
		return false;
	u64 off = number(w, "off", 0) / PAGE;
	u64 pages = number(w, "span", 0) / PAGE;
	if (off >= a->pages || pages > a->pages - off) {
		fail(w->name, "part");
		return false;
	}
	*part = (struct part){a->va + off * PAGE, pages ? pages : a->pages - off, off * PAGE};
	return true;
}

static u64 *page_of(const struct part *a, u64 index) { return (u64 *)(a->va + index * PAGE); }

/*
 * touch reads or writes one word of each page, or reads all of it and sums up.
 * order=virtual|reverse|random (seed), op=read|write|sum, slow=US.
 */
void work_touch(const struct work *w)
{
	struct part part, *a = &part;
	if (!part_for(w, a))
		return;
	u64 mark = meta_mark();
	u32 *random = NULL;
	const char *order = word(w, "order", "virtual");
	if (same(order, "random") && !(random = shuffled(a->pages, number(w, "seed", 1)))) {
		fail("touch", "meta");
		return;
	}
	bool reverse = same(order, "reverse");
	const char *op = word(w, "op", "read");
	bool write = same(op, "write"), whole = same(op, "sum");
	u64 slow_cycles = tsc_khz() * number(w, "slow", SLOW_US) / 1000;
	u64 slow = 0, longest = 0, sum = 0;
	u64 start = rdtsc(), before = start;
	for (u64 i = 0; i < a->pages; i++) {
		u64 *p = page_of(a, random ? random[i] : reverse ? a->pages - 1 - i : i);
		if (write)
			*(volatile u64 *)p = i;
		else if (whole)
			sum = checksum(sum, p, PAGE);
		else
			sum += *(volatile u64 *)p;
		u64 now = rdtsc();
		if (now - before > slow_cycles)
			slow++;
		if (now - before > longest)
			longest = now - before;
		before = now;
	}
	u64 cycles = rdtsc() - start;
	meta_release(mark);
	line("touch");
	kv("pages", a->pages);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	kv("slow", slow);
	kv("longest", longest);
	kvx("sum", sum);
	end();
}

/*
 * chase builds a random cycle of pointers, one node a page (build=0 keeps the
 * one that is there), and follows it for hops steps. What it sums up is each
 * node's pointer and the word behind it, which building leaves as it was.
 */
void work_chase(const struct work *w)
{
	struct part part, *a = &part;
	if (!part_for(w, a))
		return;
	if (number(w, "build", 1)) {
		u64 mark = meta_mark();
		u32 *cycle = shuffled(a->pages, number(w, "seed", 1));
		if (!cycle) {
			fail("chase", "meta");
			return;
		}
		for (u64 i = 0; i < a->pages; i++)
			*page_of(a, cycle[i]) = (u64)page_of(a, cycle[(i + 1) % a->pages]);
		meta_release(mark);
	}
	u64 hops = number(w, "hops", a->pages);
	const u64 *first = page_of(a, 0), *p = first;
	u64 rounds = 0, sum = 0, start = rdtsc();
	for (u64 i = 0; i < hops; i++) {
		sum = checksum(sum, p, 16);
		p = (const u64 *)*p;
		rounds += p == first;
	}
	u64 cycles = rdtsc() - start;
	line("chase");
	kv("pages", a->pages);
	kv("hops", hops);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	kv("rounds", rounds);
	kvx("sum", sum);
	end();
}

/*
 * dirty writes pages in virtual order, round after round: writes=N of them,
 * or rounds=N, or for ms=N; at rate=N a second (0: as fast as it can). Each
 * write leaves its number, so at the end every page is checked for the number
 * of the last write it had: a lost page shows.
 */
void work_dirty(const struct work *w)
{
	struct part part, *a = &part;
	if (!part_for(w, a))
		return;
	u64 rate = number(w, "rate", 0), ms = number(w, "ms", 0);
	u64 writes = number(w, "writes", ms ? ~0ull : number(w, "rounds", 1) * a->pages);
	u64 khz = tsc_khz();
	u64 tag = number(w, "seed", 1) << 48;
	u64 start = rdtsc(), limit = ms * khz, cycles = 0, gap = 0, n = 0, at = 0;
	for (; n < writes; n++) {
		u64 now = rdtsc() - start;
		if (rate) {
			u64 due = n * 1000 / rate * khz + n * 1000 % rate * khz / rate;
			while (now < due) {
				relax();
				u64 next = rdtsc() - start;
				if (next - now > gap)
					gap = next - now;
				now = next;
			}
		}
		if (now - cycles > gap && !rate)
			gap = now - cycles;
		cycles = now;
		if (ms && now >= limit)
			break;
		*(volatile u64 *)page_of(a, at) = tag + n;
		if (++at == a->pages)
			at = 0;
	}
	cycles = rdtsc() - start;
	u64 bad = 0, touched = n < a->pages ? n : a->pages;
	for (u64 i = 0; i < touched; i++) {
		u64 last = n - 1 - (n - 1 - i) % a->pages;
		bad += *page_of(a, i) != tag + last;
	}
	line("dirty");
	kv("pages", touched);
	kv("writes", n);
	kv("cycles", cycles);
	kv("khz", khz);
	kv("gap", gap);
	kv("bad", bad);
	end();
}

/* fill writes the pattern of seed. */
void work_fill(const struct work *w)
{
	struct part part, *a = &part;
	if (!part_for(w, a))
		return;
	u64 start = rdtsc();
	pattern_fill((u64 *)a->va, a->pages * PAGE, number(w, "seed", 1), a->offset);
	u64 cycles = rdtsc() - start;
	line("fill");
	kv("pages", a->pages);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	end();
}

/* verify compares with the pattern of seed. */
void work_verify(const struct work *w)
{
	struct part part, *a = &part;
	if (!part_for(w, a))
		return;
	u64 seed = number(w, "seed", 1), bad = 0, first = ~0ull, sum = 0;
	u64 start = rdtsc();
	for (u64 i = 0; i < a->pages; i++) {
		if (pattern_check(page_of(a, i), PAGE, seed, a->offset + i * PAGE)) {
			if (!bad++)
				first = i;
		}
		sum = checksum(sum, page_of(a, i), PAGE);
	}
	u64 cycles = rdtsc() - start;
	line("verify");
	kv("pages", a->pages);
	kv("bad", bad);
	if (bad)
		kv("first", first);
	kvx("sum", sum);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	end();
}
