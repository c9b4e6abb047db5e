//! `weft status`, as an operator calls it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use weft_daemon::netns::NetNs;
use weft_tests::{overlay, program};

/// What `weft` with these arguments answers: whether it succeeded, and its output.
fn weft(netns: &NetNs, arguments: &[&str]) -> Result<(bool, String, String)> {
    let output = netns.output(Command::new(program("weft")?).args(arguments))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

#[test]
fn it_tells_people_and_programs() -> Result<()> {
    let lab = overlay(2)?;
    let host = lab.host(0);
    let run_dir = text(&host.run_dir)?;
    // Directories go before and after the subcommand.
    let (ok, before, _) = weft(&host.netns, &["--run-dir", run_dir, "status", "-o", "json"])?;
    let (_, after, _) = weft(&host.netns, &["status", "-o", "json", "--run-dir", run_dir])?;
    assert!(ok, "{before}");
    let [before, after]: [Value; 2] =
        [serde_json::from_str(&before)?, serde_json::from_str(&after)?];
    assert_eq!(before[0]["node_id"], after[0]["node_id"]);
    assert_eq!(before[0]["peers"].as_array().context("no peers")?.len(), 1);

    let (ok, _, stderr) = weft(&host.netns, &["status", "--run-dir", "/nowhere"])?;
    assert!(!ok);
    assert!(stderr.contains("no weftd runs with --run-dir /nowhere"), "{stderr}");
    lab.remove()
}
