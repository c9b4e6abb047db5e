//! An io_uring for one direction of a worker: input that fills buffers, sends from buffers, and a bell
//! to wake its thread.
//!
//! What the kernel does for us: the socket is armed once (multishot) and takes a buffer of the
//! provided ring for each datagram, until none is left (ENOBUFS) or something breaks; then it is
//! armed again. Of the TUN, one read waits for a packet; once there is one, further reads look for
//! more without waiting (RWF_NOWAIT). One multishot read would save entries, but stays in the
//! device's wait queue for good, so that whoever sends to the device pays for a wake-up with each
//! packet, also while we are awake. Each read has a buffer of its own: of a provided ring, kernels
//! before 6.17 hand the same buffer to several reads where one of them finds nothing (liburing#1530).
//!
//! Sends with MSG_DONTWAIT and reads with RWF_NOWAIT end while they are submitted, so packets keep
//! their order without links between entries.

use std::alloc::{self, Layout};
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, CancelBuilder, Fixed, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use rustix::param::page_size;

use super::burst::Burst;
use super::message::{CONTROL_LEN, DATAGRAM_HEADROOM, SENDER_LEN, SendMessage, from_udp};
use super::{
    Completion, Direction, Files, Io, RECEIVE_BUFFERS, Received, SEND_BUFFERS, Sent, Wait, Window,
};
use crate::batch::Transmit;
use crate::buffers::{BufferId, BufferPool};
use crate::sys;

/// Entries for submission: more than there are buffers.
const SUBMISSIONS: u32 = 512;
/// Completions that are reaped at once; more wait in the kernel.
const COMPLETIONS: u32 = 1024;
/// How often one submission asks the kernel to go on where it has stopped with more to do: it takes
/// some 20 or 32 packets at a time, of whatever is there.
const ROUNDS: usize = 8;

const _: () = assert!(RECEIVE_BUFFERS.is_power_of_two());
const _: () = assert!((RECEIVE_BUFFERS + SEND_BUFFERS) as u32 + 2 < SUBMISSIONS);
const _: () = assert!(SUBMISSIONS <= COMPLETIONS);

/// How long a closing ring waits for the kernel to let go of its buffers.
const CANCEL_TIMEOUT: Timespec = Timespec::new().sec(1);

/// Registered files; the sockets to send from follow.
const SOURCE: Fixed = Fixed(0);
const BELL: Fixed = Fixed(1);
const SOCKETS: u32 = 2;

/// The group number of the one provided ring.
const GROUP: u16 = 0;

/// What an entry was for, in its user data above the buffer's index: datagrams, a read of the TUN
/// that waits, one that does not, a send, the bell.
const RECEIVE: u64 = 1 << 16;
const READ: u64 = 2 << 16;
const LOOK: u64 = 3 << 16;
const SEND: u64 = 4 << 16;
const WAKE: u64 = 5 << 16;

/// Whether io_uring is to be had, with all that one direction needs of it.
///
/// # Errors
/// It is switched off or too old, or may have too little memory; the text says which and what mends it.
pub(crate) fn probe() -> io::Result<()> {
    let ring = build_ring().map_err(explain)?;
    let datagrams = Datagrams::new(&ring).map_err(explain)?;
    // The kernel knows the buffers' memory until then.
    drop(ring);
    drop(datagrams);
    Ok(())
}

/// The ring, with its buffers.
pub(crate) struct Ring {
    // Closed before the memory below is freed, which the kernel may write into until then.
    ring: IoUring,
    /// `None` where packets are read from the TUN.
    datagrams: Option<Datagrams>,
    pool: BufferPool,
    /// By buffer.
    sends: Box<[SendSlot]>,
    /// Buffers for input that the kernel does not have; the last one has been used last.
    empty: Vec<u16>,
    window: Window,
    /// Buffers to send from that are in no send.
    free: Vec<u16>,
    bell_count: Box<u64>,
    direction: Direction,
    /// Whether the kernel has what waits for input.
    armed: bool,
    bell_armed: bool,
    burst: Burst,
    enter_flags: EnterFlags,
    done: Vec<Completion>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("direction", &self.direction).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for the calling thread, and for no other (SINGLE_ISSUER).
    ///
    /// # Errors
    /// The kernel refused the ring or one of its parts; the text says what mends it.
    pub(crate) fn new(direction: Direction, files: &Files<'_>) -> io::Result<Self> {
        let ring = build_ring().map_err(explain)?;
        let enter_flags = enter_flags(&ring);
        let Files { source, bell, sockets } = files;
        let all = [source, bell].into_iter().chain(sockets);
        let all: Vec<RawFd> = all.map(AsRawFd::as_raw_fd).collect();
        ring.submitter().register_files(&all).map_err(explain)?;
        let headroom = match direction {
            Direction::TunToUdp => 0,
            Direction::UdpToTun => DATAGRAM_HEADROOM,
        };
        let count = RECEIVE_BUFFERS + direction.send_buffers();
        let pool = BufferPool::new(count, headroom + direction.input_len_max());
        let datagrams = match direction {
            Direction::TunToUdp => None,
            Direction::UdpToTun => Some(Datagrams::new(&ring).map_err(explain)?),
        };
        Ok(Self {
            ring,
            datagrams,
            pool,
            sends: (0..count).map(|_| SendSlot::new()).collect(),
            empty: (0..RECEIVE_BUFFERS).rev().collect(),
            window: Window::new(),
            free: (RECEIVE_BUFFERS..count).rev().collect(),
            bell_count: Box::new(0),
            direction,
            armed: false,
            bell_armed: false,
            burst: Burst::default(),
            enter_flags,
            done: Vec::with_capacity(usize::from(2 * RECEIVE_BUFFERS + SEND_BUFFERS)),
        })
    }

    fn assert_inside(&self, at: &Range<usize>) {
        let inside = at.start <= at.end && at.end <= self.pool.buffer_len();
        assert!(inside, "a packet lies inside its buffer");
    }

    /// Gives the kernel as many buffers for datagrams as the window is wide.
    fn offer(&mut self) {
        let Some(datagrams) = &mut self.datagrams else { return };
        while datagrams.offered < self.window.packets
            && let Some(index) = self.empty.pop()
        {
            datagrams.provided.add(index, &self.pool);
            datagrams.offered += 1;
        }
        datagrams.provided.publish();
    }

    /// Submits what is queued, and waits until so many completions are there to be collected.
    fn enter(&mut self, wanted: u32) -> io::Result<()> {
        let queued = len_u32(self.ring.submission().len());
        let flags = self.enter_flags.bits();
        // SAFETY: no argument is passed; what queued entries point to is as `push` demands.
        let entered =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, wanted, flags, None) };
        match entered {
            Ok(_) => Ok(()),
            // Interrupted, or completions have piled up: both end when they are collected.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Has the kernel take the rest of the datagrams that are there.
    fn receive_on(&mut self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            if self.ring.submission().taskrun() {
                self.enter(0)?;
                continue;
            }
            self.collect()?;
            // An empty one ends a multishot receive, and anybody can send those.
            let is_cut_short = self.datagrams.as_ref().is_some_and(|it| it.offered > 0);
            if self.armed || !is_cut_short {
                return Ok(());
            }
            self.arm();
            self.enter(0)?;
        }
        self.collect().map(drop)
    }

    /// Once there is a packet, reads those behind it.
    fn read_on(&mut self) -> io::Result<()> {
        let mut found = self.collect()?;
        loop {
            let looks = self.burst.next(found, self.window.packets);
            if looks == 0 {
                return Ok(());
            }
            for _ in 0..looks {
                self.push_read(libc::RWF_NOWAIT, LOOK);
            }
            self.enter(0)?;
            found = self.collect()?;
        }
    }

    fn arm(&mut self) {
        if !self.armed {
            self.armed = match &self.datagrams {
                None => self.push_read(0, READ),
                Some(datagrams) => {
                    let shape = ptr::from_ref(datagrams.shape.as_ref());
                    let entry = opcode::RecvMsgMulti::new(SOURCE, shape, GROUP).build();
                    // SAFETY: it writes into the buffers of the provided ring only, which live until
                    // the ring closes; the shape that it reads lives as long.
                    unsafe { self.push(&entry.user_data(RECEIVE)) }
                    true
                }
            };
        }
        if !self.bell_armed {
            let count = ptr::from_mut(self.bell_count.as_mut()).cast();
            let entry = opcode::Read::new(BELL, count, 8).build().user_data(WAKE);
            // SAFETY: `bell_count` has the eight bytes and lives until the ring closes.
            unsafe { self.push(&entry) }
            self.bell_armed = true;
        }
    }

    /// Queues a read of the TUN, if there is an empty buffer.
    fn push_read(&mut self, flags: i32, what: u64) -> bool {
        let Some(index) = self.empty.pop() else { return false };
        let (start, len) = (self.pool.start(index), len_u32(self.pool.buffer_len()));
        let entry = opcode::Read::new(SOURCE, start, len).rw_flags(flags).build();
        // SAFETY: the buffer has the bytes and lives until the ring closes; it is in no list, and so
        // nobody's, until its completion brings it back.
        unsafe { self.push(&entry.user_data(what | u64::from(index))) }
        true
    }

    /// # Safety
    /// What the entry points to must live, unmoved and unused, until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: the kernel takes what is there. An error shows again at the next wait.
            if let Err(error) = self.enter(0) {
                tracing::debug!("io_uring_enter while queueing: {error}");
            }
        }
    }

    /// Whether there is nothing to submit and nothing to collect.
    fn is_quiet(&mut self) -> bool {
        let submissions = self.ring.submission();
        submissions.is_empty() && !submissions.taskrun() && !submissions.cq_overflow()
    }

    /// Takes what has completed, and says how many packets came in.
    fn collect(&mut self) -> io::Result<u16> {
        let mut packets = 0;
        while let Some(entry) = self.next_completion() {
            let index = index(entry.user_data());
            match entry.user_data() & !0xffff {
                SEND => {
                    let transmit = self.sends[usize::from(index)].transmit.take();
                    self.done.extend(transmit.map(|transmit| {
                        let result = outcome(entry.result()).map(drop);
                        Completion::Sent(Sent { buffer: BufferId::new(index), transmit, result })
                    }));
                }
                WAKE => {
                    self.bell_armed = false;
                    self.done.push(Completion::Woken);
                }
                RECEIVE => {
                    self.armed = cqueue::more(entry.flags());
                    // Where it is not to be had for want of a buffer or of datagrams, it is armed
                    // again at the next submission, when the caller has recycled what it has.
                    if let Some(len) = received(entry.result())? {
                        let buffer = cqueue::buffer_select(entry.flags());
                        let datagrams = self.datagrams.as_mut();
                        let received = datagrams
                            .zip(buffer)
                            .map(|(datagrams, buffer)| datagrams.take(buffer, len, &self.pool));
                        self.done.extend(received.map(Completion::Received));
                        packets += 1;
                    }
                }
                what => {
                    self.armed &= what != READ;
                    match received(read_result(entry.result()))? {
                        Some(len) => {
                            let received = Received::from_tun(BufferId::new(index), len);
                            self.done.push(Completion::Received(received));
                            packets += 1;
                        }
                        None => self.empty.push(index),
                    }
                }
            }
        }
        Ok(packets)
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }
}

impl Io for Ring {
    fn submit(&mut self, wait: Wait) -> io::Result<()> {
        self.offer();
        self.arm();
        match wait {
            Wait::Sleep => self.enter(1)?,
            // Where the kernel has nothing for us, and we nothing for it, this is no system call.
            Wait::Look if self.is_quiet() => return Ok(()),
            Wait::Look => self.enter(0)?,
        }
        if self.datagrams.is_some() { self.receive_on() } else { self.read_on() }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.window.adapt(&self.done);
        out.append(&mut self.done);
    }

    fn packet(&self, buffer: &BufferId, at: &Range<usize>) -> &[u8] {
        self.assert_inside(at);
        let start = self.pool.start(buffer.index());
        // SAFETY: the bytes are inside the buffer (asserted), initialised since the pool was made,
        // and the caller's alone: it holds the only BufferId, which `recycle` and `send` take
        // before the kernel gets the buffer.
        unsafe { slice::from_raw_parts(start.add(at.start), at.len()) }
    }

    fn packet_mut(&mut self, buffer: &BufferId, at: &Range<usize>) -> &mut [u8] {
        self.assert_inside(at);
        let start = self.pool.start(buffer.index());
        // SAFETY: as in `packet`; `&mut self` keeps other slices of this ring away.
        unsafe { slice::from_raw_parts_mut(start.add(at.start), at.len()) }
    }

    fn two_packets(
        &mut self,
        (from, from_at): (&BufferId, &Range<usize>),
        (to, to_at): (&BufferId, &Range<usize>),
    ) -> (&[u8], &mut [u8]) {
        assert!(from != to, "an id is never given out twice");
        self.assert_inside(from_at);
        self.assert_inside(to_at);
        let (from, to) = (self.pool.start(from.index()), self.pool.start(to.index()));
        // SAFETY: as in `packet`, for each; and they do not overlap, being in two buffers.
        unsafe {
            (
                slice::from_raw_parts(from.add(from_at.start), from_at.len()),
                slice::from_raw_parts_mut(to.add(to_at.start), to_at.len()),
            )
        }
    }

    fn take_buffer(&mut self) -> Option<BufferId> {
        self.free.pop().map(BufferId::new)
    }

    fn send(&mut self, buffer: BufferId, transmit: Transmit) {
        self.assert_inside(&transmit.packets);
        let index = buffer.index();
        let socket = SOCKETS + u32::try_from(transmit.outer.socket).expect("a handful of sockets");
        let start = self.pool.start(index).wrapping_add(transmit.packets.start);
        let slot = &mut self.sends[usize::from(index)];
        let message = slot.message.fill(start, &transmit);
        slot.transmit = Some(transmit);
        let flags = libc::MSG_DONTWAIT.cast_unsigned();
        let entry = opcode::SendMsg::new(Fixed(socket), message).flags(flags).build();
        // SAFETY: the message and all that it points to live in `self.sends`, the packets in
        // `self.pool`; neither moves or is freed before the ring closes, and neither is touched
        // before the completion brings the buffer back.
        unsafe { self.push(&entry.user_data(SEND | u64::from(index))) }
    }

    fn recycle(&mut self, buffer: BufferId) {
        let index = buffer.index();
        if index < RECEIVE_BUFFERS { self.empty.push(index) } else { self.free.push(index) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let cancel = CancelBuilder::any().all();
        // What says whether it worked are the completions.
        let _ = self.ring.submitter().register_sync_cancel(Some(CANCEL_TIMEOUT), cancel);
        // A ring is torn down some 20 to 80 ms after it is closed, and would hold its files open until
        // then: the next engine could not have a device of the same name. What was cancelled holds
        // them until its completion has been run. Where either fails, they are held for that long.
        let (submitter, flags) = (self.ring.submitter(), EnterFlags::GETEVENTS.bits());
        // SAFETY: nothing is submitted, nothing waited for, and no argument passed.
        let ran = unsafe { submitter.enter::<libc::sigset_t>(0, 0, flags, None) };
        let _ = ran.and_then(|_| submitter.unregister_files());
        // Each error is that of one completion.
        while self.collect().is_err() {}
        if self.armed || self.bell_armed {
            // The kernel may still use all that entries point to: better lost than written to by
            // surprise.
            mem::forget(mem::replace(&mut self.pool, BufferPool::new(0, 1)));
            mem::forget(mem::take(&mut self.bell_count));
            mem::forget(self.datagrams.take());
            mem::forget(mem::take(&mut self.sends));
        }
    }
}

fn build_ring() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_cqsize(COMPLETIONS)
        .build(SUBMISSIONS)
}

/// What each entry into the kernel asks for besides: to run what is due (deferred task work), and
/// not to count the wait for packets as a wait for a disk. Since Linux 6.15; before, an idle thread
/// shows as iowait.
fn enter_flags(ring: &IoUring) -> EnterFlags {
    let quiet = EnterFlags::GETEVENTS | EnterFlags::NO_IOWAIT;
    // SAFETY: nothing is submitted, nothing waited for, and no argument passed.
    let answer = unsafe { ring.submitter().enter::<libc::sigset_t>(0, 0, quiet.bits(), None) };
    if answer.is_ok() { quiet } else { EnterFlags::GETEVENTS }
}

/// Says which switch refuses io_uring.
fn explain(error: io::Error) -> io::Error {
    let cure = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "io_uring is forbidden here: by `sysctl kernel.io_uring_disabled` (set it to 0) or by \
             a container's seccomp profile (allow io_uring_setup, _enter and _register)"
        }
        Some(libc::ENOSYS) => "this kernel was built without io_uring, or seccomp hides it",
        Some(libc::EINVAL) => "this kernel's io_uring is too old: weft needs Linux 6.4",
        Some(libc::ENOMEM) => "raise the memlock limit (`ulimit -l`, LimitMEMLOCK=)",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{cure} ({error})"))
}

/// Bytes that came in; `None` where it was nothing, for want of buffers or of input.
fn received(result: i32) -> io::Result<Option<usize>> {
    match outcome(result) {
        Ok(len) => Ok(Some(len)),
        Err(error) => match error.raw_os_error() {
            // The last is left by `ss --kill`; the socket receives on (udp_abort() in net/ipv4/udp.c).
            Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR | libc::ECONNABORTED) => Ok(None),
            _ => Err(error),
        },
    }
}

/// A packet that the TUN driver has no virtio header for is lost there (EINVAL, tun_put_user() in
/// drivers/net/tun.c): to us it is an empty one, and the next one may be read.
fn read_result(result: i32) -> i32 {
    if result == -libc::EINVAL { 0 } else { result }
}

fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// What datagrams are received with: a ring of buffers, of which the kernel picks one for each.
struct Datagrams {
    provided: ProvidedRing,
    /// How many buffers the kernel has.
    offered: u16,
    /// What receives are shaped by; the kernel reads it when armed.
    shape: Box<libc::msghdr>,
}

impl Datagrams {
    fn new(ring: &IoUring) -> io::Result<Self> {
        let mut shape = Box::new(sys::empty_msghdr());
        shape.msg_namelen = socklen(SENDER_LEN);
        shape.msg_controllen = CONTROL_LEN;
        Ok(Self { provided: ProvidedRing::register(ring, RECEIVE_BUFFERS)?, offered: 0, shape })
    }

    /// A buffer that the kernel has filled.
    fn take(&mut self, buffer: u16, len: usize, pool: &BufferPool) -> Received {
        self.offered -= 1;
        let len = len.min(pool.buffer_len());
        // SAFETY: the kernel has just handed over this buffer and does not write there any more; the
        // slice ends inside it and before this function does.
        let bytes = unsafe { slice::from_raw_parts(pool.start(buffer), len) };
        from_udp(BufferId::new(buffer), bytes, &self.shape)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low 16 bits of user data are the index")]
fn index(user_data: u64) -> u16 {
    user_data as u16
}

#[expect(clippy::cast_possible_truncation, reason = "buffers are far below 4 GiB")]
fn len_u32(len: usize) -> u32 {
    len as u32
}

#[expect(clippy::cast_possible_truncation, reason = "socket addresses have at most 128 bytes")]
fn socklen(len: usize) -> libc::socklen_t {
    len as libc::socklen_t
}

/// A send, while it runs.
struct SendSlot {
    message: SendMessage,
    transmit: Option<Transmit>,
}

impl SendSlot {
    fn new() -> Self {
        Self { message: SendMessage::new(), transmit: None }
    }
}

/// The ring of buffers that the kernel takes from (io_uring_register_buf_ring(3)).
struct ProvidedRing {
    entries: NonNull<BufRingEntry>,
    /// How many there are, a power of two.
    len: u16,
    tail: u16,
}

impl ProvidedRing {
    /// Whole pages, which are of 16 or 64 KiB on some hosts.
    fn layout(len: u16) -> Layout {
        let (len, page) = (usize::from(len) * size_of::<BufRingEntry>(), page_size());
        Layout::from_size_align(len.next_multiple_of(page), page)
            .expect("a page is a valid alignment")
    }

    fn register(ring: &IoUring, len: u16) -> io::Result<Self> {
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc::alloc_zeroed(Self::layout(len)) };
        let Some(entries) = NonNull::new(memory.cast::<BufRingEntry>()) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        let provided = Self { entries, len, tail: 0 };
        // SAFETY: the memory is page-aligned, has room for the entries, and lives until after the
        // ring is closed: it is freed by our Drop, and `Ring` drops its IoUring first.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                entries.as_ptr().addr() as u64,
                len,
                GROUP,
                0,
            )?;
        }
        Ok(provided)
    }

    /// Puts a buffer at the end of the ring. The kernel sees it after [`Self::publish`].
    fn add(&mut self, index: u16, pool: &BufferPool) {
        let at = usize::from(self.tail & (self.len - 1));
        // SAFETY: `at` is below `len`, and the kernel does not read entries at or behind the
        // published tail. There is room: only buffers below `len` are added, and each is in the
        // ring at most once, since adding takes its BufferId.
        let entry = unsafe { &mut *self.entries.as_ptr().add(at) };
        entry.set_addr(pool.start(index).expose_provenance() as u64);
        entry.set_len(len_u32(pool.buffer_len()));
        entry.set_bid(index);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&self) {
        // SAFETY: the pointer is to the first entry of a registered ring; its tail is a u16,
        // aligned, which only this thread writes and the kernel reads atomically.
        let tail =
            unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries.as_ptr()).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

impl Drop for ProvidedRing {
    fn drop(&mut self) {
        // SAFETY: allocated by `register` with this layout, and the kernel has let go of it.
        unsafe { alloc::dealloc(self.entries.as_ptr().cast(), Self::layout(self.len)) }
    }
}
