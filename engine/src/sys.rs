//! System calls that no crate wraps safely: TUN queues, eventfd, and socket options by number.
//!
//! With `io/uring.rs` the only home of `unsafe`.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
        *to = from.cast_signed();
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
    let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| c.cast_unsigned());
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

/// A new eventfd(2), which wakes a thread that waits in its ring.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
