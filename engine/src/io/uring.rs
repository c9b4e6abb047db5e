//! A thread's io_uring: one endless read that fills buffers, sends from buffers, and a bell to
//! wake it.
//!
//! What the kernel does for us: the source is armed once (multishot) and takes a buffer of the
//! provided ring for each packet, until none is left (ENOBUFS) or something breaks; then it is
//! armed again. Sends with MSG_DONTWAIT and writes with RWF_NOWAIT end while they are submitted, so
//! packets keep their order without links between entries.
//!
//! A buffer is in one place at a time: with the kernel in the provided ring, free, with the caller
//! as a [`BufferId`], or with the kernel in a send.

use std::alloc::{self, Layout};
use std::fmt;
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, CancelBuilder, Fixed, RecvMsgOut, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use socket2::SockAddr;

use super::{Completion, Direction, Received, Sent, Written};
use crate::buffers::{BufferId, BufferPool};
use crate::offload::{VirtioNetHdr, WHOLE};

/// Buffers that super-packets from the TUN come in; more of this size only spill the cache.
const TUN_BUFFERS: u16 = 32;
/// Buffers that datagrams come in, many of one length in each (UDP_GRO).
const UDP_BUFFERS: u16 = 64;
/// Datagrams that the kernel puts into one buffer at most (UDP_GRO_CNT_MAX), each of which may
/// become a write of its own.
const WRITES_PER_BUFFER: u16 = 64;
const WRITES: u16 = UDP_BUFFERS * WRITES_PER_BUFFER;
/// Buffers that datagrams to peers go out from. A super-packet of 64 KiB fills one and begins the
/// next, and may leave an unfinished one behind.
const SEND_BUFFERS: u16 = 3 * TUN_BUFFERS;
/// The largest super-packet: its length is a 16-bit field of its IP header.
const SUPER_PACKET_LEN: usize = 65_535;
/// Where a kernel lacks READ_MULTISHOT (before 6.7): reads in flight. More would wake in vain.
const READS_IN_FLIGHT: u32 = 4;
/// Room in front of a received datagram for `io_uring_recvmsg_out`, the sender's address and the
/// control message that tells the length of each datagram.
const DATAGRAM_HEADROOM: usize = RECVMSG_OUT_LEN + SENDER_LEN + CONTROL_LEN;
const RECVMSG_OUT_LEN: usize = 16;
const SENDER_LEN: usize = size_of::<libc::sockaddr_in6>();
/// CMSG_SPACE of an int.
const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + 8;
/// Entries for submission. Sends take one for each buffer; writes may be more, and are handed to the
/// kernel whenever the queue is full.
const SUBMISSIONS: u32 = 512;
/// Completions that are reaped at once; more wait in the kernel.
const COMPLETIONS: u32 = 1024;

const _: () = assert!(TUN_BUFFERS.is_power_of_two() && UDP_BUFFERS.is_power_of_two());
const _: () = assert!((TUN_BUFFERS + SEND_BUFFERS) as u32 + READS_IN_FLIGHT < SUBMISSIONS);
const _: () = assert!(2 * (TUN_BUFFERS + SEND_BUFFERS) as u32 + READS_IN_FLIGHT < COMPLETIONS);

/// How long a closing ring waits for the kernel to let go of its buffers.
const CANCEL_TIMEOUT: Timespec = Timespec::new().sec(1);

/// Registered files.
const SOURCE: Fixed = Fixed(0);
const SINK: Fixed = Fixed(1);
const BELL: Fixed = Fixed(2);

/// The group number of the one provided ring.
const GROUP: u16 = 0;

/// What an entry was for, in its user data above the buffer's index.
const RECEIVE: u64 = 1 << 16;
const SEND: u64 = 2 << 16;
const WAKE: u64 = 3 << 16;

/// What the kernel's io_uring can do, found out once at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingFeatures {
    /// One read that fills buffer after buffer (Linux 6.7).
    pub(crate) read_multishot: bool,
}

impl RingFeatures {
    /// # Errors
    /// io_uring is switched off or too old; the text says which and what mends it.
    pub(crate) fn probe() -> io::Result<Self> {
        let ring = build_ring(8).map_err(explain)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(explain)?;
        Ok(Self { read_multishot: probe.is_supported(opcode::ReadMulti::CODE) })
    }
}

/// A thread's ring, with its buffers.
pub(crate) struct Ring {
    // Closed before the memory below is freed, which the kernel may write into until then.
    ring: IoUring,
    provided: ProvidedRing,
    pool: BufferPool,
    /// In tun_to_udp by buffer, in udp_to_tun by write.
    sends: Box<[SendSlot]>,
    /// In tun_to_udp buffers for sends that are in none; in udp_to_tun slots of no write.
    free: Vec<u16>,
    /// In udp_to_tun, by buffer.
    holds: Box<[Hold]>,
    /// What multishot receives are shaped by; the kernel reads it when armed.
    receive_shape: Box<libc::msghdr>,
    bell_count: Box<u64>,
    direction: Direction,
    features: RingFeatures,
    /// Receives that the kernel has.
    armed: u32,
    bell_armed: bool,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("direction", &self.direction).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for the calling thread, and for no other (SINGLE_ISSUER). `tun`, `udp` and `bell` (an
    /// eventfd) must be open until here only: the ring holds references of its own.
    ///
    /// # Errors
    /// The kernel refused the ring or one of its parts; the text says what mends it.
    pub(crate) fn new(
        direction: Direction,
        features: RingFeatures,
        [tun, udp, bell]: [BorrowedFd<'_>; 3],
    ) -> io::Result<Self> {
        let ring = build_ring(SUBMISSIONS).map_err(explain)?;
        let (source, sink) = match direction {
            Direction::TunToUdp => (tun, udp),
            Direction::UdpToTun => (udp, tun),
        };
        ring.submitter()
            .register_files(&[source.as_raw_fd(), sink.as_raw_fd(), bell.as_raw_fd()])
            .map_err(explain)?;
        let (receive, send, len) = match direction {
            Direction::TunToUdp => {
                (TUN_BUFFERS, SEND_BUFFERS, VirtioNetHdr::LEN + SUPER_PACKET_LEN)
            }
            Direction::UdpToTun => (UDP_BUFFERS, 0, DATAGRAM_HEADROOM + SUPER_PACKET_LEN),
        };
        let (slots, free) = match direction {
            Direction::TunToUdp => (receive + send, receive..receive + send),
            Direction::UdpToTun => (WRITES, 0..WRITES),
        };
        let pool = BufferPool::new(receive + send, len);
        let mut provided = ProvidedRing::register(&ring, receive).map_err(explain)?;
        for index in 0..receive {
            provided.add(index, &pool);
        }
        provided.publish();
        // SAFETY: msghdr is plain old data, for which all-zero bytes are a value.
        let mut receive_shape: Box<libc::msghdr> = Box::new(unsafe { mem::zeroed() });
        receive_shape.msg_namelen = socklen(SENDER_LEN);
        receive_shape.msg_controllen = CONTROL_LEN;
        Ok(Self {
            ring,
            provided,
            pool,
            sends: (0..slots).map(|_| SendSlot::empty()).collect(),
            free: free.collect(),
            holds: (0..receive).map(|_| Hold::default()).collect(),
            receive_shape,
            bell_count: Box::new(0),
            direction,
            features,
            armed: 0,
            bell_armed: false,
        })
    }

    /// The most completions that one [`Self::reap`] yields.
    pub(crate) const fn completions_max() -> usize {
        COMPLETIONS as usize
    }

    /// Hands everything queued to the kernel and sleeps until something has happened.
    ///
    /// # Errors
    /// The ring itself is broken; nothing more will come of it.
    pub(crate) fn submit_and_wait(&mut self) -> io::Result<()> {
        self.provided.publish();
        self.arm();
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            // Interrupted, or completions have piled up: both end with the next reap.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Collects what has happened, in order.
    ///
    /// # Errors
    /// The source is gone (EBADFD: the TUN device was deleted) or refuses to be read.
    pub(crate) fn reap(&mut self, out: &mut Vec<Completion>) -> io::Result<()> {
        let mut completed = self.ring.completion();
        completed.sync();
        for entry in completed {
            let index = index(entry.user_data());
            match entry.user_data() & !0xffff {
                SEND => out.push(match self.direction {
                    Direction::TunToUdp => {
                        self.sends[usize::from(index)].sent(index, entry.result())
                    }
                    Direction::UdpToTun => {
                        let slot = &mut self.sends[usize::from(index)];
                        self.free.push(index);
                        let hold = &mut self.holds[usize::from(slot.buffer)];
                        hold.writes -= 1;
                        if hold.is_over() {
                            self.provided.add(slot.buffer, &self.pool);
                        }
                        slot.written(entry.result())
                    }
                }),
                WAKE => {
                    self.bell_armed = false;
                    out.push(Completion::Woken);
                }
                _ => {
                    if !cqueue::more(entry.flags()) {
                        self.armed -= 1;
                    }
                    match outcome(entry.result()) {
                        Ok(len) => {
                            let buffer = cqueue::buffer_select(entry.flags());
                            if let Some(buffer) = buffer {
                                self.holds[usize::from(buffer)] = Hold::by_caller();
                            }
                            let received = buffer.map(|buffer| match self.direction {
                                Direction::TunToUdp => from_tun(buffer, len),
                                Direction::UdpToTun => {
                                    from_udp(buffer, len, &self.pool, &self.receive_shape)
                                }
                            });
                            out.extend(received.map(Completion::Received));
                        }
                        // Out of buffers, or nothing there after all: armed again at the next
                        // submission, when the caller has recycled what it has.
                        Err(error) if is_passing(&error) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    /// The packet in a buffer.
    pub(crate) fn packet(&self, buffer: &BufferId, at: &Range<usize>) -> &[u8] {
        self.assert_inside(at);
        let start = self.pool.start(buffer.index());
        // SAFETY: the bytes are inside the buffer (asserted), initialised since the pool was made,
        // and the caller's alone: it holds the only BufferId, which `recycle` and `send` take
        // before the kernel gets the buffer.
        unsafe { slice::from_raw_parts(start.add(at.start), at.len()) }
    }

    /// As [`Self::packet`], to be changed.
    pub(crate) fn packet_mut(&mut self, buffer: &BufferId, at: &Range<usize>) -> &mut [u8] {
        self.assert_inside(at);
        let hold = self.holds.get(usize::from(buffer.index()));
        assert!(hold.is_none_or(|it| it.written_to <= at.start), "the kernel reads there");
        let start = self.pool.start(buffer.index());
        // SAFETY: as in `packet`; writes that the kernel may still read are in front of it
        // (asserted), and `&mut self` keeps other slices of this ring away.
        unsafe { slice::from_raw_parts_mut(start.add(at.start), at.len()) }
    }

    /// Two packets in two buffers, the second one to be changed.
    pub(crate) fn two_packets(
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

    /// A free buffer to send from; `None` while all are in sends.
    pub(crate) fn take_buffer(&mut self) -> Option<BufferId> {
        self.free.pop().map(BufferId::new)
    }

    /// Queues datagrams to a peer that lie one behind the other, each of `segment_len` bytes but
    /// the last, which may have fewer. The buffer comes back as [`Completion::Sent`].
    pub(crate) fn send_to(
        &mut self,
        buffer: BufferId,
        packets: Range<usize>,
        segment_len: usize,
        peer: SocketAddr,
    ) {
        self.assert_inside(&packets);
        let index = buffer.index();
        let start = self.pool.start(index).wrapping_add(packets.start);
        let message = self.sends[usize::from(index)].fill(start, packets, segment_len, peer);
        let flags = libc::MSG_DONTWAIT.cast_unsigned();
        let entry = opcode::SendMsg::new(SINK, message).flags(flags).build();
        // SAFETY: the message and all that it points to live in `self.sends`, the packets in
        // `self.pool`; neither moves or is freed before the ring closes, and neither is touched
        // before the completion brings the buffer back.
        unsafe { self.push(&entry.user_data(SEND | u64::from(index))) }
    }

    /// Queues a packet in a received buffer to the TUN, behind this header: `packets` datagrams
    /// that were put together. Ends as [`Completion::Written`]. Until then nothing up to the end of
    /// the packet may be changed; what lies behind may.
    pub(crate) fn write(
        &mut self,
        buffer: &BufferId,
        packet: Range<usize>,
        header: [u8; VirtioNetHdr::LEN],
        packets: usize,
    ) {
        self.assert_inside(&packet);
        let slot = self.free.pop().expect("each datagram has a slot: see WRITES");
        let hold = &mut self.holds[usize::from(buffer.index())];
        hold.writes += 1;
        hold.written_to = packet.end;
        let start = self.pool.start(buffer.index()).wrapping_add(packet.start);
        let write = &mut self.sends[usize::from(slot)];
        write.buffer = buffer.index();
        write.count = packets;
        write.virtio_header = header;
        write.iovecs[0].iov_base = write.virtio_header.as_mut_ptr().cast();
        write.iovecs[0].iov_len = VirtioNetHdr::LEN;
        write.iovecs[1] = libc::iovec { iov_base: start.cast(), iov_len: packet.len() };
        write.packets = packet;
        let entry =
            opcode::Writev::new(SINK, write.iovecs.as_ptr(), 2).rw_flags(libc::RWF_NOWAIT).build();
        // SAFETY: the header and the iovecs live in `self.sends`, the packet in `self.pool`; none
        // moves before the ring closes. The slot is given out again only after its completion, and
        // `packet_mut` refuses bytes up to `written_to` until the buffer's writes are over.
        unsafe { self.push(&entry.user_data(SEND | u64::from(slot))) }
    }

    /// Gives a buffer back to where it came from: the source, once the writes from it are over, or
    /// the free ones.
    pub(crate) fn recycle(&mut self, buffer: BufferId) {
        let index = buffer.index();
        if index >= self.provided.len {
            self.free.push(index);
            return;
        }
        let hold = &mut self.holds[usize::from(index)];
        hold.caller = false;
        if hold.is_over() {
            self.provided.add(index, &self.pool);
        }
    }

    fn assert_inside(&self, at: &Range<usize>) {
        let inside = at.start <= at.end && at.end <= self.pool.buffer_len();
        assert!(inside, "a packet lies inside its buffer");
    }

    fn arm(&mut self) {
        while self.armed < self.receives_wanted() {
            let entry = self.receive_entry().user_data(RECEIVE);
            // SAFETY: receives write into the buffers of the provided ring only, which live until
            // the ring closes; the shape they read lives as long.
            unsafe { self.push(&entry) }
            self.armed += 1;
        }
        if !self.bell_armed {
            let count = ptr::from_mut(self.bell_count.as_mut()).cast();
            let entry = opcode::Read::new(BELL, count, 8).build().user_data(WAKE);
            // SAFETY: `bell_count` has the eight bytes and lives until the ring closes.
            unsafe { self.push(&entry) }
            self.bell_armed = true;
        }
    }

    fn receives_wanted(&self) -> u32 {
        match self.direction {
            Direction::TunToUdp if !self.features.read_multishot => READS_IN_FLIGHT,
            Direction::TunToUdp | Direction::UdpToTun => 1,
        }
    }

    fn receive_entry(&self) -> squeue::Entry {
        match self.direction {
            Direction::UdpToTun => {
                opcode::RecvMsgMulti::new(SOURCE, self.receive_shape.as_ref(), GROUP).build()
            }
            // io-uring 0.7.15 loses FIXED_FILE in this one opcode and would read descriptor 0.
            Direction::TunToUdp if self.features.read_multishot => {
                opcode::ReadMulti::new(SOURCE, 0, GROUP).build().flags(squeue::Flags::FIXED_FILE)
            }
            Direction::TunToUdp => {
                opcode::Read::new(SOURCE, ptr::null_mut(), len_u32(self.pool.buffer_len()))
                    .buf_group(GROUP)
                    .build()
                    .flags(squeue::Flags::BUFFER_SELECT)
            }
        }
    }

    /// # Safety
    /// What the entry points to must live, unmoved and unused, until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: the kernel takes what is there. An error shows again at the next wait.
            if let Err(error) = self.ring.submit() {
                tracing::debug!("io_uring_enter while queueing: {error}");
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let cancel = CancelBuilder::any().all();
        let cancelled = self.ring.submitter().register_sync_cancel(Some(CANCEL_TIMEOUT), cancel);
        let nothing_left = match cancelled {
            Ok(()) => true,
            Err(error) => error.raw_os_error() == Some(libc::ENOENT),
        };
        if !nothing_left {
            // The kernel may still write there: better lost than written to by surprise.
            mem::forget(mem::replace(&mut self.pool, BufferPool::new(0, 1)));
        }
    }
}

fn build_ring(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_cqsize(COMPLETIONS.max(entries))
        .build(entries)
}

/// Says which switch refuses io_uring.
fn explain(error: io::Error) -> io::Error {
    let cure = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "io_uring is forbidden here: by `sysctl kernel.io_uring_disabled` (set it to 0) or by \
             a container's seccomp profile (allow io_uring_setup, _enter and _register)"
        }
        Some(libc::ENOSYS) => "this kernel was built without io_uring, or seccomp hides it",
        Some(libc::EINVAL) => "this kernel's io_uring is too old: weft needs Linux 6.1",
        Some(libc::ENOMEM) => "raise the memlock limit (`ulimit -l`, LimitMEMLOCK=)",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{cure} ({error})"))
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR))
}

fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

fn from_tun(buffer: u16, len: usize) -> Received {
    Received { buffer: BufferId::new(buffer), packet: 0..len, segment_len: len, sender: None }
}

fn from_udp(buffer: u16, len: usize, pool: &BufferPool, shape: &libc::msghdr) -> Received {
    let len = len.min(pool.buffer_len());
    // SAFETY: the kernel has just handed over this buffer and does not write there any more; the
    // slice ends inside it and before this function does.
    let bytes = unsafe { slice::from_raw_parts(pool.start(buffer), len) };
    let message = RecvMsgOut::parse(bytes, shape).ok();
    let sender = message.as_ref().and_then(|message| sender(message.name_data()));
    let segment_len = message.as_ref().and_then(|message| segment_len(message.control_data()));
    let packet = DATAGRAM_HEADROOM.min(len)..len;
    Received {
        buffer: BufferId::new(buffer),
        segment_len: segment_len.unwrap_or(packet.len()),
        packet,
        sender: Some(sender.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))),
    }
}

/// Reads a sockaddr_in or sockaddr_in6 (ip(7), ipv6(7)).
fn sender(name: &[u8]) -> Option<IpAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let address = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*name.get(4..)?.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*name.get(8..)?.first_chunk::<16>()?)),
        _ => return None,
    };
    Some(address.to_canonical())
}

/// Reads the control message UDP_GRO (udp(7)), which the kernel adds where there are several.
fn segment_len(control: &[u8]) -> Option<usize> {
    let level = i32::from_ne_bytes(*control.get(8..)?.first_chunk()?);
    let kind = i32::from_ne_bytes(*control.get(12..)?.first_chunk()?);
    let value = i32::from_ne_bytes(*control.get(16..)?.first_chunk()?);
    let is_it = (level, kind) == (libc::SOL_UDP, libc::UDP_GRO);
    usize::try_from(value).ok().filter(|len| is_it && *len > 0)
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

/// Who needs a received buffer still.
#[derive(Debug, Clone, Copy, Default)]
struct Hold {
    /// The caller has its id.
    caller: bool,
    /// Writes from it that have not ended.
    writes: u16,
    /// Where the last of them ends in the buffer.
    written_to: usize,
}

impl Hold {
    fn by_caller() -> Self {
        Self { caller: true, ..Self::default() }
    }

    fn is_over(self) -> bool {
        !self.caller && self.writes == 0
    }
}

/// What a send or a write needs to have in memory while it runs.
struct SendSlot {
    message: libc::msghdr,
    /// A send has one part, a write two.
    iovecs: [libc::iovec; 2],
    peer: SockAddr,
    segment_control: SegmentControl,
    virtio_header: [u8; VirtioNetHdr::LEN],
    /// Of a write: where it is from, and how many packets are in it.
    buffer: u16,
    count: usize,
    packets: Range<usize>,
    segment_len: usize,
}

/// The control message UDP_SEGMENT (udp(7)), laid out as CMSG_DATA wants it.
#[repr(C)]
struct SegmentControl {
    header: libc::cmsghdr,
    segment_len: u16,
    padding: [u16; 3],
}

const _: () = assert!(size_of::<SegmentControl>() == 24, "CMSG_SPACE of two bytes");

impl SendSlot {
    fn empty() -> Self {
        Self {
            // SAFETY: msghdr is plain old data, for which all-zero bytes are a value.
            message: unsafe { mem::zeroed() },
            iovecs: [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; 2],
            virtio_header: WHOLE,
            buffer: 0,
            count: 0,
            peer: SockAddr::from(SocketAddr::from(([0; 4], 0))),
            segment_control: SegmentControl {
                header: libc::cmsghdr {
                    cmsg_len: size_of::<libc::cmsghdr>() + size_of::<u16>(),
                    cmsg_level: libc::SOL_UDP,
                    cmsg_type: libc::UDP_SEGMENT,
                },
                segment_len: 0,
                padding: [0; 3],
            },
            packets: 0..0,
            segment_len: 0,
        }
    }

    fn fill(
        &mut self,
        start: *mut u8,
        packets: Range<usize>,
        segment_len: usize,
        to: SocketAddr,
    ) -> *const libc::msghdr {
        self.peer = to.into();
        self.iovecs[0] = libc::iovec { iov_base: start.cast(), iov_len: packets.len() };
        self.message.msg_name = self.peer.as_ptr().cast_mut().cast();
        self.message.msg_namelen = self.peer.len();
        self.message.msg_iov = self.iovecs.as_mut_ptr();
        self.message.msg_iovlen = 1;
        // One packet goes without: there is nothing to cut, and nothing that could be refused.
        let control = (packets.len() > segment_len).then_some(&raw mut self.segment_control);
        self.message.msg_control = control.map_or(ptr::null_mut(), <*mut SegmentControl>::cast);
        self.message.msg_controllen = control.map_or(0, |_| size_of::<SegmentControl>());
        #[expect(clippy::cast_possible_truncation, reason = "a segment is an IP packet")]
        let segment_field = segment_len as u16;
        self.segment_control.segment_len = segment_field;
        self.packets = packets;
        self.segment_len = segment_len;
        &raw const self.message
    }

    fn written(&mut self, result: i32) -> Completion {
        Completion::Written(Written {
            packets: self.count,
            len: self.packets.len(),
            result: outcome(result).map(drop),
        })
    }

    fn sent(&mut self, index: u16, result: i32) -> Completion {
        Completion::Sent(Sent {
            buffer: BufferId::new(index),
            packets: mem::take(&mut self.packets),
            segment_len: self.segment_len,
            result: outcome(result).map(drop),
        })
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
    const PAGE: usize = 4096;

    fn layout(len: u16) -> Layout {
        let len = usize::from(len) * size_of::<BufRingEntry>();
        Layout::from_size_align(len.next_multiple_of(Self::PAGE), Self::PAGE)
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::time::Duration;

    use socket2::{Domain, SockRef, Socket, Type};

    use super::*;
    use crate::sys;

    const MULTISHOT: RingFeatures = RingFeatures { read_multishot: true };
    /// What Linux 6.1 has.
    const SINGLE_SHOT: RingFeatures = RingFeatures { read_multishot: false };

    /// A ring between a socket pair, which keeps packets apart as a TUN does, and a UDP socket.
    struct Fixture {
        ring: Ring,
        /// Where the kernel would be, behind the TUN.
        kernel: Socket,
        peer: UdpSocket,
        ours: SocketAddr,
        bell: File,
        _tun: Socket,
    }

    fn fixture(direction: Direction, features: RingFeatures) -> Fixture {
        let (tun, kernel) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let [udp, peer] = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        // The default holds fewer small datagrams than the ring has buffers.
        SockRef::from(&udp).set_recv_buffer_size(1 << 20).unwrap();
        let timeout = Some(Duration::from_secs(10));
        kernel.set_read_timeout(timeout).unwrap();
        peer.set_read_timeout(timeout).unwrap();
        let bell = sys::eventfd().unwrap();
        let files = [tun.as_fd(), udp.as_fd(), bell.as_fd()];
        let ring = Ring::new(direction, features, files).unwrap();
        let ours = udp.local_addr().unwrap();
        Fixture { ring, kernel, peer, ours, bell: bell.into(), _tun: tun }
    }

    /// Forwards packets until `count` have gone out, and returns the senders.
    fn forward(fixture: &mut Fixture, count: usize) -> Vec<Option<IpAddr>> {
        let to = fixture.peer.local_addr().unwrap();
        let (mut senders, mut sent) = (Vec::new(), 0);
        let mut completions = Vec::new();
        while sent < count {
            fixture.ring.submit_and_wait().unwrap();
            fixture.ring.reap(&mut completions).unwrap();
            for completion in completions.drain(..) {
                match completion {
                    Completion::Received(received) => {
                        let Received { buffer, packet, sender, segment_len } = received;
                        assert_eq!(segment_len, packet.len());
                        senders.push(sender);
                        match fixture.ring.direction {
                            Direction::TunToUdp => {
                                let len = packet.len();
                                fixture.ring.send_to(buffer, packet, len, to);
                            }
                            Direction::UdpToTun => {
                                fixture.ring.write(&buffer, packet, WHOLE, 1);
                                fixture.ring.recycle(buffer);
                            }
                        }
                    }
                    Completion::Sent(sent_one) => {
                        sent_one.result.unwrap();
                        fixture.ring.recycle(sent_one.buffer);
                        sent += 1;
                    }
                    Completion::Written(written) => {
                        written.result.unwrap();
                        sent += 1;
                    }
                    Completion::Woken => panic!("nobody rang"),
                }
            }
        }
        senders
    }

    /// Packets of many lengths, each beginning with its number.
    fn packet(number: usize) -> Vec<u8> {
        let mut packet = vec![0xab; 4 + number * 7 % 1400];
        packet[..4].copy_from_slice(&u32::try_from(number).unwrap().to_ne_bytes());
        packet
    }

    #[test]
    fn packets_keep_their_order_and_bytes_from_the_tun() {
        for features in [MULTISHOT, SINGLE_SHOT] {
            let mut fixture = fixture(Direction::TunToUdp, features);
            // Often enough that every buffer comes round a few times.
            for round in 0..20 {
                let numbers = round * 50..(round + 1) * 50;
                for number in numbers.clone() {
                    fixture.kernel.send(&packet(number)).unwrap();
                }
                assert_eq!(forward(&mut fixture, 50), vec![None; 50]);
                for number in numbers {
                    let mut bytes = [0; 2048];
                    let len = fixture.peer.recv(&mut bytes).unwrap();
                    assert_eq!(bytes[..len], packet(number), "{features:?}");
                }
            }
        }
    }

    #[test]
    fn packets_keep_their_order_and_bytes_to_the_tun() {
        let mut fixture = fixture(Direction::UdpToTun, MULTISHOT);
        for round in 0..20 {
            let numbers = round * 50..(round + 1) * 50;
            for number in numbers.clone() {
                fixture.peer.send_to(&packet(number), fixture.ours).unwrap();
            }
            let senders = forward(&mut fixture, 50);
            assert_eq!(senders, vec![Some("127.0.0.1".parse().unwrap()); 50]);
            for number in numbers {
                let mut bytes = [mem::MaybeUninit::new(0); 2048];
                let len = fixture.kernel.recv(&mut bytes).unwrap();
                assert_eq!(len, VirtioNetHdr::LEN + packet(number).len());
            }
        }
    }

    /// The multishot read ends when the buffers do (ENOBUFS), and nothing is lost by that.
    #[test]
    fn more_datagrams_than_buffers_all_arrive() {
        let mut fixture = fixture(Direction::UdpToTun, MULTISHOT);
        let count = usize::from(UDP_BUFFERS) + 100;
        for _ in 0..count {
            fixture.peer.send_to(b"small", fixture.ours).unwrap();
        }
        let mut completions = Vec::new();
        let mut received = 0;
        while received < count {
            fixture.ring.submit_and_wait().unwrap();
            fixture.ring.reap(&mut completions).unwrap();
            for completion in completions.drain(..) {
                let Completion::Received(Received { buffer, packet, .. }) = completion else {
                    panic!("nothing was sent: {completion:?}");
                };
                assert_eq!(fixture.ring.packet(&buffer, &packet), b"small");
                fixture.ring.recycle(buffer);
                received += 1;
            }
        }
    }

    #[test]
    fn the_largest_datagram_fits() {
        let mut fixture = fixture(Direction::UdpToTun, MULTISHOT);
        fixture.peer.send_to(&[7; 65_507], fixture.ours).unwrap();
        let mut completions = Vec::new();
        fixture.ring.submit_and_wait().unwrap();
        fixture.ring.reap(&mut completions).unwrap();
        let Some(Completion::Received(received)) = completions.pop() else { panic!() };
        assert_eq!(fixture.ring.packet(&received.buffer, &received.packet), [7; 65_507]);
    }

    #[test]
    fn the_bell_wakes_it() {
        let mut fixture = fixture(Direction::TunToUdp, MULTISHOT);
        fixture.bell.write_all(&1u64.to_ne_bytes()).unwrap();
        let mut completions = Vec::new();
        fixture.ring.submit_and_wait().unwrap();
        fixture.ring.reap(&mut completions).unwrap();
        assert!(matches!(completions[..], [Completion::Woken]), "{completions:?}");
    }

    #[test]
    fn a_refused_send_brings_the_buffer_back_with_its_reason() {
        let mut fixture = fixture(Direction::TunToUdp, MULTISHOT);
        fixture.kernel.send(b"packet").unwrap();
        let mut completions = Vec::new();
        fixture.ring.submit_and_wait().unwrap();
        fixture.ring.reap(&mut completions).unwrap();
        let Some(Completion::Received(received)) = completions.pop() else { panic!() };
        // An IPv6 address on an IPv4 socket.
        let len = received.packet.len();
        fixture.ring.send_to(received.buffer, received.packet, len, "[::1]:9".parse().unwrap());
        fixture.ring.submit_and_wait().unwrap();
        fixture.ring.reap(&mut completions).unwrap();
        let Some(Completion::Sent(sent)) = completions.pop() else { panic!() };
        assert_eq!(sent.result.unwrap_err().raw_os_error(), Some(libc::EAFNOSUPPORT));
        assert_eq!(fixture.ring.packet(&sent.buffer, &sent.packets), b"packet");
    }

    #[test]
    fn one_send_carries_many_datagrams() {
        let mut fixture = fixture(Direction::TunToUdp, MULTISHOT);
        let to = fixture.peer.local_addr().unwrap();
        let buffer = fixture.ring.take_buffer().unwrap();
        let packets = fixture.ring.packet_mut(&buffer, &(0..2500));
        for (number, segment) in (0u8..).zip(packets.chunks_mut(1000)) {
            segment.fill(number);
        }
        fixture.ring.send_to(buffer, 0..2500, 1000, to);
        let mut completions = Vec::new();
        fixture.ring.submit_and_wait().unwrap();
        fixture.ring.reap(&mut completions).unwrap();
        let Some(Completion::Sent(sent)) = completions.pop() else { panic!() };
        sent.result.unwrap();
        for (number, len) in [(0, 1000), (1, 1000), (2, 500)] {
            let mut bytes = [0; 2048];
            assert_eq!(fixture.peer.recv(&mut bytes).unwrap(), len);
            assert_eq!(bytes[..len], vec![number; len]);
        }
    }
}
