//! Super-packets: what the kernel hands over in place of many packets of one flow.
//!
//! With IFF_VNET_HDR each packet from and to the TUN stands behind a [`VirtioNetHdr`], which says
//! how it is to be cut ([`segment`]) and which checksum is still to be computed. To the TUN all
//! packets go whole and finished, behind [`WHOLE`].

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
            // Field 2, the length of the headers, is wrong for packets that were forwarded.
            segment_len: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
        })
    }
}
