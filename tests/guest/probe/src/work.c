/* Workloads on memory. */
#include "probe.h"

/* A touch that takes longer than this many microseconds counts as slow: it met a fault. */
#define SLOW_US 5

static u64 *page_of(const struct arena *a, u64 index) { return (u64 *)(a->va + index * PAGE); }

/*
 * touch reads or writes one word of each page. order=virtual|reverse|random
 * (seed), op=read|write, slow=US.
 */
void work_touch(const struct work *w)
{
	struct arena *a = arena_for(w);
	if (!a)
		return;
	u64 mark = meta_mark();
	u32 *random = NULL;
	const char *order = word(w, "order", "virtual");
	if (same(order, "random") && !(random = shuffled(a->pages, number(w, "seed", 1)))) {
		fail("touch", "meta");
		return;
	}
	bool reverse = same(order, "reverse");
	bool write = same(word(w, "op", "read"), "write");
	u64 slow_cycles = tsc_khz() * number(w, "slow", SLOW_US) / 1000;
	u64 slow = 0, longest = 0, sum = 0;
	u64 start = rdtsc(), before = start;
	for (u64 i = 0; i < a->pages; i++) {
		volatile u64 *p = page_of(a, random ? random[i] : reverse ? a->pages - 1 - i : i);
		if (write)
			*p = i;
		else
			sum += *p;
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
 * one that is there), and follows it for hops steps.
 */
void work_chase(const struct work *w)
{
	struct arena *a = arena_for(w);
	if (!a)
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
	volatile u64 *first = page_of(a, 0), *p = first;
	u64 rounds = 0, start = rdtsc();
	for (u64 i = 0; i < hops; i++) {
		p = (volatile u64 *)*p;
		rounds += p == first;
	}
	u64 cycles = rdtsc() - start;
	line("chase");
	kv("pages", a->pages);
	kv("hops", hops);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	kv("rounds", rounds);
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
	struct arena *a = arena_for(w);
	if (!a)
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

/* fill writes the pattern of seed over the arena. */
void work_fill(const struct work *w)
{
	struct arena *a = arena_for(w);
	if (!a)
		return;
	u64 start = rdtsc();
	pattern_fill((u64 *)a->va, a->pages * PAGE, number(w, "seed", 1), 0);
	line("fill");
	kv("pages", a->pages);
	kv("cycles", rdtsc() - start);
	end();
}

/* verify compares the arena with the pattern of seed. */
void work_verify(const struct work *w)
{
	struct arena *a = arena_for(w);
	if (!a)
		return;
	u64 seed = number(w, "seed", 1), bad = 0, first = ~0ull, sum = 0;
	u64 start = rdtsc();
	for (u64 i = 0; i < a->pages; i++) {
		if (pattern_check(page_of(a, i), PAGE, seed, i * PAGE)) {
			if (!bad++)
				first = i;
		}
		sum = checksum(sum, page_of(a, i), PAGE);
	}
	line("verify");
	kv("pages", a->pages);
	kv("bad", bad);
	if (bad)
		kv("first", first);
	kvx("sum", sum);
	kv("cycles", rdtsc() - start);
	end();
}
