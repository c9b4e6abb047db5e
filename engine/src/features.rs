//! What the kernel does for many packets at once, and may refuse: found out at start, switched off
//! by hand, or given up at the first refusal. A feature that has fallen stays down.

use std::sync::atomic::{AtomicBool, Ordering};

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// TCP super-packets from the TUN (TUN_F_TSO4, TUN_F_TSO6).
    TunTso,
    /// UDP super-packets from and to the TUN (TUN_F_USO4, TUN_F_USO6; Linux 6.2).
    TunUso,
    /// Many datagrams in one send (UDP_SEGMENT).
    UdpSegment,
    /// Many datagrams in one receive (UDP_GRO).
    UdpGro,
    /// Neighbours of one TCP flow in one write to the TUN.
    TcpCoalesce,
    /// Neighbours of one UDP flow in one write to the TUN; needs `TunUso`.
    UdpCoalesce,
    /// One endless read from the TUN (IORING_OP_READ_MULTISHOT; Linux 6.7).
    MultishotRead,
}

impl Feature {
    pub const ALL: [Self; 7] = [
        Self::TunTso,
        Self::TunUso,
        Self::UdpSegment,
        Self::UdpGro,
        Self::TcpCoalesce,
        Self::UdpCoalesce,
        Self::MultishotRead,
    ];

    /// The name in flags, logs and status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TunTso => "tun-tso",
            Self::TunUso => "tun-uso",
            Self::UdpSegment => "udp-segment",
            Self::UdpGro => "udp-gro",
            Self::TcpCoalesce => "tcp-coalesce",
            Self::UdpCoalesce => "udp-coalesce",
            Self::MultishotRead => "multishot-read",
        }
    }
}

/// Which features are in use; shared by all threads.
#[derive(Debug)]
pub struct Features([AtomicBool; Feature::ALL.len()]);

impl Features {
    /// All but these.
    pub fn without(off: &[Feature]) -> Self {
        let features = Self([const { AtomicBool::new(true) }; Feature::ALL.len()]);
        for feature in off {
            features.fall(*feature);
        }
        features
    }

    pub fn has(&self, feature: Feature) -> bool {
        self.0[feature as usize].load(Ordering::Relaxed)
    }

    /// Gives the feature up, and what needs it; says whether it was in use until now.
    pub fn fall(&self, feature: Feature) -> bool {
        if feature == Feature::TunUso {
            self.fall(Feature::UdpCoalesce);
        }
        self.0[feature as usize].swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_falls_once_and_takes_along_what_needs_it() {
        let features = Features::without(&[Feature::UdpGro]);
        assert!(!features.has(Feature::UdpGro) && features.has(Feature::TunUso));
        assert!(features.has(Feature::UdpCoalesce));
        assert!(features.fall(Feature::TunUso));
        assert!(!features.fall(Feature::TunUso));
        assert!(!features.has(Feature::UdpCoalesce));
        assert!(features.has(Feature::TcpCoalesce));
    }
}
