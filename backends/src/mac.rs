//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// The text is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address, such as 0a:1b:2c:3d:4e:5f")]
pub struct BadMac(String);

impl Mac {
    /// Whether one device can have it: it is of no group, and not all zeros.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        parse(text).map(Self).ok_or_else(|| BadMac(text.chars().take(40).collect()))
    }
}

fn parse(text: &str) -> Option<[u8; 6]> {
    let parts: Vec<&str> = text.split(':').collect();
    let parts: [&str; 6] = parts.try_into().ok()?;
    let mut bytes = [0; 6];
    for (byte, part) in bytes.iter_mut().zip(parts) {
        let is_hex = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = is_hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let mac: Mac = "C6:d2:32:6f:8f:04".parse().unwrap();
        assert_eq!(mac.to_string(), "c6:d2:32:6f:8f:04");
        for bad in
            ["", "c6:d2:32:6f:8f", "c6:d2:32:6f:8f:04:05", "c6:d2:32:6f:8f:+4", "c6d2326f8f04"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_group_or_nobody_is_no_device() {
        assert!(Mac([2, 0, 0, 0, 0, 1]).is_unicast());
        assert!(!Mac([3, 0, 0, 0, 0, 1]).is_unicast());
        assert!(!Mac([0; 6]).is_unicast());
    }
}
