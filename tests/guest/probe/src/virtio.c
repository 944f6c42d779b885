/* Finding virtio devices on PCI bus 0, and driving their queues. */
#include "virtio.h"

#define PCI_ADDRESS 0xcf8
#define PCI_DATA 0xcfc
#define MAX_SIZE 256
/* BARs that nobody placed go here: within the hole, away from where others put theirs. */
#define BAR_AREA 0xd0000000

static u32 pci_read(u32 dev, u32 reg)
{
	out32(PCI_ADDRESS, 1u << 31 | dev | (reg & 0xfc));
	return in32(PCI_DATA);
}

static void pci_write(u32 dev, u32 reg, u32 v)
{
	out32(PCI_ADDRESS, 1u << 31 | dev | (reg & 0xfc));
	out32(PCI_DATA, v);
}

/* bar_address returns where a memory BAR is, placing it if nobody has; 0 if it is none. */
static u64 bar_address(u32 dev, u32 bar)
{
	static u64 free = BAR_AREA;
	u32 reg = 0x10 + bar * 4, low = pci_read(dev, reg);
	if (bar > 5 || low & 1)
		return 0;
	bool wide = (low & 6) == 4;
	u64 addr = low & ~0xfu;
	if (wide)
		addr |= (u64)pci_read(dev, reg + 4) << 32;
	if (addr)
		return addr;
	pci_write(dev, reg, ~0u);
	u64 size = ~(pci_read(dev, reg) & ~0xfu) + 1u;
	if (!size)
		return 0;
	free = (free + size - 1) & ~(size - 1);
	pci_write(dev, reg, free);
	if (wide)
		pci_write(dev, reg + 4, 0);
	addr = free;
	free += size;
	return addr;
}

static bool read_capabilities(struct virtio *v)
{
	u64 bars[6] = {0};
	v->common = v->notify = v->config = 0;
	u32 at = pci_read(v->pci, 0x34) & 0xfc;
	for (int i = 0; at && i < 48; i++) {
		u32 head = pci_read(v->pci, at);
		u32 kind = head >> 24;
		if ((head & 0xff) == 0x09 && (kind == 1 || kind == 2 || kind == 4)) {
			u32 bar = pci_read(v->pci, at + 4) & 0xff;
			u64 offset = pci_read(v->pci, at + 8);
			u32 length = pci_read(v->pci, at + 12);
			if (bar < 6 && !bars[bar])
				bars[bar] = bar_address(v->pci, bar);
			if (bar < 6 && bars[bar] && map_device(bars[bar] + offset, length)) {
				u64 addr = bars[bar] + offset;
				if (kind == 1)
					v->common = addr;
				if (kind == 4)
					v->config = addr;
				if (kind == 2) {
					v->notify = addr;
					v->notify_multiplier = pci_read(v->pci, at + 16);
				}
			}
		}
		at = head >> 8 & 0xfc;
	}
	return v->common && v->notify;
}

bool virtio_find(struct virtio *v, u32 type, u64 nth)
{
	static u32 ids[32]; /* a configuration read is two exits: look once */
	static bool looked;
	static const u16 transitional[] = {[VIRTIO_NET] = 0x1000, [VIRTIO_BLK] = 0x1001, [VIRTIO_RNG] = 0x1005};
	for (u32 slot = 0; !looked && slot < 32; slot++)
		ids[slot] = pci_read(slot << 11, 0);
	looked = true;
	for (u32 slot = 0; slot < 32; slot++) {
		u32 device = ids[slot] >> 16;
		if ((ids[slot] & 0xffff) != 0x1af4 || (device != 0x1040 + type && device != transitional[type]))
			continue;
		if (nth--)
			continue;
		v->pci = slot << 11;
		if (!read_capabilities(v))
			return false;
		u32 command = pci_read(v->pci, 4) & 0xffff;
		if ((command & 6) != 6)
			pci_write(v->pci, 4, command | 6); /* memory space, bus master */
		return true;
	}
	return false;
}

u8 virtio_status(struct virtio *v) { return mmio_read8(v->common + COMMON_STATUS); }

static void add_status(struct virtio *v, u8 bits)
{
	mmio_write8(v->common + COMMON_STATUS, virtio_status(v) | bits);
}

void virtio_reset(struct virtio *v)
{
	mmio_write8(v->common + COMMON_STATUS, 0);
	for (int tries = 0; virtio_status(v) && tries < 100000; tries++)
		relax();
}

bool virtio_start(struct virtio *v, u64 wanted)
{
	virtio_reset(v);
	add_status(v, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	u64 offered = 0;
	for (u32 half = 0; half < 2; half++) {
		mmio_write32(v->common + COMMON_DEVICE_FEATURE_SELECT, half);
		offered |= (u64)mmio_read32(v->common + COMMON_DEVICE_FEATURE) << half * 32;
	}
	v->features = offered & (wanted | F_VERSION_1);
	for (u32 half = 0; half < 2; half++) {
		mmio_write32(v->common + COMMON_DRIVER_FEATURE_SELECT, half);
		mmio_write32(v->common + COMMON_DRIVER_FEATURE, (u32)(v->features >> half * 32));
	}
	add_status(v, STATUS_FEATURES_OK);
	return virtio_status(v) & STATUS_FEATURES_OK && v->features & F_VERSION_1;
}

bool virtio_ready(struct virtio *v)
{
	add_status(v, STATUS_DRIVER_OK);
	return !(virtio_status(v) & STATUS_NEEDS_RESET);
}

static void *rings(u64 bytes)
{
	void *p = dma_alloc(bytes);
	if (p)
		__builtin_memset(p, 0, bytes);
	return p;
}

void queue_place(struct queue *q, u64 desc, u64 driver, u64 device)
{
	u64 c = q->dev->common;
	mmio_write16(c + COMMON_QUEUE_SELECT, q->index);
	mmio_write16(c + COMMON_QUEUE_SIZE, q->size);
	mmio_write64(c + COMMON_QUEUE_DESC, desc);
	mmio_write64(c + COMMON_QUEUE_DRIVER, driver);
	mmio_write64(c + COMMON_QUEUE_DEVICE, device);
	u16 offset = mmio_read16(c + COMMON_QUEUE_NOTIFY_OFF);
	q->notify_addr = q->dev->notify + (u64)offset * q->dev->notify_multiplier;
	mmio_write16(c + COMMON_QUEUE_ENABLE, 1);
}

bool queue_init(struct queue *q, struct virtio *v, u16 index, u16 segments)
{
	*q = (struct queue){.dev = v, .index = index, .segments = segments, .next_wrap = true, .seen_wrap = true};
	mmio_write16(v->common + COMMON_QUEUE_SELECT, index);
	q->size = mmio_read16(v->common + COMMON_QUEUE_SIZE);
	if (!q->size)
		return false;
	if (q->size > MAX_SIZE)
		q->size = MAX_SIZE;
	q->packed = v->features & F_PACKED;
	q->indirect = v->features & F_INDIRECT;
	q->ids = q->indirect ? q->size : q->size / segments;
	q->desc = rings(q->size * 16);
	q->avail = rings(6 + 2 * q->size);
	q->used = rings(6 + 8 * q->size);
	q->tables = rings((u64)q->size * segments * 16);
	q->chain = rings(q->size);
	if (!q->desc || !q->avail || !q->used || !q->tables || !q->chain)
		return false;
	if (q->packed)
		*q->driver_event = 1 << 16; /* no interrupts: this polls */
	else
		q->avail->flags = 1;
	queue_place(q, (u64)q->desc, (u64)q->avail, (u64)q->used);
	return true;
}

static void split_push(struct queue *q, u16 id, const struct segment *s, int n)
{
	u16 head = id;
	struct split_desc *d;
	u16 base = 0;
	if (q->indirect) {
		d = (struct split_desc *)q->tables + (u64)id * q->segments;
		q->desc[id] = (struct split_desc){(u64)d, n * 16, DESC_INDIRECT, 0};
	} else {
		head = base = id * q->segments;
		d = &q->desc[base];
	}
	for (int i = 0; i < n; i++)
		d[i] = (struct split_desc){s[i].addr, s[i].len,
			(s[i].write ? DESC_WRITE : 0) | (i + 1 < n ? DESC_NEXT : 0), base + i + 1};
	q->avail->ring[q->next % q->size] = head;
	q->next++;
	if (!q->hold)
		queue_publish(q, q->next);
}

void queue_publish(struct queue *q, u16 index)
{
	barrier();
	q->avail->idx = index;
}

static u16 packed_flags(bool wrap) { return wrap ? 1 << 7 : 1 << 15; }

static void packed_push(struct queue *q, u16 id, const struct segment *s, int n)
{
	struct segment table;
	u16 extra = 0;
	if (q->indirect) {
		struct packed_desc *d = (struct packed_desc *)q->tables + (u64)id * q->segments;
		for (int i = 0; i < n; i++)
			d[i] = (struct packed_desc){s[i].addr, s[i].len, 0, s[i].write ? DESC_WRITE : 0};
		table = (struct segment){(u64)d, n * 16, false};
		s = &table;
		n = 1;
		extra = DESC_INDIRECT;
	}
	u16 first = q->next, first_flags = 0;
	q->chain[id] = n;
	for (int i = 0; i < n; i++) {
		struct packed_desc *d = &q->pdesc[q->next];
		u16 flags = packed_flags(q->next_wrap) | extra | (s[i].write ? DESC_WRITE : 0) | (i + 1 < n ? DESC_NEXT : 0);
		d->addr = s[i].addr;
		d->len = s[i].len;
		d->id = id;
		if (i == 0)
			first_flags = flags;
		else
			d->flags = flags;
		if (++q->next == q->size) {
			q->next = 0;
			q->next_wrap = !q->next_wrap;
		}
	}
	barrier();
	*(volatile u16 *)&q->pdesc[first].flags = first_flags;
}

void queue_push(struct queue *q, u16 id, const struct segment *s, int n)
{
	if (q->packed)
		packed_push(q, id, s, n);
	else
		split_push(q, id, s, n);
}

void queue_kick(struct queue *q)
{
	fence();
	if (q->packed ? (*q->device_event >> 16 & 3) == 1 : q->used->flags & 1)
		return;
	q->kicks++;
	mmio_write16(q->notify_addr, q->index);
}

int queue_pop(struct queue *q, u32 *len)
{
	u16 id;
	if (q->packed) {
		struct packed_desc *d = &q->pdesc[q->seen];
		u16 flags = *(volatile u16 *)&d->flags;
		if ((flags >> 7 & 1) != q->seen_wrap || flags >> 15 != q->seen_wrap)
			return -1;
		barrier();
		id = d->id;
		*len = d->len;
		if (id >= q->size)
			return -1;
		q->seen += q->chain[id];
		if (q->seen >= q->size) {
			q->seen -= q->size;
			q->seen_wrap = !q->seen_wrap;
		}
		return id;
	}
	if (q->used->idx == q->seen)
		return -1;
	barrier();
	id = q->used->ring[q->seen % q->size].id;
	*len = q->used->ring[q->seen % q->size].len;
	q->seen++;
	return q->indirect ? id : id / q->segments;
}

int queue_wait(struct queue *q, u32 *len, u64 ms)
{
	struct wait w;
	wait_begin(&w);
	for (;;) {
		int id = queue_pop(q, len);
		if (id >= 0 || wait_over(&w, ms))
			return id;
		relax();
	}
}
