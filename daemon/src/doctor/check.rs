//! What a check comes to.

use std::fmt;

use serde::Serialize;

use super::seen::RegistrySeen;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Verdict {
    Ok,
    /// It works, but not as well as it could, or not for long.
    Warn,
    /// Packets get lost, or will at the next change.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// What one check saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) verdict: Verdict,
    /// What was seen, one line.
    pub(super) seen: String,
    /// The command that mends it; none where all is well, or another check has it.
    pub(super) cure: Option<String>,
}

/// Each as a `Judge` returns it.
impl Check {
    pub(super) fn ok(seen: impl Into<String>) -> Option<Self> {
        Some(Self { verdict: Verdict::Ok, seen: seen.into(), cure: None })
    }

    pub(super) fn warn(seen: impl Into<String>, cure: impl Into<String>) -> Option<Self> {
        Some(Self { verdict: Verdict::Warn, seen: seen.into(), cure: Some(cure.into()) })
    }

    pub(super) fn fail(seen: impl Into<String>, cure: impl Into<String>) -> Option<Self> {
        Some(Self { verdict: Verdict::Fail, seen: seen.into(), cure: Some(cure.into()) })
    }

    /// What only the registry could tell.
    pub(super) fn unread(registry: &RegistrySeen) -> Option<Self> {
        Self::warn("not known while the registry cannot be read", registry.weft("show"))
    }
}
