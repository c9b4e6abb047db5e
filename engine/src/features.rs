//! What the kernel does for many packets at once, and may refuse: found out at start, switched off
//! by hand, or given up at the first refusal. A feature that has fallen stays down.

use std::sync::atomic::{AtomicU8, Ordering};

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
}

impl Feature {
    pub const ALL: [Self; 6] = [
        Self::TunTso,
        Self::TunUso,
        Self::UdpSegment,
        Self::UdpGro,
        Self::TcpCoalesce,
        Self::UdpCoalesce,
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
        }
    }
}

/// Whether a feature is in use, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FeatureState {
    On,
    /// By a flag.
    Off,
    /// This kernel has no such thing.
    Missing,
    /// The kernel refused it while packets flowed.
    Refused,
    /// Probes found that packets get lost by it.
    Lossy,
}

impl FeatureState {
    const ALL: [Self; 5] = [Self::On, Self::Off, Self::Missing, Self::Refused, Self::Lossy];

    /// The name in status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Missing => "missing",
            Self::Refused => "refused",
            Self::Lossy => "lossy",
        }
    }
}

/// Which features are in use; shared by all threads.
#[derive(Debug)]
pub struct Features([AtomicU8; Feature::ALL.len()]);

impl Features {
    /// All but these.
    pub fn without(off: &[Feature]) -> Self {
        let features = Self([const { AtomicU8::new(FeatureState::On as u8) }; Feature::ALL.len()]);
        for feature in off {
            features.fall(*feature, FeatureState::Off);
        }
        features
    }

    pub fn has(&self, feature: Feature) -> bool {
        self.0[feature as usize].load(Ordering::Relaxed) == FeatureState::On as u8
    }

    pub fn state(&self, feature: Feature) -> FeatureState {
        FeatureState::ALL[usize::from(self.0[feature as usize].load(Ordering::Relaxed))]
    }

    /// Gives the feature up for this reason, and what needs it; says whether it was in use until now.
    pub fn fall(&self, feature: Feature, why: FeatureState) -> bool {
        if feature == Feature::TunUso {
            self.fall(Feature::UdpCoalesce, why);
        }
        let (on, why) = (FeatureState::On as u8, why as u8);
        let cell = &self.0[feature as usize];
        cell.compare_exchange(on, why, Ordering::Relaxed, Ordering::Relaxed).is_ok()
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
        assert!(features.fall(Feature::TunUso, FeatureState::Missing));
        assert!(!features.fall(Feature::TunUso, FeatureState::Refused));
        assert_eq!(features.state(Feature::TunUso), FeatureState::Missing);
        assert_eq!(features.state(Feature::UdpGro), FeatureState::Off);
        assert_eq!(features.state(Feature::TunTso), FeatureState::On);
        assert!(!features.has(Feature::UdpCoalesce));
        assert!(features.has(Feature::TcpCoalesce));
    }
}
