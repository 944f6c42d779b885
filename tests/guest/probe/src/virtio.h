/* virtio 1.2 over PCI, modern devices only, polled: no interrupts. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "probe.h"

#define VIRTIO_NET 1
#define VIRTIO_BLK 2
#define VIRTIO_RNG 4

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 0x40

#define FEATURE(bit) (1ull << (bit))
#define F_INDIRECT FEATURE(28)
#define F_VERSION_1 FEATURE(32)
#define F_PACKED FEATURE(34)

/* Registers of the common configuration (virtio 1.2, 4.1.4.3). */
enum {
	COMMON_DEVICE_FEATURE_SELECT = 0, COMMON_DEVICE_FEATURE = 4,
	COMMON_DRIVER_FEATURE_SELECT = 8, COMMON_DRIVER_FEATURE = 12,
	COMMON_NUM_QUEUES = 18, COMMON_STATUS = 20,
	COMMON_QUEUE_SELECT = 22, COMMON_QUEUE_SIZE = 24, COMMON_QUEUE_ENABLE = 28,
	COMMON_QUEUE_NOTIFY_OFF = 30, COMMON_QUEUE_DESC = 32,
	COMMON_QUEUE_DRIVER = 40, COMMON_QUEUE_DEVICE = 48,
};

struct virtio {
	u32 pci;            /* where it is, as in port 0xcf8 */
	u64 common, notify, config;
	u32 notify_multiplier;
	u64 features;       /* agreed */
};

struct segment {
	u64 addr;
	u32 len;
	bool write;         /* the device writes it */
};

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
struct split_desc { u64 addr; u32 len; u16 flags, next; };
struct packed_desc { u64 addr; u32 len; u16 id, flags; };
struct avail { u16 flags, idx, ring[]; };
struct used { u16 flags, idx; struct { u32 id, len; } ring[]; };

/* A queue of requests, each known by an id below ids. */
struct queue {
	struct virtio *dev;
	u16 index, size, ids, segments; /* segments: at most so many a request */
	bool packed, indirect;
	bool hold;                      /* split: pushes stay unseen until queue_publish */
	u64 notify_addr;
	u64 kicks;
	union { struct split_desc *desc; struct packed_desc *pdesc; };
	union { volatile struct avail *avail; volatile u32 *driver_event; };
	union { volatile struct used *used; volatile u32 *device_event; };
	void *tables;                   /* indirect: one table an id */
	u16 next, seen;                 /* split: indexes; packed: slots */
	bool next_wrap, seen_wrap;      /* packed */
	u8 *chain;                      /* packed: slots each id took */
};

bool virtio_find(struct virtio *v, u32 type, u64 nth);
/* virtio_start resets the device and agrees on wanted features it offers. */
bool virtio_start(struct virtio *v, u64 wanted);
bool virtio_ready(struct virtio *v); /* DRIVER_OK, after the queues */
void virtio_reset(struct virtio *v);
u8 virtio_status(struct virtio *v);

bool queue_init(struct queue *q, struct virtio *v, u16 index, u16 segments);
void queue_place(struct queue *q, u64 desc, u64 driver, u64 device); /* tells the device */
void queue_push(struct queue *q, u16 id, const struct segment *s, int n);
void queue_publish(struct queue *q, u16 index);
void queue_kick(struct queue *q);
int queue_pop(struct queue *q, u32 *len); /* an id, or -1 */
int queue_wait(struct queue *q, u32 *len, u64 ms);

#endif
