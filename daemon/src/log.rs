//! What goes to the log, and how: one line a state change, as text, as JSON, or to the journal. The
//! last lines are kept for `weft status`; levels can be changed while the daemon runs.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::io::{self, IsTerminal, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::flags::LoggingFlags;

/// How many lines are kept.
const KEPT: usize = 10;

/// How lines are written to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people; where stderr is the journal, the fields are the journal's, too.
    Text,
    /// One object a line.
    Json,
}

/// A line of the log that tells of a change of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When it was written.
    pub at: Timestamp,
    /// "info", "warn" or "error".
    pub level: String,
    /// The message with its fields.
    pub text: String,
}

/// The log of this process, for whoever looks at it or changes its levels.
#[derive(Debug, Clone)]
pub struct Log {
    recent: Recent,
    filter: reload::Handle<EnvFilter, Registry>,
}

impl Log {
    /// Begins to log. To be called once in a process.
    pub fn start(flags: &LoggingFlags) -> Self {
        let recent = Recent::default();
        let (filter, handle) = reload::Layer::new(EnvFilter::new(&flags.log_level));
        tracing_subscriber::registry()
            .with(writer(flags.log_format).with_filter(filter))
            .with(recent.clone().with_filter(LevelFilter::INFO))
            .init();
        Self { recent, filter: handle }
    }

    /// One that nobody writes to.
    #[cfg(test)]
    pub(crate) fn silent() -> Self {
        let (_, filter) = reload::Layer::new(EnvFilter::default());
        Self { recent: Recent::default(), filter }
    }

    /// The last lines of level info and above, whatever the levels of the log are.
    pub(crate) fn recent(&self) -> Vec<LogLine> {
        self.recent.lines().iter().cloned().collect()
    }

    /// The levels by target, as in `--log-level`.
    pub(crate) fn levels(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Logs by these levels from now on.
    ///
    /// # Errors
    /// They are not as in `--log-level`.
    pub(crate) fn set_levels(&self, levels: &str) -> Result<(), String> {
        let levels = crate::flags::log_level(levels)?;
        self.filter.reload(EnvFilter::new(levels)).map_err(|error| error.to_string())
    }
}

/// What writes the lines.
fn writer(format: LogFormat) -> Box<dyn Layer<Registry> + Send + Sync> {
    match format {
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(io::stderr)
            .boxed(),
        LogFormat::Text => match Journal::behind_stderr() {
            Some(journal) => journal.boxed(),
            None => tracing_subscriber::fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal())
                .with_target(false)
                .boxed(),
        },
    }
}

/// Where the journal listens, also after it was started anew.
const SOCKET: &str = "/run/systemd/journal/socket";
/// How long a journal that hangs holds up who writes a line.
const PATIENCE: Duration = Duration::from_secs(1);

/// The journal by its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL). The message holds the fields,
/// too: it is all that `journalctl` and `systemctl status` show. tracing-journald leaves them out there.
struct Journal(UnixDatagram);

impl Journal {
    /// The one that stderr leads to (systemd.exec(5), JOURNAL_STREAM).
    fn behind_stderr() -> Option<Self> {
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        let stderr = rustix::fs::fstat(io::stderr().as_fd()).ok()?;
        if stream != format!("{}:{}", stderr.st_dev, stderr.st_ino) {
            return None;
        }
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_write_timeout(Some(PATIENCE)).ok()?;
        // An empty entry is none, but it finds out whether somebody listens.
        socket.send_to(&[], SOCKET).ok()?;
        Some(Self(socket))
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // syslog(3)
        let priority = match *event.metadata().level() {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            Level::DEBUG | Level::TRACE => "7",
        };
        let text = Text::of(event);
        let line = text.line();
        let mut entry = Vec::new();
        put(&mut entry, "MESSAGE", &line);
        put(&mut entry, "PRIORITY", priority);
        put(&mut entry, "SYSLOG_IDENTIFIER", "weftd");
        put(&mut entry, "TARGET", event.metadata().target());
        for (name, value) in text.fields {
            put(&mut entry, &format!("WEFT_{}", name.to_uppercase()), &value);
        }
        if self.0.send_to(&entry, SOCKET).is_err() {
            // Leads there, too (sd-daemon(3)).
            let _ = writeln!(io::stderr(), "<{priority}>{line}");
        }
    }
}

/// Adds a field of any text to an entry for the journal.
fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    entry.extend_from_slice(name.as_bytes());
    entry.push(b'\n');
    entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

/// Keeps the last lines.
#[derive(Debug, Clone, Default)]
struct Recent(Arc<Mutex<VecDeque<LogLine>>>);

impl Recent {
    fn lines(&self) -> std::sync::MutexGuard<'_, VecDeque<LogLine>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        // Libraries have states of their own, which say little of ours.
        if !metadata.target().starts_with("weft") {
            return;
        }
        let line = LogLine {
            at: Timestamp::now(),
            level: metadata.level().as_str().to_lowercase(),
            text: Text::of(event).line(),
        };
        let mut lines = self.lines();
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

/// What an event says.
#[derive(Default)]
struct Text {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Text {
    fn of(event: &Event<'_>) -> Self {
        let mut text = Self::default();
        event.record(&mut text);
        text
    }

    /// The message, and the fields behind it.
    fn line(&self) -> String {
        let mut line = self.message.clone();
        for (name, value) in &self.fields {
            // Writing to a string does not fail.
            let _ = write!(line, " {name}={value}");
        }
        line
    }
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self.fields.push((name, format!("{value:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_ours_are_kept() {
        let recent = Recent::default();
        let subscriber = tracing_subscriber::registry().with(recent.clone());
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..=KEPT {
                tracing::info!(number, name = "eth0", "line");
            }
            tracing::warn!(target: "other", "not ours");
        });
        let lines = recent.lines();
        assert_eq!(lines.len(), KEPT);
        assert_eq!(lines[0].text, "line number=1 name=eth0");
        assert_eq!(lines[KEPT - 1].text, "line number=10 name=eth0");
        assert_eq!(lines[0].level, "info");
    }
}
