/* Time: the TSC's rate, from CPUID or measured. */
#include "probe.h"

u32 pm_timer(void) { return in32(0x608) & PM_TIMER_MASK; }

static u64 khz_from_cpuid(void)
{
	u32 r[4];
	cpuid(0x40000000, r);
	if (r[1] == 0x4b4d564b && r[0] >= 0x40000010) { /* "KVMK" */
		cpuid(0x40000010, r);
		if (r[0])
			return r[0];
	}
	cpuid(0, r);
	if (r[0] >= 0x15) {
		cpuid(0x15, r);
		if (r[0] && r[1] && r[2])
			return (u64)r[2] * r[1] / r[0] / 1000;
	}
	return 0;
}

/* khz_from_pm_timer is 0 on a machine without the timer. */
static u64 khz_from_pm_timer(void)
{
	u64 before = rdtsc();
	u32 pm = pm_timer();
	u64 start = (before + rdtsc()) / 2;
	if (pm == PM_TIMER_MASK)
		return 0;
	u64 cycles, ticks;
	do {
		for (int i = 0; i < 20000; i++)
			relax();
		before = rdtsc();
		ticks = (pm_timer() - pm) & PM_TIMER_MASK;
		cycles = (before + rdtsc()) / 2 - start;
	} while (ticks < PM_TIMER_HZ / 50 && cycles < 10000000000ull);
	return ticks ? cycles * PM_TIMER_HZ / ticks / 1000 : 0;
}

/*
 * khz_from_lapic counts on the local APIC timer running at 1 GHz, as it does
 * under KVM and QEMU: for machines that have little else.
 */
static u64 khz_from_lapic(void)
{
	const u64 lapic = 0xfee00000, lvt = 0x320, initial = 0x380, current = 0x390, divide = 0x3e0;
	mmio_write32(lapic + lvt, 0x10000); /* masked, one shot */
	mmio_write32(lapic + divide, 0xb);  /* by 1 */
	mmio_write32(lapic + initial, ~0u);
	u64 before = rdtsc();
	u32 first = mmio_read32(lapic + current);
	u64 start = (before + rdtsc()) / 2;
	u64 cycles, ticks;
	do {
		for (int i = 0; i < 20000; i++)
			relax();
		before = rdtsc();
		ticks = first - mmio_read32(lapic + current);
		cycles = (before + rdtsc()) / 2 - start;
	} while (ticks < 20000000 && cycles < 10000000000ull);
	mmio_write32(lapic + initial, 0);
	return ticks ? cycles * 1000000 / ticks : 0;
}

u64 tsc_khz(void)
{
	static u64 khz;
	if (!khz)
		khz = khz_from_cpuid();
	if (!khz)
		khz = khz_from_pm_timer();
	if (!khz)
		khz = khz_from_lapic();
	return khz;
}

u64 ms_to_cycles(u64 ms) { return ms * tsc_khz(); }

void wait_begin(struct wait *w) { *w = (struct wait){rdtsc(), 0}; }

bool wait_over(struct wait *w, u64 ms)
{
	u64 now = rdtsc(), step = now - w->seen, most = ms_to_cycles(100);
	w->seen = now;
	w->spent += step < most ? step : most;
	return w->spent > ms_to_cycles(ms);
}
