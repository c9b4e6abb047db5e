//! The TUN device: one interface, one queue a worker.
//!
//! The kernel steers a flow's packets to one queue and spreads flows over the queues that are
//! open. So every queue needs a reader: packets in one that nobody reads are lost. The device
//! lives as long as any process holds one of its queues open.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tun::AbstractDevice;

use crate::features::{Feature, FeatureState, Features};
use crate::sys;

/// What is offered to the kernel (TUNSETOFFLOAD, include/uapi/linux/if_tun.h): TUN_F_CSUM, without
/// which there is nothing else; TUN_F_TSO4, _TSO6 and _TSO_ECN; TUN_F_USO4 and _USO6.
const CSUM: libc::c_uint = 0x01;
const TSO: libc::c_uint = 0x02 | 0x04 | 0x08;
const USO: libc::c_uint = 0x20 | 0x40;

/// How long the queues of a process that has just ended may keep a name busy: io_uring lets go of
/// its files some 20 to 80 ms after the exit, and later on a busy machine.
const BUSY_GRACE: Duration = Duration::from_secs(2);

/// A TUN device with its queues.
#[derive(Debug)]
pub struct TunDevice {
    name: String,
    queues: Vec<TunQueue>,
}

/// One queue: a packet a read, a packet a write.
#[derive(Debug)]
pub struct TunQueue(File);

impl TunDevice {
    /// Makes a device with this many queues. `name` may hold one `%d`, for which the kernel puts
    /// the next free number. The device is down and has no addresses.
    ///
    /// # Errors
    /// ENOENT: no `/dev/net/tun`. EPERM: CAP_NET_ADMIN is missing. EBUSY: the name is taken by
    /// another process's device. EINVAL: the name is too long, or that of a device of another kind.
    pub fn open(name: &str, queues: usize, features: &Features) -> io::Result<Self> {
        let (first, name) = open_when_free(name)?;
        let mut device = Self { name, queues: vec![TunQueue(first)] };
        for _ in 1..queues {
            let (queue, _) = sys::open_tun_queue(&device.name)?;
            device.queues.push(TunQueue(queue.into()));
        }
        device.offer_offloads(features);
        Ok(device)
    }

    /// The kernel then hands over super-packets, as large as an IP packet can be. What it does not
    /// know falls.
    fn offer_offloads(&self, features: &Features) {
        let lacks = |feature| features.fall(feature, FeatureState::Missing);
        loop {
            let tso = if features.has(Feature::TunTso) { TSO } else { 0 };
            let uso = if features.has(Feature::TunUso) { USO } else { 0 };
            let csum = if tso | uso == 0 { 0 } else { CSUM };
            let offer = sys::set_tun_offload(self.queues[0].as_fd(), csum | tso | uso);
            match offer {
                Err(_) if lacks(Feature::TunUso) || lacks(Feature::TunTso) => {}
                // Nothing offered is what a new device has.
                Ok(()) | Err(_) => return,
            }
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether a read can be told not to wait, as io_uring tells it; that is since Linux 6.4. Before, a
    /// thread of the kernel's waits in each read: several have no order among them, and do not end in
    /// time.
    pub(crate) fn reads_without_waiting(&self) -> bool {
        // The device is down, so there is nothing to be read. u64::MAX: this file has no offset.
        let mut byte = [0];
        let mut into = [IoSliceMut::new(&mut byte)];
        let read = preadv2(&self.queues[0], &mut into, u64::MAX, ReadWriteFlags::NOWAIT);
        read != Err(Errno::OPNOTSUPP)
    }

    /// Sets the largest packet that the device carries, and brings the device up.
    ///
    /// # Errors
    /// The kernel refused the MTU (68 to 65535), or somebody deleted the device.
    pub fn bring_up(&self, mtu: u16) -> io::Result<()> {
        let mut config = tun::Configuration::default();
        config.tun_name(&self.name).raw_fd(self.queues[0].0.as_raw_fd()).close_fd_on_drop(false);
        let mut device = tun::Device::new(&config).map_err(io::Error::other)?;
        device.set_mtu(mtu).map_err(io::Error::other)?;
        device.enabled(true).map_err(io::Error::other)
    }

    /// Hands out the queues, each to one worker.
    pub fn into_queues(self) -> Vec<TunQueue> {
        self.queues
    }
}

fn open_when_free(name: &str) -> io::Result<(File, String)> {
    let deadline = Instant::now() + BUSY_GRACE;
    loop {
        match sys::open_tun_queue(name) {
            Ok((queue, name)) => return Ok((queue.into(), name)),
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
}

impl TunQueue {
    /// Hands the kernel one packet, in pieces, behind its virtio header.
    pub(crate) fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.0).write_vectored(pieces).map(drop)
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<TunQueue> for File {
    fn from(queue: TunQueue) -> Self {
        queue.0
    }
}
