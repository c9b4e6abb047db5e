//! Packet memory: one block, allocated at start, cut into equal buffers.

use std::cell::UnsafeCell;

use crate::sys;

/// One buffer. Whoever holds the id owns the buffer's bytes: it can't be copied, and the ring
/// takes it back before the kernel may write there again.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BufferId(u16);

impl BufferId {
    pub(crate) fn new(index: u16) -> Self {
        Self(index)
    }

    pub(crate) fn index(&self) -> u16 {
        self.0
    }
}

/// The memory of all buffers of one ring. The kernel writes into it too, hence the cells.
#[derive(Debug)]
pub(crate) struct BufferPool {
    memory: Box<[UnsafeCell<u8>]>,
    buffer_len: usize,
}

impl BufferPool {
    /// Buffers start on cache lines of their own.
    const ALIGN: usize = 64;

    /// `count` buffers of at least `len` bytes.
    pub(crate) fn new(count: u16, len: usize) -> Self {
        let buffer_len = len.next_multiple_of(Self::ALIGN);
        Self { memory: sys::zeroed_cells(usize::from(count) * buffer_len), buffer_len }
    }

    /// Bytes in each buffer.
    pub(crate) fn buffer_len(&self) -> usize {
        self.buffer_len
    }

    /// Where a buffer starts. The pointer is good for [`Self::buffer_len`] bytes and as long as
    /// the pool lives.
    pub(crate) fn start(&self, index: u16) -> *mut u8 {
        let offset = usize::from(index) * self.buffer_len;
        assert!(offset < self.memory.len(), "buffer {index} is not of this pool");
        // From the whole block's pointer, so that it may reach to the buffer's end.
        UnsafeCell::raw_get(self.memory.as_ptr().wrapping_add(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_and_large_enough() {
        let pool = BufferPool::new(4, 1500);
        assert_eq!(pool.buffer_len(), 1536);
        for index in 1..4 {
            let gap = pool.start(index).addr() - pool.start(index - 1).addr();
            assert_eq!(gap, pool.buffer_len());
        }
    }
}
