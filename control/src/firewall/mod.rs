//! What weft asks of the kernel's firewall: that packets which leave the overlay are masqueraded,
//! and that the overlay's packets are let through. The rules are data ([`rules`]); two writers bring
//! them into the kernel, by [`iptables`] or by [`nftables`].

pub mod iptables;
pub mod nftables;
pub mod rules;

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

pub use rules::Rules;

/// What a program for the firewall did not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FirewallError {
    #[error("there is no {0}; install it, or choose the other --firewall")]
    Missing(String),
    #[error("`{command}`: {reason}")]
    Failed { command: String, reason: String },
    #[error(
        "{0} has not kept the rules that it took; another program changes them at the same time"
    )]
    NotKept(String),
}

/// How long a program may take. iptables-restore waits 5 s for others by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs a program to its end, giving it `input`, and returns what it wrote.
async fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, FirewallError> {
    let command = || [&[program], arguments].concat().join(" ");
    let failed = |reason: String| FirewallError::Failed { command: command(), reason };
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| {
            let is_missing = error.kind() == io::ErrorKind::NotFound;
            if is_missing {
                FirewallError::Missing(program.into())
            } else {
                failed(error.to_string())
            }
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let ended = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let ended = ended.map_err(|_| failed(format!("it did not end within {PATIENCE:?}")))?;
    let output = ended.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let told = String::from_utf8_lossy(&output.stderr);
    let told = told.trim().lines().next().unwrap_or_default();
    Err(failed(if told.is_empty() { output.status.to_string() } else { told.to_owned() }))
}
