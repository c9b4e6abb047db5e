//! `weft doctor` on a host of a lab, as programs read it.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_daemon::lab::Lab;

use crate::{DEADLINE, output_of, program, until_within};

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub name: String,
    pub verdict: String,
    pub seen: String,
    pub cure: String,
}

/// What it says of the one daemon there, or of none; and whether it was content.
pub fn doctor(lab: &Lab, host: usize, arguments: &[&str]) -> Result<(Vec<Check>, bool)> {
    let output = run(lab, host, &[&["-o", "json"], arguments].concat())?;
    let told: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let checks = told[0]["checks"].as_array().context("no checks")?;
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let checks = checks.iter().enumerate().map(|(at, check)| {
        ensure!(check["number"] == at + 1, "{check}");
        Ok(Check {
            name: text(check, "name"),
            verdict: text(check, "verdict"),
            seen: text(check, "seen"),
            cure: text(check, "cure"),
        })
    });
    Ok((checks.collect::<Result<_>>()?, output.status.success()))
}

/// Runs it to its end.
pub fn run(lab: &Lab, host: usize, arguments: &[&str]) -> Result<Output> {
    let host = lab.host(host);
    let mut command = Command::new(program("weft")?);
    command.args(["doctor", "--run-dir"]).arg(&host.run_dir).args(arguments);
    output_of(&host.netns, &mut command)
}

/// One check by its name.
pub fn check(lab: &Lab, host: usize, name: &str) -> Result<Check> {
    let (checks, _) = doctor(lab, host, &[])?;
    checks.into_iter().find(|check| check.name == name).with_context(|| format!("no {name}"))
}

/// Waits until a check comes to `verdict`, and what it saw or its cure contains `text`.
pub fn finds(lab: &Lab, host: usize, name: &str, verdict: &str, text: &str) -> Result<()> {
    finds_within(DEADLINE, lab, host, name, verdict, text).map(drop)
}

/// The same with another deadline.
pub fn finds_within(
    limit: Duration,
    lab: &Lab,
    host: usize,
    name: &str,
    verdict: &str,
    text: &str,
) -> Result<Check> {
    let mut last = None;
    let found = until_within(limit, &format!("doctor says {verdict} {name} with {text:?}"), || {
        let found = check(lab, host, name)?;
        let has = found.seen.contains(text) || found.cure.contains(text);
        let agrees = found.verdict == verdict && has && (verdict == "OK" || !found.cure.is_empty());
        last = Some(found);
        Ok(agrees)
    });
    found.with_context(|| format!("{last:?}"))?;
    last.context("it was found")
}
