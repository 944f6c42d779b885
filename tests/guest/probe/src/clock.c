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

/* khz_from_pit uses channel 2 of the PIT, whose output can be read. */
static u64 khz_from_pit(void)
{
	const u32 count = 0xffff, hz = 1193182;
	out8(0x61, (in8(0x61) & ~2) | 1);
	out8(0x43, 0xb0); /* channel 2, mode 0 */
	out8(0x42, count & 0xff);
	out8(0x42, count >> 8);
	u64 start = rdtsc(), cycles;
	do
		cycles = rdtsc() - start;
	while (!(in8(0x61) & 0x20) && cycles < 10000000000ull);
	return cycles * hz / count / 1000;
}

u64 tsc_khz(void)
{
	static u64 khz;
	if (!khz)
		khz = khz_from_cpuid();
	if (!khz)
		khz = khz_from_pm_timer();
	if (!khz)
		khz = khz_from_pit();
	return khz;
}

u64 ms_to_cycles(u64 ms) { return ms * tsc_khz(); }
