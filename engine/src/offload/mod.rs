//! Super-packets: what the kernel hands over, and takes back, in place of many packets of one flow.
//!
//! With IFF_VNET_HDR each packet from and to the TUN stands behind a [`VirtioNetHdr`], which says
//! how it is to be cut ([`segment`]) or was put together ([`coalesce`]), and which checksum is still
//! to be computed.

pub mod coalesce;
pub mod segment;

/// The header of a packet that wants nothing done.
pub const WHOLE: [u8; VirtioNetHdr::LEN] = [0; VirtioNetHdr::LEN];

/// What `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h) tells; its fields are in the
/// machine's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VirtioNetHdr {
    /// The checksum field holds the pseudo-header's sum only.
    pub needs_checksum: bool,
    pub gso: Gso,
    /// Bytes of headers in front of the payload. Only a hint, and wrong on packets that the kernel
    /// has forwarded to us.
    pub header_len: u16,
    /// Payload bytes of each segment; the last one may have fewer.
    pub segment_len: u16,
    /// Where the transport header begins, and with it the checksummed bytes.
    pub checksum_start: u16,
    /// Where the checksum is, from there.
    pub checksum_offset: u16,
}

/// What kind of super-packet it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gso {
    /// A packet like any other.
    #[default]
    None,
    Tcp4,
    Tcp6,
    Udp,
    /// Something this engine has not asked for.
    Unknown(u8),
}

impl VirtioNetHdr {
    pub const LEN: usize = 10;
    /// VIRTIO_NET_HDR_F_NEEDS_CSUM.
    const NEEDS_CSUM: u8 = 1;
    /// VIRTIO_NET_HDR_GSO_ECN: the first segment alone carries CWR.
    const ECN: u8 = 0x80;

    /// Reads the header in front of a packet from the TUN; `None` where there is no room for one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<{ Self::LEN }>()?;
        let field = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Some(Self {
            needs_checksum: bytes[0] & Self::NEEDS_CSUM != 0,
            gso: match bytes[1] & !Self::ECN {
                0 => Gso::None,
                1 => Gso::Tcp4,
                4 => Gso::Tcp6,
                5 => Gso::Udp,
                other => Gso::Unknown(other),
            },
            header_len: field(2),
            segment_len: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
        })
    }

    /// The header's bytes, to stand in front of a packet to the TUN.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = WHOLE;
        bytes[0] = if self.needs_checksum { Self::NEEDS_CSUM } else { 0 };
        bytes[1] = match self.gso {
            Gso::None => 0,
            Gso::Tcp4 => 1,
            Gso::Tcp6 => 4,
            Gso::Udp => 5,
            Gso::Unknown(other) => other,
        };
        let fields = [self.header_len, self.segment_len, self.checksum_start, self.checksum_offset];
        for (at, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            at.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}
