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

/// One check, made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) verdict: Verdict,
    /// What was seen, one line.
    pub(super) seen: String,
    /// The command that mends it; none where all is well.
    pub(super) cure: Option<String>,
}

impl Check {
    pub(super) fn ok(name: &'static str, seen: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, seen: seen.into(), cure: None }
    }

    pub(super) fn warn(
        name: &'static str,
        seen: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self { name, verdict: Verdict::Warn, seen: seen.into(), cure: Some(cure.into()) }
    }

    pub(super) fn fail(
        name: &'static str,
        seen: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self { name, verdict: Verdict::Fail, seen: seen.into(), cure: Some(cure.into()) }
    }

    /// What only a daemon could tell.
    pub(super) fn unknown(name: &'static str) -> Self {
        let seen = "not known while no weftd answers, or its flags cannot be read";
        Self::warn(name, seen, "systemctl start weftd   # and run this as root")
    }

    /// What only the registry could tell.
    pub(super) fn unread(name: &'static str, registry: &RegistrySeen) -> Self {
        let seen = "not known while the registry cannot be read";
        Self::warn(name, seen, registry.weft("show"))
    }
}
