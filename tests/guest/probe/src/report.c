/* Results on COM1, and the ways to end. */
#include "probe.h"

#define COM1 0x3f8
#define FIFO 16

extern u64 idt[];

static char text[512];
static size_t used;
static bool fifo_on;

static void put(char c)
{
	if (used < sizeof text)
		text[used++] = c;
}

static void puts_(const char *s)
{
	while (*s)
		put(*s++);
}

/*
 * flush sends the line in bursts of what the transmit FIFO holds, so that a
 * burst costs one look at the line status: port accesses are dear.
 */
static void flush(void)
{
	if (!fifo_on) {
		out8(COM1 + 2, 0x01);
		fifo_on = true;
	}
	for (size_t at = 0; at < used;) {
		for (int tries = 0; !(in8(COM1 + 5) & 0x20) && tries < 100000; tries++)
			relax();
		size_t n = used - at < FIFO ? used - at : FIFO;
		const char *from = text + at;
		at += n;
		__asm__ volatile("rep outsb" : "+S"(from), "+c"(n) : "d"(COM1) : "memory");
	}
	used = 0;
}

void line(const char *name)
{
	puts_("probe: ");
	puts_(name);
}

static void key_(const char *key)
{
	put(' ');
	puts_(key);
	put('=');
}

void kv(const char *key, u64 value)
{
	char digits[20];
	int n = 0;
	key_(key);
	do
		digits[n++] = '0' + value % 10;
	while (value /= 10);
	while (n)
		put(digits[--n]);
}

void kvx(const char *key, u64 value)
{
	key_(key);
	puts_("0x");
	int shift = 60;
	while (shift && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

void kvs(const char *key, const char *value)
{
	key_(key);
	puts_(value);
}

void end(void)
{
	if (used > sizeof text - 2)
		used = sizeof text - 2;
	puts_("\r\n");
	flush();
}

void fail(const char *where, const char *why)
{
	line("error");
	kvs("at", where);
	kvs("why", why);
	end();
}

int serial_byte(void)
{
	return in8(COM1 + 5) & 1 ? in8(COM1) : -1;
}

/*
 * power_off tries ACPI S5 with the two sleep types in use, then the resets,
 * then, where a machine has none of them, a triple fault.
 */
void power_off(void)
{
	out16(0x604, 0x2000);
	out16(0x604, 0x3400);
	out8(0xcf9, 0x06);
	out8(0x64, 0xfe);
	for (int i = 0; i < 64; i++)
		idt[i] = 0;
	__asm__ volatile("ud2");
	for (;;)
		relax();
}
