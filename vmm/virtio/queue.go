package virtio

// Buffer is one descriptor's memory.
type Buffer struct {
	GPA  uint64
	Data []byte
}

// Chain is one request popped from a Queue: what the driver lets the device
// read and then what it may write. A Chain is reused from Pop to Pop and so
// needs no allocation.
type Chain struct {
	Read  []Buffer
	Write []Buffer
	head  uint16
	count uint16 // descriptors taken, for packed rings
}

// Queue is one virtqueue (section 2.6 split, 2.7 packed), used only by its worker.
type Queue struct{}

// Index is the queue's number in its device.
func (q *Queue) Index() int { return 0 }

// Pop takes the next available chain into c. It returns false when there is
// none, and an error where the driver broke the ring (the device is then broken).
func (q *Queue) Pop(c *Chain) (bool, error) { return false, nil }

// Push returns c to the driver, of whose Write buffers the first written bytes
// were filled, and marks those pages dirty. The worker interrupts the
// driver, if it wants that, when Handle returns.
func (q *Queue) Push(c *Chain, written uint32) error { return nil }

// Wake has the queue's worker call Handle soon. Any goroutine may call it.
func (q *Queue) Wake() {}
