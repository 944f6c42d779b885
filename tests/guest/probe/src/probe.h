/* What the parts of the probe guest share. */
#ifndef PROBE_H
#define PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE 4096ull
#define MIB (1024ull * 1024)
#define GIB (1024ull * MIB)

/* The mailbox lies at a GPA that hosts know: see probe.go. */
#define MAILBOX 0x100000
struct mailbox {
	u64 magic;
	u64 counter; /* counts up while spin runs */
	u64 tsc;     /* of the last count */
	u64 stop;    /* a host that writes non-zero here ends spin and wait */
};
#define MAILBOX_MAGIC 0x45424f52504e4d47ull /* "GMNPROBE" */
static volatile struct mailbox *const mailbox = (void *)MAILBOX;

/* Port I/O and clocks. */
static inline void out8(u16 port, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port) : "memory"); }
static inline void out16(u16 port, u16 v) { __asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(port) : "memory"); }
static inline void out32(u16 port, u32 v) { __asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(port) : "memory"); }
static inline u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
static inline u32 in32(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
static inline u64 rdtsc(void) { u32 lo, hi; __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi)::"memory"); return (u64)hi << 32 | lo; }
static inline void relax(void) { __asm__ volatile("pause" ::: "memory"); }
static inline void barrier(void) { __asm__ volatile("" ::: "memory"); }
static inline void fence(void) { __asm__ volatile("mfence" ::: "memory"); }
static inline void cpuid(u32 leaf, u32 r[4])
{
	__asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "0"(leaf), "2"(0));
}

/* MMIO: plain moves, which every instruction emulator knows. */
static inline u8 mmio_read8(u64 a) { u8 v; __asm__ volatile("movb (%1), %0" : "=q"(v) : "r"(a) : "memory"); return v; }
static inline u16 mmio_read16(u64 a) { u16 v; __asm__ volatile("movw (%1), %0" : "=r"(v) : "r"(a) : "memory"); return v; }
static inline u32 mmio_read32(u64 a) { u32 v; __asm__ volatile("movl (%1), %0" : "=r"(v) : "r"(a) : "memory"); return v; }
static inline void mmio_write8(u64 a, u8 v) { __asm__ volatile("movb %0, (%1)" ::"q"(v), "r"(a) : "memory"); }
static inline void mmio_write16(u64 a, u16 v) { __asm__ volatile("movw %0, (%1)" ::"r"(v), "r"(a) : "memory"); }
static inline void mmio_write32(u64 a, u32 v) { __asm__ volatile("movl %0, (%1)" ::"r"(v), "r"(a) : "memory"); }
static inline void mmio_write64(u64 a, u64 v) { mmio_write32(a, (u32)v); mmio_write32(a + 4, (u32)(v >> 32)); }

/* clock.c */
u64 tsc_khz(void);
u64 ms_to_cycles(u64 ms);
/*
 * A wait for a device. A step of the TSC in which the guest cannot have run
 * (it was restored from a checkpoint where the TSC is the host's) counts little.
 */
struct wait {
	u64 seen, spent;
};
void wait_begin(struct wait *w);
bool wait_over(struct wait *w, u64 ms);
u32 pm_timer(void);
#define PM_TIMER_HZ 3579545
#define PM_TIMER_MASK 0xffffff

/* report.c: one line per workload, "probe: NAME key=value ...". */
void line(const char *name);
void kv(const char *key, u64 value);
void kvx(const char *key, u64 value);
void kvs(const char *key, const char *value);
void end(void);
void fail(const char *where, const char *why);
int serial_byte(void); /* the next byte received, or -1 */
void power_off(void) __attribute__((noreturn));

/* words.c: the command line. */
struct work {
	const char *name;
	int params;
	struct { const char *key, *value; } param[16];
};
int next_work(char **rest, struct work *w); /* 0 at the end */
u64 number(const struct work *w, const char *key, u64 otherwise); /* suffixes k, M, G */
const char *word(const struct work *w, const char *key, const char *otherwise);
bool same(const char *a, const char *b);

/* memory.c */
struct arena {
	u64 va;    /* where it is mapped */
	u64 pages;
};
void memory_init(void);
u64 ram_bytes(void);
u64 heap_pages(void);
void *meta_alloc(u64 bytes);           /* zeroed, identity mapped; NULL when out */
void *dma_alloc(u64 bytes);            /* page aligned, identity mapped; NULL when out */
u64 dma_mark(void);                    /* dma_alloc since can be undone */
void dma_release(u64 mark);
bool map_device(u64 gpa, u64 bytes);   /* identity map what lies above 4 GiB */
struct arena *arena_for(const struct work *w);
u32 *shuffled(u64 n, u64 seed);        /* a permutation of 0..n-1, from meta_alloc */
u64 meta_mark(void);
void meta_release(u64 mark);

/* pattern.c: what fill and blk write; probe.go has the same. */
u64 mix(u64 x);
static inline u64 pattern_word(u64 seed, u64 offset) { return mix(seed * 0x9e3779b97f4a7c15ull + offset / 8); }
void pattern_fill(u64 *p, u64 bytes, u64 seed, u64 offset);
u64 pattern_check(const u64 *p, u64 bytes, u64 seed, u64 offset); /* words that differ */
u64 checksum(u64 sum, const u64 *p, u64 bytes);
u64 random_next(u64 *state);

/* Workloads. */
void work_map(const struct work *w);
void work_touch(const struct work *w);
void work_chase(const struct work *w);
void work_dirty(const struct work *w);
void work_fill(const struct work *w);
void work_verify(const struct work *w);
void work_out(const struct work *w);
void work_mmio(const struct work *w);
void work_cpuid(const struct work *w);
void work_tick(const struct work *w);
void work_time(const struct work *w);
void work_spin(const struct work *w);
void work_wait(const struct work *w);
void work_fault(const struct work *w);
void work_blk(const struct work *w);
void work_rng(const struct work *w);
void work_net(const struct work *w);
void work_mix(const struct work *w);

#endif
