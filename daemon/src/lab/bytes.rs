//! Amounts of data as people write them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Factors by suffix, the exact ones for printing first, largest first.
const UNITS: [(&str, u64); 9] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
];

/// A number of bytes: `1000`, `64MiB` (also `64M`), `64MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// The text is no number of bytes.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no number of bytes; write 1000, 64MiB or 1GiB")]
pub struct BadBytes(String);

impl FromStr for Bytes {
    type Err = BadBytes;

    fn from_str(text: &str) -> Result<Self, BadBytes> {
        let (number, factor) = UNITS
            .iter()
            .find_map(|(suffix, factor)| Some((strip_suffix(text, suffix)?, *factor)))
            .unwrap_or((text, 1));
        let parsed = number.trim_end().parse::<u64>().ok();
        let bytes = parsed.and_then(|number| number.checked_mul(factor));
        bytes.map(Self).ok_or_else(|| BadBytes(text.to_owned()))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let even =
            UNITS[..3].iter().find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor));
        match even {
            Some((suffix, factor)) => write!(f, "{} {suffix}", self.0 / factor),
            None => write!(f, "{} B", self.0),
        }
    }
}

fn strip_suffix<'a>(text: &'a str, suffix: &str) -> Option<&'a str> {
    let at = text.len().checked_sub(suffix.len())?;
    let (number, end) = text.split_at_checked(at)?;
    end.eq_ignore_ascii_case(suffix).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("64MiB", 64 << 20),
            ("64M", 64 << 20),
            ("64 mib", 64 << 20),
            ("2kB", 2000),
            ("2K", 2048),
            ("1GiB", 1 << 30),
            ("3GB", 3_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in ["", "MiB", "-1", "1.5GiB", "64 x", "é", "99999999999GiB"] {
            assert!(text.parse::<Bytes>().unwrap_err().to_string().contains(text), "{text}");
        }
    }

    #[test]
    fn prints_the_largest_exact_unit() {
        let printed = [64 << 20, 1536, 1000].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(printed, ["64 MiB", "1536 B", "1000 B"]);
    }
}
