//! What probes and their answers look like on the wire: one UDP datagram between two nodes' addresses
//! on the overlay.
//!
//! ```text
//! "weft"  version  kind  flags  0   nonce, 8 bytes   filling, which follows from the nonce
//! ```
//!
//! The answer is no longer than the shortest probe, so that nobody gains by having it sent to
//! another.

/// Bytes of an answer, and of a probe at least.
pub(crate) const LEN_MIN: usize = 16;

const MAGIC: [u8; 4] = *b"weft";
const VERSION: u8 = 1;
const PROBE: u8 = 0;
const ANSWER: u8 = 1;
/// The probe came as it was sent.
const INTACT: u8 = 1;

/// A datagram that was understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packet {
    /// To be answered. Damaged on the way, if not intact.
    Probe {
        nonce: u64,
        intact: bool,
    },
    Answer {
        nonce: u64,
        intact: bool,
    },
}

/// A probe of `len` bytes, at least [`LEN_MIN`].
pub(crate) fn probe(nonce: u64, len: usize) -> Vec<u8> {
    let mut packet = header(PROBE, 0, nonce);
    packet.extend(filling(nonce, len.saturating_sub(LEN_MIN)));
    packet
}

/// The answer to a probe.
pub(crate) fn answer(nonce: u64, intact: bool) -> Vec<u8> {
    header(ANSWER, if intact { INTACT } else { 0 }, nonce)
}

/// Reads a datagram; `None` if it is neither probe nor answer.
pub(crate) fn read(datagram: &[u8]) -> Option<Packet> {
    let (header, rest) = datagram.split_at_checked(LEN_MIN)?;
    if header[..4] != MAGIC || header[4] != VERSION {
        return None;
    }
    let nonce = u64::from_be_bytes(header[8..].try_into().ok()?);
    match header[5] {
        PROBE => {
            let intact = rest == filling(nonce, rest.len());
            Some(Packet::Probe { nonce, intact })
        }
        ANSWER => Some(Packet::Answer { nonce, intact: header[6] & INTACT != 0 }),
        _ => None,
    }
}

fn header(kind: u8, flags: u8, nonce: u64) -> Vec<u8> {
    let mut packet = MAGIC.to_vec();
    packet.extend([VERSION, kind, flags, 0]);
    packet.extend(nonce.to_be_bytes());
    packet
}

/// Bytes without a pattern, so that whatever is lost, doubled or shifted shows: splitmix64.
fn filling(nonce: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    let mut state = nonce;
    while bytes.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend((word ^ (word >> 31)).to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_and_its_answer_are_read() {
        for len in [LEN_MIN, 17, 100, 1444] {
            let sent = probe(7, len);
            assert_eq!(sent.len(), len);
            assert_eq!(read(&sent), Some(Packet::Probe { nonce: 7, intact: true }));
        }
        for intact in [true, false] {
            assert_eq!(read(&answer(9, intact)), Some(Packet::Answer { nonce: 9, intact }));
            assert!(answer(9, intact).len() <= LEN_MIN);
        }
    }

    #[test]
    fn every_flipped_bit_of_the_filling_is_seen() {
        let sent = probe(7, 64);
        for bit in LEN_MIN * 8..sent.len() * 8 {
            let mut damaged = sent.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&damaged), Some(Packet::Probe { nonce: 7, intact: false }));
        }
    }

    #[test]
    fn what_is_no_probe_is_left_alone() {
        assert_eq!(read(b""), None);
        assert_eq!(read(&probe(1, LEN_MIN)[..15]), None);
        assert_eq!(read(b"GET / HTTP/1.1\r\n\r\n"), None);
        let mut later_version = probe(1, 20);
        later_version[4] = 2;
        assert_eq!(read(&later_version), None);
    }
}
