//! How commands of `weft` write their results.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;

/// For people, or for programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

/// Writes what others have put into a registry, too: of that a terminal must take nothing for a command
/// (console_codes(4)).
#[derive(Debug)]
pub struct Plain<W> {
    out: W,
    is_terminal: bool,
}

impl<W: Write + IsTerminal> Plain<W> {
    pub fn new(out: W) -> Self {
        let is_terminal = out.is_terminal();
        Self { out, is_terminal }
    }
}

impl<W: Write> Write for Plain<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.is_terminal {
            return self.out.write(bytes).map_err(closed);
        }
        let text = plain(&String::from_utf8_lossy(bytes));
        self.out.write_all(text.as_bytes()).map_err(closed)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush().map_err(closed)
    }
}

/// Whoever read what a command writes has read enough, as `head` has: no failure, unlike a daemon that hangs up.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads what is written any more")]
struct Closed;

fn closed(error: io::Error) -> io::Error {
    let is_pipe = error.kind() == io::ErrorKind::BrokenPipe;
    if is_pipe { io::Error::new(error.kind(), Closed) } else { error }
}

/// Whether a command failed for nothing but that.
pub fn is_closed(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.is_some_and(|error| error.is::<Closed>())
}

/// A text without control characters, but for tabs and the ends of its lines.
pub fn plain(text: &str) -> String {
    let is_command = |it: char| it.is_control() && !['\n', '\t'].contains(&it);
    text.replace(is_command, "\u{fffd}")
}

/// All of them on one line.
pub(crate) fn joined(items: impl IntoIterator<Item = impl ToString>, separator: &str) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(separator)
}

/// Three digits and a unit.
pub(crate) fn short(number: f64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match UNITS.into_iter().find(|(unit, _)| number >= *unit) {
        Some((unit, letter)) => {
            let digits = number / unit;
            let places = usize::from(digits < 10.0) + usize::from(digits < 100.0);
            format!("{digits:.places$}{letter}")
        }
        None => format!("{number:.0}"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53, and no count is beyond")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_told_nothing_but_text() {
        let written = |is_terminal| {
            let mut out = Plain { out: Vec::new(), is_terminal };
            writeln!(out, "bell\u{7} \u{1b}]0;title\u{9b}2J é").unwrap();
            String::from_utf8(out.out).unwrap()
        };
        assert_eq!(written(true), "bell\u{fffd} \u{fffd}]0;title\u{fffd}2J é\n");
        assert_eq!(written(false), "bell\u{7} \u{1b}]0;title\u{9b}2J é\n");
    }

    #[test]
    fn numbers_are_short() {
        let written = [0.0, 999.4, 1000.0, 12_345.0, 999_900.0, 1.5e9].map(short);
        assert_eq!(written, ["0", "999", "1.00k", "12.3k", "1000k", "1.50G"]);
    }
}
