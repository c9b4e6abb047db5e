//! Explicit congestion notification across the tunnel (RFC 6040): what of the inner header's mark
//! goes outside, and what comes back in.

use crate::packet::{self, IpView};

/// The ECN field (RFC 3168 5): the low two bits of the traffic class.
const MASK: u8 = 0b11;
const NOT_ECT: u8 = 0b00;
const ECT_1: u8 = 0b01;
const CE: u8 = 0b11;

/// What goes into the outer header of packets to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EcnMode {
    /// Nothing, for peers that would lose a mark made on the way (flannel): routers then drop
    /// instead of marking (RFC 6040 4.3).
    Compatibility,
    /// The inner packet's field.
    Normal,
}

/// What of the inner DSCP (RFC 2474) goes into the outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DscpMode {
    /// Nothing, as flannel does.
    Clear,
    /// All of it.
    Copy,
}

/// The outer traffic class of a packet with this inner one.
pub fn outer(inner: u8, ecn: EcnMode, dscp: DscpMode) -> u8 {
    let ecn = if ecn == EcnMode::Normal { inner & MASK } else { NOT_ECT };
    let dscp = if dscp == DscpMode::Copy { inner & !MASK } else { 0 };
    dscp | ecn
}

/// Carries a mark made on the way over to the inner packet, which its view has checked (RFC 6040
/// 4.2). `false`: the packet is to be dropped, since its sender would not understand the mark.
pub fn carry_over(outer: u8, packet: &mut [u8]) -> bool {
    let Ok(view) = IpView::check(packet) else { return false };
    let class = view.traffic_class();
    let ecn = match (class & MASK, outer & MASK) {
        (NOT_ECT, CE) => return false,
        (NOT_ECT, _) => NOT_ECT,
        (_, CE) => CE,
        (CE, _) => CE,
        (_, ECT_1) => ECT_1,
        (inner, _) => inner,
    };
    if ecn != class & MASK {
        packet::set_traffic_class(packet, class & !MASK | ecn);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::tests::udp;

    const ECT_0: u8 = 0b10;

    /// The table of RFC 6040 4.2, figure 4: rows by inner, columns by outer field, in the order
    /// not-ECT, ECT(0), ECT(1), CE.
    #[test]
    fn marks_come_in_as_the_rfc_has_it() {
        let fields = [NOT_ECT, ECT_0, ECT_1, CE];
        let table = [
            [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None],
            [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)],
            [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)],
            [Some(CE), Some(CE), Some(CE), Some(CE)],
        ];
        for (source, to) in [("10.1.1.1", "10.1.2.1"), ("fd00::1", "fd00::2")] {
            for (inner, row) in fields.iter().zip(table) {
                for (outer, wanted) in fields.iter().zip(row) {
                    let mut packet = udp(source, to, 9, b"x");
                    packet::set_traffic_class(&mut packet, 0x2e << 2 | inner);
                    let delivered = carry_over(0x0a << 2 | outer, &mut packet);
                    let view = IpView::check(&packet).unwrap();
                    assert!(view.header_is_intact());
                    assert_eq!(delivered, wanted.is_some());
                    let ecn = wanted.unwrap_or(*inner);
                    assert_eq!(view.traffic_class(), 0x2e << 2 | ecn, "{inner} in {outer}");
                }
            }
        }
    }

    #[test]
    fn what_goes_outside() {
        let inner = 0x2e << 2 | ECT_0;
        assert_eq!(outer(inner, EcnMode::Compatibility, DscpMode::Clear), 0);
        assert_eq!(outer(inner, EcnMode::Normal, DscpMode::Clear), ECT_0);
        assert_eq!(outer(inner, EcnMode::Compatibility, DscpMode::Copy), 0x2e << 2);
        assert_eq!(outer(inner, EcnMode::Normal, DscpMode::Copy), inner);
    }
}
