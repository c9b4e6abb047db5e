//! Offloads of devices, by ethtool(8): the kernel's own way to them is wrapped safely by no crate that
//! is used here.

use std::process::Command;

/// Switches an offload of a device off, and says whether it was on and is so no more.
pub(crate) fn switch_off(device: &str, offload: &str) -> bool {
    let is_on = |listed: String| listed.lines().any(|line| line.trim() == format!("{offload}: on"));
    if !run(&["-k", device]).is_some_and(is_on) {
        return false;
    }
    run(&["-K", device, offload, "off"]).is_some()
}

fn run(arguments: &[&str]) -> Option<String> {
    let output = Command::new("ethtool").args(arguments).env("LC_ALL", "C").output();
    let line = || format!("ethtool {}", arguments.join(" "));
    match output {
        Ok(output) if output.status.success() => {
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            tracing::warn!("`{}` failed: {reason}", line());
            None
        }
        Err(error) => {
            tracing::warn!("cannot run `{}`: {error}; install ethtool", line());
            None
        }
    }
}
