//! What the lab is doing, on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{bar:24} {pos:>3}/{len} {elapsed:>4} {wide_msg}";

/// How often the bar shows the time.
const TICK: Duration = Duration::from_millis(200);

/// The way through a known number of steps.
#[derive(Debug)]
pub(super) struct Progress {
    /// None where stderr is no terminal.
    bar: Option<ProgressBar>,
}

impl Progress {
    /// At the first of `steps` steps.
    pub(super) fn new(steps: u64) -> Self {
        Self { bar: io::stderr().is_terminal().then(|| bar(steps)) }
    }

    /// The next step begins.
    pub(super) fn step(&self, what: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(what.to_owned());
                bar.inc(1);
            }
            None => eprintln!("{what}"),
        }
    }

    /// Something that shall stay on the screen.
    pub(super) fn note(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{what}")),
            None => eprintln!("{what}"),
        }
    }

    /// Clears the screen for the results.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn bar(steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(TEMPLATE);
    let bar = ProgressBar::new(steps);
    // The template is a constant; were it wrong, the plain style shows the same.
    let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(TICK);
    bar
}
