//! System calls that no crate wraps safely: TUN queues, scheduling, and socket options by number.
//!
//! With `io/uring.rs` the only home of `unsafe`.

use std::cell::UnsafeCell;
use std::fs::File;
use std::io;
use std::iter;
use std::mem;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use crate::batch::Transmit;
use crate::io::message::{CONTROL_LEN, Marks, SENDER_LEN, SendMessage, sender};

/// Opens one queue of a TUN device: many queues, each packet behind a `virtio_net_hdr` (tun.rst in
/// the kernel's documentation). `name` may hold one `%d`, for which the kernel puts the next free
/// number; the name it gave comes back.
///
/// # Errors
/// ENOENT: no `/dev/net/tun`. EPERM: CAP_NET_ADMIN is missing. EBUSY: the name is taken by another
/// process's device. EINVAL: the name is too long or taken by a device of another kind.
pub(crate) fn open_tun_queue(name: &str) -> io::Result<(OwnedFd, String)> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain old data, for which all-zero bytes are a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let fits = name.len() < request.ifr_name.len() && !name.contains('\0');
    if !fits {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        // A c_char has a sign on some architectures, and none on others.
        *to = libc::c_char::from_ne_bytes([from]);
    }
    #[expect(clippy::cast_possible_truncation, reason = "TUN flags are 16 bits by definition")]
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR)
        as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is and outlives the call.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().take_while(|c| **c != 0).flat_map(|c| c.to_ne_bytes());
    let name = String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned();
    Ok((file.into(), name))
}

/// Offers the kernel to take packets of these kinds (TUN_F_…) uncut and unsummed. It applies to the
/// whole device.
///
/// # Errors
/// EINVAL: this kernel does not know one of the kinds.
pub(crate) fn set_tun_offload(queue: BorrowedFd<'_>, kinds: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let answer =
        unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(kinds)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the calling thread is scheduled as threads are unless somebody chooses (SCHED_OTHER).
pub(crate) fn is_scheduled_by_default() -> bool {
    // SAFETY: sched_getscheduler takes no pointers; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_OTHER }
}

/// Has the calling thread scheduled by SCHED_BATCH, or by SCHED_OTHER (sched(7)).
///
/// # Errors
/// EPERM: a seccomp filter forbids it.
pub(crate) fn schedule_as_batch(on: bool) -> io::Result<()> {
    let policy = if on { libc::SCHED_BATCH } else { libc::SCHED_OTHER };
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` outlives the call, which reads it only; 0 is the calling thread.
    let answer = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes that are worth a mapping of their own.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: libc::c_int = 1 << 20;

/// Bytes that the kernel may write to as well. Pages that nobody touches take no memory.
pub(crate) fn zeroed_cells(len: usize) -> Box<[UnsafeCell<u8>]> {
    // Once it is freed, glibc would keep such memory for the next engine's, which it then clears: all of it
    // would be in memory (M_MMAP_THRESHOLD in mallopt(3)).
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointers.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    };
    let bytes = Box::into_raw(vec![0u8; len].into_boxed_slice());
    // SAFETY: the box was just given up, and UnsafeCell<u8> has the layout of u8
    // (repr(transparent)).
    unsafe { Box::from_raw(bytes as *mut [UnsafeCell<u8>]) }
}

/// A msghdr that says nothing.
pub(crate) fn empty_msghdr() -> libc::msghdr {
    // SAFETY: msghdr is plain old data, for which all-zero bytes are a value.
    unsafe { mem::zeroed() }
}

/// Sends datagrams that lie one behind the other: `packets` are the bytes of the range that
/// `transmit` names. Does not block.
///
/// # Errors
/// Those of sendmsg(2); nothing was sent.
pub(crate) fn send(socket: impl AsFd, packets: &[u8], transmit: &Transmit) -> io::Result<()> {
    assert_eq!(packets.len(), transmit.packets.len(), "the bytes are those of the range");
    let mut message = SendMessage::new();
    let header = message.fill(packets.as_ptr().cast_mut(), transmit);
    // SAFETY: the header points into `message` and to `packets`, whose length is the one in it
    // (asserted); both outlive the call, and sendmsg reads them only.
    let answer = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), header, libc::MSG_DONTWAIT) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What recvmmsg(2) needs in memory, and what it leaves there.
pub(crate) struct ReceiveMany {
    headers: Vec<libc::mmsghdr>,
    places: Vec<Place>,
}

/// Where one message's parts go.
struct Place {
    packet: libc::iovec,
    sender: [u8; SENDER_LEN],
    /// Aligned as cmsg(3) wants it.
    control: [u64; CONTROL_LEN / 8],
}

impl ReceiveMany {
    /// Room for `count` messages.
    pub(crate) fn new(count: usize) -> Self {
        let place = || Place {
            packet: libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 },
            sender: [0; SENDER_LEN],
            control: [0; CONTROL_LEN / 8],
        };
        let header = || libc::mmsghdr { msg_hdr: empty_msghdr(), msg_len: 0 };
        Self {
            headers: iter::repeat_with(header).take(count).collect(),
            places: iter::repeat_with(place).take(count).collect(),
        }
    }

    /// Receives what is there, a message into each buffer, and says how many there are. Does not
    /// block.
    ///
    /// # Errors
    /// Those of recvmmsg(2); EAGAIN: nothing is there.
    pub(crate) fn receive<'a>(
        &mut self,
        socket: impl AsFd,
        buffers: impl Iterator<Item = &'a mut [u8]>,
    ) -> io::Result<usize> {
        let mut count = 0;
        for ((header, place), buffer) in self.headers.iter_mut().zip(&mut self.places).zip(buffers)
        {
            place.packet =
                libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let header = &mut header.msg_hdr;
            header.msg_name = place.sender.as_mut_ptr().cast();
            header.msg_iov = &raw mut place.packet;
            header.msg_iovlen = 1;
            header.msg_control = place.control.as_mut_ptr().cast();
            #[expect(clippy::cast_possible_truncation, reason = "a socket address is short")]
            let name_len = SENDER_LEN as libc::socklen_t;
            header.msg_namelen = name_len;
            header.msg_controllen = CONTROL_LEN;
            count += 1;
        }
        // SAFETY: `count` headers were just pointed at places and buffers that outlive the call,
        // with their lengths; the buffers are borrowed apart from each other.
        let answer = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        usize::try_from(answer).map_err(|_| io::Error::last_os_error())
    }

    /// Length, sender and marks of a message that the last [`Self::receive`] has counted.
    pub(crate) fn message(&self, number: usize) -> (usize, Option<IpAddr>, Marks) {
        let (header, place) = (&self.headers[number], &self.places[number]);
        let words = place.control.iter().flat_map(|word| word.to_ne_bytes());
        let mut control = [0; CONTROL_LEN];
        control.iter_mut().zip(words).for_each(|(to, from)| *to = from);
        let control = &control[..header.msg_hdr.msg_controllen.min(CONTROL_LEN)];
        (header.msg_len as usize, sender(&place.sender), Marks::parse(control))
    }
}

/// setsockopt(2) for options whose value is an `int`.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let answer = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), INT_LEN)
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// getsockopt(2) for options whose value is an `int`.
pub(crate) fn option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = INT_LEN;
    // SAFETY: the pointers describe `value` and its length; both outlive the call.
    let answer = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut len)
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

#[expect(clippy::cast_possible_truncation, reason = "an int has four bytes")]
const INT_LEN: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;
