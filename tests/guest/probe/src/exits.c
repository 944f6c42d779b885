/* Workloads on exits and time. */
#include "probe.h"

static void report_exits(const char *name, u64 count, u64 cycles)
{
	line(name);
	kv("count", count);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	end();
}

/* out writes count bytes to port. */
void work_out(const struct work *w)
{
	u64 count = number(w, "count", 1000);
	u16 port = number(w, "port", 0x80);
	u64 start = rdtsc();
	for (u64 i = 0; i < count; i++)
		out8(port, i);
	report_exits("out", count, rdtsc() - start);
}

/* mmio reads count words at addr; by default where no device answers. */
void work_mmio(const struct work *w)
{
	u64 count = number(w, "count", 1000), addr = number(w, "addr", 0xdffff000);
	if (!map_device(addr, 4)) {
		fail("mmio", "addr");
		return;
	}
	u64 start = rdtsc();
	for (u64 i = 0; i < count; i++)
		mmio_read32(addr);
	report_exits("mmio", count, rdtsc() - start);
}

void work_cpuid(const struct work *w)
{
	u64 count = number(w, "count", 1000);
	u32 r[4];
	u64 start = rdtsc();
	for (u64 i = 0; i < count; i++)
		cpuid(number(w, "leaf", 0), r);
	u64 cycles = rdtsc() - start;
	report_exits("cpuid", count, cycles);
}

/* tick prints a line every ms milliseconds of TSC, count times. */
void work_tick(const struct work *w)
{
	u64 step = ms_to_cycles(number(w, "ms", 100)), count = number(w, "count", 10);
	u64 start = rdtsc();
	for (u64 i = 1; i <= count; i++) {
		while (rdtsc() - start < i * step)
			relax();
		line("tick");
		kv("n", i);
		end();
	}
}

/* time compares the TSC with the PM timer over ms milliseconds (at most 4000). */
void work_time(const struct work *w)
{
	u64 ms = number(w, "ms", 100), khz = tsc_khz();
	u64 before = rdtsc();
	u32 pm = pm_timer();
	u64 start = (before + rdtsc()) / 2;
	while (rdtsc() - start < ms * khz)
		relax();
	before = rdtsc();
	u64 ticks = (pm_timer() - pm) & PM_TIMER_MASK;
	u64 cycles = (before + rdtsc()) / 2 - start;
	line("time");
	kv("tsc_us", cycles * 1000 / khz);
	kv("pm_us", ticks * 1000000 / PM_TIMER_HZ);
	kv("khz", khz);
	end();
}

/*
 * spin counts in the mailbox for ms milliseconds (0: until a host sets its
 * stop word) and reports the longest time between two counts, which is how
 * long the guest stood still.
 */
void work_spin(const struct work *w)
{
	u64 limit = ms_to_cycles(number(w, "ms", 0)), longest = 0;
	u64 start = rdtsc(), before = start, count = 0;
	while (!mailbox->stop && (!limit || before - start < limit)) {
		u64 now = rdtsc();
		if (now - before > longest)
			longest = now - before;
		before = now;
		mailbox->counter = ++count;
		mailbox->tsc = now;
	}
	line("spin");
	kv("count", count);
	kv("cycles", before - start);
	kv("khz", tsc_khz());
	kv("longest", longest);
	end();
}

/*
 * wait says so and goes on when a line comes in at COM1 or the stop word is
 * set; by=mailbox: only that, and the guest waits without exits.
 */
void work_wait(const struct work *w)
{
	u64 pause = ms_to_cycles(1); /* whoever hears of the wait may stop the machine: time is not measured after */
	line("wait");
	kvs("for", word(w, "for", "line"));
	end();
	if (same(word(w, "by", "line"), "mailbox"))
		while (!mailbox->stop)
			relax();
	while (!mailbox->stop) {
		int c = serial_byte();
		if (c == '\n' || c == '\r')
			break;
		for (u64 start = rdtsc(); c < 0 && rdtsc() - start < pause;)
			relax();
	}
	mailbox->stop = 0;
}

/* fault raises an exception, to try the way faults are reported. */
void work_fault(const struct work *w)
{
	const char *kind = word(w, "kind", "page");
	if (same(kind, "ud"))
		__asm__ volatile("ud2");
	if (same(kind, "gp"))
		__asm__ volatile("movq %%cr3, %%rax" ::: "rax");
	*(volatile u64 *)0x7eadbeef000 = 1;
}
