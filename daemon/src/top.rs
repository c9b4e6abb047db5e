//! `weft top`: what the packet engine of one daemon does, second by second.

use std::cmp::Reverse;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::{Args, ValueEnum};
use ratatui::Frame;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::Modifier;
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table};

use crate::directories::Directories;
use crate::metrics;
use crate::status::{self, Status};

/// What is shown where there is no terminal, and must do in one.
const WIDTH: u16 = 80;
const HEIGHT: u16 = 24;

/// Show packets and bits a second, drops, batches and CPU of the packet engine, as they change.
///
/// Keys: q ends; n, r and t sort by name, rate and total; tab shows the next daemon of this host.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Write what happens in one interval as text, and end.
    #[arg(long)]
    once: bool,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
    /// How counters are sorted.
    #[arg(long, value_enum, default_value_t = Order::Rate)]
    sort: Order,
}

/// By what rows are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Order {
    Name,
    Rate,
    Total,
}

/// Looks until somebody says q.
///
/// # Errors
/// No daemon runs, or this is no terminal.
pub fn run(
    arguments: &TopArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let look = || -> anyhow::Result<Look> {
        Ok(Look { at: Instant::now(), daemons: status::read_all(&directories.run_dir)? })
    };
    let interval = Duration::from_secs(arguments.interval);
    if arguments.once {
        let before = look()?;
        thread::sleep(interval);
        return Ok(write!(out, "{}", text(&View::of(&before, &look()?, 0), arguments.sort))?);
    }
    if !io::stdout().is_terminal() {
        bail!("weft top draws on a terminal; --once writes text");
    }
    let mut terminal = ratatui::try_init()?;
    let outcome = live(&mut terminal, look, interval, arguments.sort);
    ratatui::try_restore()?;
    outcome
}

fn live(
    terminal: &mut ratatui::DefaultTerminal,
    look: impl Fn() -> anyhow::Result<Look>,
    interval: Duration,
    mut order: Order,
) -> anyhow::Result<()> {
    let mut daemon = 0;
    let (mut before, mut now) = (look()?, look()?);
    loop {
        let view = View::of(&before, &now, daemon);
        terminal.draw(|frame| draw(frame, &view, order))?;
        let left = (now.at + interval).saturating_duration_since(Instant::now());
        if !event::poll(left)? {
            before = std::mem::replace(&mut now, look()?);
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        let is = |letter| key.code == KeyCode::Char(letter);
        let interrupted = is('c') && key.modifiers.contains(KeyModifiers::CONTROL);
        if is('q') || interrupted || key.code == KeyCode::Esc {
            return Ok(());
        }
        if key.code == KeyCode::Tab {
            daemon = (daemon + 1) % now.daemons.len();
        }
        let orders = [('n', Order::Name), ('r', Order::Rate), ('t', Order::Total)];
        let wanted = orders.into_iter().find(|(letter, _)| is(*letter));
        order = wanted.map_or(order, |(_, wanted)| wanted);
    }
}

/// All daemons at one moment.
struct Look {
    at: Instant,
    daemons: Vec<Status>,
}

/// What happened to one daemon between two looks.
struct View<'a> {
    seconds: f64,
    before: Option<&'a Status>,
    now: Option<&'a Status>,
}

impl<'a> View<'a> {
    fn of(before: &'a Look, now: &'a Look, daemon: usize) -> Self {
        let current = now.daemons.get(daemon).or(now.daemons.first());
        let former = |status: &Status| before.daemons.iter().find(|it| it.pid == status.pid);
        Self {
            seconds: now.at.duration_since(before.at).as_secs_f64().max(1e-3),
            before: current.and_then(former),
            now: current,
        }
    }

    fn total(&self, name: &str) -> u64 {
        self.now.and_then(|now| now.counters.get(name)).copied().unwrap_or_default()
    }

    /// What a counter grew by. A backend that starts anew begins at zero.
    fn growth(&self, name: &str) -> u64 {
        let before = self.before.and_then(|before| before.counters.get(name)).copied();
        self.total(name).saturating_sub(before.unwrap_or_default())
    }

    fn rate(&self, name: &str) -> f64 {
        float(self.growth(name)) / self.seconds
    }

    /// How many of the one there were for each of the other.
    fn each(&self, of: &str, per: &str) -> String {
        match self.growth(per) {
            0 => "-".into(),
            times => format!("{:.1}", float(self.growth(of)) / float(times)),
        }
    }

    /// The counters that are not zero, which are drops or else.
    fn counters(&self, drops: bool, order: Order) -> Vec<(&'a str, f64, u64)> {
        let names = self.now.into_iter().flat_map(|now| now.counters.keys());
        let of_kind = names.filter(|name| metrics::is_drop(name) == drops);
        let mut rows: Vec<_> = of_kind
            .map(|name| (name.as_str(), self.rate(name), self.total(name)))
            .filter(|(_, _, total)| *total > 0)
            .collect();
        match order {
            Order::Name => {}
            Order::Rate => rows.sort_by(|a, b| b.1.total_cmp(&a.1)),
            Order::Total => rows.sort_by_key(|row| Reverse(row.2)),
        }
        rows
    }

    /// Of the whole process, for each packet that was handed on.
    fn cpu_each(&self) -> String {
        let packets = self.growth("tun_to_udp_packets") + self.growth("udp_to_tun_packets");
        let used = |status: &Status| status.cpu_millis;
        let millis = self.now.map_or(0, used).saturating_sub(self.before.map_or(0, used));
        let cores = float(millis) / 1000.0 / self.seconds;
        match packets {
            0 => format!("{cores:.2} cores"),
            _ => {
                format!("{cores:.2} cores, {:.2} µs a packet", float(millis) * 1e3 / float(packets))
            }
        }
    }
}

fn draw(frame: &mut Frame<'_>, view: &View<'_>, order: Order) {
    let areas = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(4),
        Constraint::Min(5),
        Constraint::Max(peer_rows(view)),
        Constraint::Length(1),
    ]);
    let [head, traffic, counters, peers, keys] = areas.areas(frame.area());
    frame.render_widget(Paragraph::new(heading(view)), head);
    frame.render_widget(traffic_table(view), traffic);
    let [drops, rest] =
        Layout::horizontal([Constraint::Ratio(1, 2), Constraint::Ratio(1, 2)]).areas(counters);
    frame.render_widget(counter_table("dropped", view.counters(true, order)), drops);
    frame.render_widget(counter_table("counted", view.counters(false, order)), rest);
    frame.render_widget(peer_table(view), peers);
    let sorted = match order {
        Order::Name => "name",
        Order::Rate => "rate",
        Order::Total => "total",
    };
    let help = format!("sorted by {sorted}; n name, r rate, t total, tab next daemon, q quit");
    frame.render_widget(Line::styled(help, Modifier::DIM), keys);
}

fn heading(view: &View<'_>) -> Vec<Line<'static>> {
    let Some(now) = view.now else { return vec![Line::raw("no weftd answers")] };
    let backend = now.backend.as_deref().unwrap_or("no backend yet");
    let subnets: Vec<String> = now.subnets.iter().map(ToString::to_string).collect();
    let wrong = match now.problems.len() {
        0 => String::new(),
        problems => format!(", {problems} problems: see weft status"),
    };
    vec![
        Line::raw(format!("weftd {} {}: {}{wrong}", now.pid, subnets.join(" "), now.state)),
        Line::raw(format!(
            "{backend} {}, {} peers, CPU {}",
            now.io.as_deref().unwrap_or("in the kernel"),
            now.peers.len(),
            view.cpu_each()
        )),
    ]
}

fn traffic_table(view: &View<'_>) -> Table<'static> {
    let direction = |name: &str, input: &str, operations: &str| {
        let of = |what: &str| format!("{name}_{what}");
        Row::new([
            name.to_owned(),
            short(view.rate(&of("packets"))),
            short(view.rate(&of("bytes")) * 8.0),
            view.each(&of(input), &of("batches")),
            view.each(&of("packets"), &of(operations)),
        ])
    };
    let rows =
        [direction("tun_to_udp", "reads", "sends"), direction("udp_to_tun", "datagrams", "writes")];
    let header = Row::new(["direction", "packets/s", "bit/s", "a batch", "a send or write"]);
    let widths = [12, 10, 10, 10, 16].map(Constraint::Length);
    Table::new(rows, widths).header(header.style(Modifier::BOLD))
}

fn counter_table(title: &'static str, counters: Vec<(&str, f64, u64)>) -> Table<'static> {
    let rows = counters
        .into_iter()
        .map(|(name, rate, total)| Row::new([name.to_owned(), short(rate), short(float(total))]));
    let header = Row::new([title, "per s", "total"]).style(Modifier::BOLD);
    Table::new(rows, [Constraint::Min(24), Constraint::Length(7), Constraint::Length(7)])
        .header(header)
}

/// A third of a small terminal at most: the counters are why one looks.
fn peer_rows(view: &View<'_>) -> u16 {
    let peers = view.now.map_or(0, |now| now.peers.len());
    u16::try_from(peers).unwrap_or(u16::MAX).min(7) + 1
}

fn peer_table(view: &View<'_>) -> Table<'static> {
    let rows = view.now.into_iter().flat_map(|now| &now.peers).map(|peer| {
        let subnets: Vec<String> = peer.subnets.iter().map(ToString::to_string).collect();
        let name = peer.name.clone().unwrap_or_default();
        let rtt = peer.probe.rtt_us.map(|micros| format!("{:.2} ms", float(micros) / 1000.0));
        let loss = peer.probe.loss_percent.map(|percent| format!("{percent} %"));
        Row::new([
            peer.public_ip.to_string(),
            name,
            peer.way.clone(),
            rtt.unwrap_or_default(),
            loss.unwrap_or_default(),
            subnets.join(" "),
        ])
    });
    let widths = [
        Constraint::Length(15),
        Constraint::Length(12),
        Constraint::Length(6),
        Constraint::Length(9),
        Constraint::Length(5),
        Constraint::Min(18),
    ];
    let header = Row::new(["peer", "name", "way", "RTT", "loss", "subnets"]).style(Modifier::BOLD);
    Table::new(rows, widths).header(header)
}

/// The same picture, as lines.
fn text(view: &View<'_>, order: Order) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(WIDTH, HEIGHT));
    let Ok(_) = terminal.draw(|frame| draw(frame, view, order));
    let buffer = terminal.backend().buffer();
    let mut lines = String::new();
    for row in buffer.content().chunks(WIDTH.into()) {
        let line: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
        lines += line.trim_end();
        lines.push('\n');
    }
    lines
}

/// Three digits and a unit.
fn short(number: f64) -> String {
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

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(at: Instant, counters: &[(&str, u64)], cpu_millis: u64) -> Look {
        let counters = counters.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        let status = Status { pid: 7, counters, cpu_millis, ..Status::default() };
        Look { at, daemons: vec![status] }
    }

    #[test]
    fn what_happened_in_between_is_shown_on_a_small_terminal() {
        let begin = Instant::now();
        let before = look(begin, &[("tun_to_udp_packets", 1000), ("tun_to_udp_no_route", 5)], 100);
        let counters = [
            ("tun_to_udp_packets", 3000),
            ("tun_to_udp_bytes", 2_000_000),
            ("tun_to_udp_sends", 200),
            ("tun_to_udp_no_route", 9),
            ("udp_to_tun_malformed", 1),
            ("icmp_limited", 1),
        ];
        let now = look(begin + Duration::from_secs(2), &counters, 300);
        let view = View::of(&before, &now, 0);
        let text = text(&view, Order::Total);
        assert_eq!(text.lines().count(), usize::from(HEIGHT));
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        let words = |start: &str| line(start).split_whitespace().collect::<Vec<_>>();
        assert_eq!(words("tun_to_udp "), ["tun_to_udp", "1.00k", "8.00M", "-", "10.0"]);
        assert!(text.contains("CPU 0.10 cores, 100.00 µs a packet"), "{text}");
        assert_eq!(words("tun_to_udp_no_route")[..3], ["tun_to_udp_no_route", "2", "9"]);
        let drops = |order| view.counters(true, order).iter().map(|row| row.0).collect::<Vec<_>>();
        assert_eq!(drops(Order::Total), ["tun_to_udp_no_route", "udp_to_tun_malformed"]);
        assert_eq!(drops(Order::Name), ["tun_to_udp_no_route", "udp_to_tun_malformed"]);
    }

    #[test]
    fn numbers_are_short() {
        let written = [0.0, 999.4, 1000.0, 12_345.0, 999_900.0, 1.5e9].map(short);
        assert_eq!(written, ["0", "999", "1.00k", "12.3k", "1000k", "1.50G"]);
    }
}
