/* Seeded patterns, checksums and random numbers. */
#include "probe.h"

u64 mix(u64 x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

u64 random_next(u64 *state)
{
	*state += 0x9e3779b97f4a7c15ull;
	return mix(*state);
}

void pattern_fill(u64 *p, u64 bytes, u64 seed, u64 offset)
{
	for (u64 i = 0; i < bytes / 8; i++)
		p[i] = pattern_word(seed, offset + i * 8);
}

u64 pattern_check(const u64 *p, u64 bytes, u64 seed, u64 offset)
{
	u64 wrong = 0;
	for (u64 i = 0; i < bytes / 8; i++)
		wrong += p[i] != pattern_word(seed, offset + i * 8);
	return wrong;
}

u64 checksum(u64 sum, const u64 *p, u64 bytes)
{
	for (u64 i = 0; i < bytes / 8; i++) {
		sum = (sum ^ p[i]) * 0x100000001b3ull;
		sum ^= sum >> 32;
	}
	return sum;
}

void *memset(void *p, int c, size_t n)
{
	void *d = p;
	__asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
	return p;
}

void *memcpy(void *to, const void *from, size_t n)
{
	void *d = to;
	__asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n)::"memory");
	return to;
}
