//! The same as [`super::uring`] without io_uring, for kernels and sandboxes that lack it: poll(2),
//! read(2) from the TUN, recvmmsg(2) and sendmsg(2).
//!
//! Input is taken without blocking until there is none or the buffers are full; only then, and if
//! nothing has come of it, the thread sleeps in poll.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Completion, Direction, Files, Io, RECEIVE_BUFFERS, Received, Sent, Wait, Window};
use crate::batch::Transmit;
use crate::buffers::BufferId;
use crate::sys::{self, ReceiveMany};

/// The files, with the buffers for them.
pub(crate) struct Mmsg {
    direction: Direction,
    source: OwnedFd,
    bell: OwnedFd,
    sockets: Vec<OwnedFd>,
    /// Those for input first.
    buffers: Vec<Box<[u8]>>,
    /// Buffers that wait for input, and those to send from that are in no send.
    empty: Vec<u16>,
    free: Vec<u16>,
    window: Window,
    receive_many: ReceiveMany,
    queued: Vec<(BufferId, Transmit)>,
    done: Vec<Completion>,
}

impl fmt::Debug for Mmsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mmsg").field("direction", &self.direction).finish_non_exhaustive()
    }
}

impl Mmsg {
    /// # Errors
    /// No more files may be opened, or the source cannot be read without blocking.
    pub(crate) fn new(direction: Direction, files: &Files<'_>) -> io::Result<Self> {
        let count = RECEIVE_BUFFERS + direction.send_buffers();
        let len = direction.input_len_max();
        let source = files.source.try_clone_to_owned()?;
        rustix::io::ioctl_fionbio(&source, true)?;
        Ok(Self {
            direction,
            source,
            bell: files.bell.try_clone_to_owned()?,
            sockets: files
                .sockets
                .iter()
                .map(|socket| socket.try_clone_to_owned())
                .collect::<io::Result<_>>()?,
            buffers: (0..count).map(|_| vec![0; len].into_boxed_slice()).collect(),
            empty: (0..RECEIVE_BUFFERS).rev().collect(),
            free: (RECEIVE_BUFFERS..count).rev().collect(),
            window: Window::new(),
            receive_many: ReceiveMany::new(RECEIVE_BUFFERS.into()),
            queued: Vec::with_capacity(count.into()),
            done: Vec::with_capacity(usize::from(RECEIVE_BUFFERS + count)),
        })
    }

    fn send_queued(&mut self) {
        for (buffer, transmit) in self.queued.drain(..) {
            let packets = &self.buffers[usize::from(buffer.index())][transmit.packets.clone()];
            let result = sys::send(&self.sockets[transmit.outer.socket], packets, &transmit);
            self.done.push(Completion::Sent(Sent { buffer, transmit, result }));
        }
    }

    /// Takes what input there is.
    fn receive(&mut self) -> io::Result<()> {
        let outcome = match self.direction {
            Direction::TunToUdp => self.read(),
            Direction::UdpToTun => self.receive_datagrams(),
        };
        outcome.or_else(|error| if is_passing(&error) { Ok(()) } else { Err(error) })
    }

    fn read(&mut self) -> io::Result<()> {
        let last = self.empty.len().saturating_sub(self.window.packets.into());
        while let Some(index) = self.empty.get(last..).and_then(<[u16]>::last) {
            let buffer = &mut self.buffers[usize::from(*index)][..];
            let len = match rustix::io::read(&self.source, buffer) {
                // A packet that the driver has no virtio header for: an empty one, as with io_uring.
                Err(Errno::INVAL) => 0,
                read => read?,
            };
            let received = self.empty.pop().map(|it| Received::from_tun(BufferId::new(it), len));
            self.done.extend(received.map(Completion::Received));
        }
        Ok(())
    }

    fn receive_datagrams(&mut self) -> io::Result<()> {
        // In order, since they are borrowed in order; the lowest ones are used again and again.
        self.empty.sort_unstable();
        let mut indices = self.empty.iter().copied().peekable();
        let buffers = self.buffers.iter_mut().zip(0u16..);
        let empty = buffers.filter(|(_, at)| indices.next_if_eq(at).is_some());
        let empty = empty.take(self.window.packets.into());
        let count =
            self.receive_many.receive(&self.source, empty.map(|(bytes, _)| &mut bytes[..]))?;
        for (number, index) in self.empty.drain(..count).enumerate() {
            let (len, sender, marks) = self.receive_many.message(number);
            self.done.push(Completion::Received(Received {
                buffer: BufferId::new(index),
                packets: 0..len,
                segment_len: marks.segment_len.unwrap_or(len),
                sender,
                traffic_class: marks.traffic_class,
            }));
        }
        Ok(())
    }

    /// Sleeps until there is input or the bell rings.
    fn sleep(&mut self) -> io::Result<()> {
        let wanted = PollFlags::IN;
        let mut files = [PollFd::new(&self.source, wanted), PollFd::new(&self.bell, wanted)];
        match poll(&mut files, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if files[1].revents().contains(wanted) {
            let mut count = [0; 8];
            rustix::io::read(&self.bell, &mut count)?;
            self.done.push(Completion::Woken);
        }
        Ok(())
    }
}

impl Io for Mmsg {
    fn submit(&mut self, wait: Wait) -> io::Result<()> {
        self.send_queued();
        self.receive()?;
        if self.done.is_empty() && wait == Wait::Sleep {
            self.sleep()?;
            self.receive()?;
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.window.adapt(&self.done);
        out.append(&mut self.done);
    }

    fn packet(&self, buffer: &BufferId, at: &Range<usize>) -> &[u8] {
        &self.buffers[usize::from(buffer.index())][at.clone()]
    }

    fn packet_mut(&mut self, buffer: &BufferId, at: &Range<usize>) -> &mut [u8] {
        &mut self.buffers[usize::from(buffer.index())][at.clone()]
    }

    fn two_packets(
        &mut self,
        (from, from_at): (&BufferId, &Range<usize>),
        (to, to_at): (&BufferId, &Range<usize>),
    ) -> (&[u8], &mut [u8]) {
        let [from, to] = self
            .buffers
            .get_disjoint_mut([usize::from(from.index()), usize::from(to.index())])
            .expect("an id is never given out twice");
        (&from[from_at.clone()], &mut to[to_at.clone()])
    }

    fn take_buffer(&mut self) -> Option<BufferId> {
        self.free.pop().map(BufferId::new)
    }

    fn send(&mut self, buffer: BufferId, transmit: Transmit) {
        self.queued.push((buffer, transmit));
    }

    fn recycle(&mut self, buffer: BufferId) {
        let index = buffer.index();
        if index < RECEIVE_BUFFERS { self.empty.push(index) } else { self.free.push(index) }
    }
}

/// ECONNABORTED is what `ss --kill` leaves on a socket, which receives on (udp_abort() in net/ipv4/udp.c).
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}
