//! `weft top`: what the packet engine of one daemon does, second by second.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::{Args, ValueEnum};
use ipnetwork::IpNetwork;
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
use crate::output::{float, joined, short};
use crate::socket::{self, Request};
use crate::status::{PeerStatus, Status, TrafficStatus};

/// What must do in a terminal, and is taken where there is none, for peers with IPv4 addresses.
const WIDTH: u16 = 80;
/// The longest of those.
const IPV4_WIDTH: u16 = 15;
/// Lines above and below the counters and the peers.
const HEADING: u16 = 2;
const TRAFFIC: u16 = 4;
const KEYS: u16 = 1;
/// Of text: some 500 peers.
const LINES_MAX: u16 = 600;
/// What comes in.
const INPUTS: [&str; 2] = ["tun_to_udp_reads", "udp_to_tun_datagrams"];
/// The longest name of a drop, and two numbers.
const DROPS_WIDTH: u16 = 43;

/// Show packets and bits a second by direction and by peer, drops, batches and CPU of the packet
/// engine, as they change.
///
/// Keys: q ends; n, r and t sort by name, rate and total; tab shows the next daemon of this host.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Write what happens in one interval as text, daemon by daemon, and end.
    #[arg(long)]
    once: bool,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
    /// How counters and peers are sorted.
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
    let ask = || socket::ask_all::<Status>(&directories.run_dir, &Request::Status);
    let look = || -> anyhow::Result<Look> {
        let answers = ask()?;
        if answers.given.is_empty() {
            answers.complete()?;
        }
        Ok(Look::new(answers.given))
    };
    let interval = Duration::from_secs(arguments.interval);
    if arguments.once {
        let before = look()?;
        thread::sleep(interval);
        let answers = ask()?;
        let outcome = answers.complete();
        let now = Look::new(answers.given);
        for daemon in 0..now.daemons.len() {
            write!(out, "{}", text(&View::of(&before, &now, daemon), arguments.sort))?;
        }
        return outcome;
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
    // A daemon that starts again is back in a moment.
    let look = || look().unwrap_or_else(|_| Look::new(Vec::new()));
    loop {
        let view = View::of(&before, &now, daemon);
        terminal.draw(|frame| draw(frame, &view, order))?;
        let left = (now.at + interval).saturating_duration_since(Instant::now());
        if !event::poll(left)? {
            before = std::mem::replace(&mut now, look());
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
            daemon = (daemon + 1) % now.daemons.len().max(1);
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

impl Look {
    fn new(daemons: Vec<Status>) -> Self {
        Self { at: Instant::now(), daemons }
    }
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
        // In containers several may have one pid.
        let key = |it: &Status| (it.pid, it.node_id.clone());
        let former = |now: &Status| before.daemons.iter().find(|it| key(it) == key(now));
        Self {
            seconds: now.at.duration_since(before.at).as_secs_f64().max(1e-3),
            before: current.and_then(former),
            now: current,
        }
    }

    /// Whether the packet engine moves the packets, and not the kernel.
    fn has_engine(&self) -> bool {
        self.now.is_some_and(|now| !now.counters.is_empty())
    }

    fn total(&self, name: &str) -> u64 {
        self.now.and_then(|now| now.counters.get(name)).copied().unwrap_or_default()
    }

    /// What a counter grew by; nothing is known of that where the daemon was not seen before. A backend that
    /// starts anew begins at zero.
    fn growth(&self, name: &str) -> u64 {
        let Some(before) = self.before else { return 0 };
        let before = before.counters.get(name).copied();
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

    /// The counters that tell something, which are drops or else.
    fn counters(&self, drops: bool, order: Order) -> Vec<(&'a str, f64, u64)> {
        let names = self.now.into_iter().flat_map(|now| now.counters.keys());
        let of_kind = names.filter(|name| metrics::is_drop(name) == drops);
        // That nothing comes in is worth a line.
        let is_shown = |name: &str, total| total > 0 || INPUTS.contains(&name);
        let mut rows: Vec<_> = of_kind
            .map(|name| (name.as_str(), self.rate(name), self.total(name)))
            .filter(|(name, _, total)| is_shown(name, *total))
            .collect();
        match order {
            Order::Name => {}
            Order::Rate => rows.sort_by(|a, b| b.1.total_cmp(&a.1)),
            Order::Total => rows.sort_by_key(|row| Reverse(row.2)),
        }
        rows
    }

    /// What went to each peer and came from it a second, sorted as counters are, by bytes.
    fn peers(&self, order: Order) -> Vec<(&'a PeerStatus, Option<Rates>)> {
        let peers = |status: &'a Status| status.peers.iter();
        let before: HashMap<&[IpNetwork], &PeerStatus> =
            self.before.into_iter().flat_map(peers).map(|it| (&it.subnets[..], it)).collect();
        let rates = |peer: &'a PeerStatus| {
            self.before?;
            let former = before.get(&peer.subnets[..]).and_then(|it| it.traffic);
            Some(Rates::of(peer.traffic?, former.unwrap_or_default(), self.seconds))
        };
        let mut rows: Vec<_> =
            self.now.into_iter().flat_map(peers).map(|peer| (peer, rates(peer))).collect();
        let total = |peer: &PeerStatus| {
            peer.traffic.map_or(0, |it| it.sent_bytes.saturating_add(it.received_bytes))
        };
        match order {
            Order::Name => rows.sort_by_key(|(peer, _)| (&peer.name, peer.public_ip)),
            Order::Rate => rows.sort_by(|a, b| bits(b.1.as_ref()).total_cmp(&bits(a.1.as_ref()))),
            Order::Total => rows.sort_by_key(|(peer, _)| Reverse(total(peer))),
        }
        rows
    }

    /// Of the whole process, for each packet that was handed on.
    fn cpu_each(&self) -> String {
        let packets = self.growth("tun_to_udp_packets") + self.growth("udp_to_tun_packets");
        let used =
            |(now, before): (&Status, &Status)| now.cpu_millis.saturating_sub(before.cpu_millis);
        let millis = self.now.zip(self.before).map_or(0, used);
        let cores = float(millis) / 1000.0 / self.seconds;
        match packets {
            0 => format!("{cores:.2} cores"),
            _ => {
                format!("{cores:.2} cores, {:.2} µs a packet", float(millis) * 1e3 / float(packets))
            }
        }
    }
}

/// What a peer was sent and what came from it, a second.
struct Rates {
    sent_packets: f64,
    sent_bits: f64,
    received_packets: f64,
    received_bits: f64,
}

impl Rates {
    fn of(now: TrafficStatus, before: TrafficStatus, seconds: f64) -> Self {
        let rate = |now: u64, before: u64| float(now.saturating_sub(before)) / seconds;
        Self {
            sent_packets: rate(now.sent_packets, before.sent_packets),
            sent_bits: rate(now.sent_bytes, before.sent_bytes) * 8.0,
            received_packets: rate(now.received_packets, before.received_packets),
            received_bits: rate(now.received_bytes, before.received_bytes) * 8.0,
        }
    }

    fn numbers(&self) -> [f64; 4] {
        [self.sent_packets, self.sent_bits, self.received_packets, self.received_bits]
    }
}

fn bits(rates: Option<&Rates>) -> f64 {
    rates.map_or(0.0, |rates| rates.sent_bits + rates.received_bits)
}

fn draw(frame: &mut Frame<'_>, view: &View<'_>, order: Order) {
    let areas = Layout::vertical([
        Constraint::Length(HEADING),
        Constraint::Length(TRAFFIC),
        Constraint::Min(0),
        Constraint::Length(peer_lines(view, order, frame.area().height)),
        Constraint::Length(KEYS),
    ]);
    let [head, traffic, counters, peers, keys] = areas.areas(frame.area());
    frame.render_widget(Paragraph::new(heading(view)), head);
    frame.render_widget(traffic_table(view), traffic);
    let [drops, rest] = Layout::horizontal([Constraint::Length(DROPS_WIDTH), Constraint::Min(0)])
        .spacing(1)
        .areas(counters);
    frame.render_widget(counter_table("dropped", view.counters(true, order)), drops);
    frame.render_widget(counter_table("counted", view.counters(false, order)), rest);
    frame.render_widget(peer_table(view, order), peers);
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
    let subnets = joined(&now.subnets, " ");
    let wrong = match now.problems.len() {
        0 => String::new(),
        problems => format!(", {problems} problems: see weft status"),
    };
    vec![
        Line::raw(format!("weftd {} {subnets}: {}{wrong}", now.pid, now.state)),
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
        if !view.has_engine() {
            return Row::new([name, "-", "-", "-", "-"].map(str::to_owned));
        }
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
    Table::new(rows, [Constraint::Min(24), Constraint::Length(5), Constraint::Length(5)])
        .header(header)
}

/// Of counters with their heading.
fn counter_lines(view: &View<'_>, order: Order) -> u16 {
    let rows = [true, false].map(|drops| view.counters(drops, order).len());
    lines(rows[0].max(rows[1]))
}

/// Of peers with their heading: what the counters leave, and a third at least.
fn peer_lines(view: &View<'_>, order: Order, height: u16) -> u16 {
    let left = height.saturating_sub(HEADING + TRAFFIC + counter_lines(view, order) + KEYS);
    lines(view.now.map_or(0, |now| now.peers.len())).min(left.max(height / 3))
}

fn lines(rows: usize) -> u16 {
    u16::try_from(rows + 1).unwrap_or(u16::MAX)
}

fn peer_table(view: &View<'_>, order: Order) -> Table<'static> {
    let rows = view.peers(order).into_iter().map(|(peer, rates)| {
        let name = peer.name.clone().unwrap_or_default();
        let rtt = peer.probe.rtt_us.map(|micros| format!("{:.2} ms", float(micros) / 1000.0));
        let loss = peer.probe.loss_percent.map(|percent| format!("{percent} %"));
        let rates = rates.map_or([const { String::new() }; 4], |it| it.numbers().map(short));
        let known = [peer.public_ip.to_string(), name, peer.way.clone()];
        let probed = [rtt.unwrap_or_default(), loss.unwrap_or_default()];
        Row::new(known.into_iter().chain(rates).chain(probed))
    });
    let header = ["peer", "name", "way", "out p/s", "out b/s", "in p/s", "in b/s", "RTT", "loss"];
    let widths = [peer_width(view), 9, 6, 7, 7, 7, 7, 9, 5].map(Constraint::Length);
    Table::new(rows, widths).header(Row::new(header).style(Modifier::BOLD))
}

/// Of the longest address.
fn peer_width(view: &View<'_>) -> u16 {
    let peers = view.now.into_iter().flat_map(|now| &now.peers);
    let longest = peers.map(|peer| peer.public_ip.to_string().len()).max().unwrap_or(0);
    u16::try_from(longest).unwrap_or(u16::MAX).max(IPV4_WIDTH)
}

/// The same picture, as lines: all counters and peers.
fn text(view: &View<'_>, order: Order) -> String {
    let lists = counter_lines(view, order).saturating_add(peer_lines(view, order, LINES_MAX));
    picture(view, order, (HEADING + TRAFFIC + KEYS).saturating_add(lists).min(LINES_MAX))
}

fn picture(view: &View<'_>, order: Order, height: u16) -> String {
    let width = WIDTH - IPV4_WIDTH + peer_width(view);
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| draw(frame, view, order));
    let buffer = terminal.backend().buffer();
    let mut lines = String::new();
    for row in buffer.content().chunks(width.into()) {
        let line: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
        lines += line.trim_end();
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(at: Instant, counters: &[(&str, u64)], cpu_millis: u64) -> Look {
        let counters = counters.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        let status = Status { pid: 7, counters, cpu_millis, ..Status::default() };
        Look { at, daemons: vec![status] }
    }

    fn peer(name: &str, sent_bytes: u64, received_bytes: u64) -> PeerStatus {
        let traffic =
            TrafficStatus { sent_bytes, received_bytes, sent_packets: 10, received_packets: 0 };
        let subnet = format!("10.42.{}.0/24", name.len());
        PeerStatus {
            name: Some(name.into()),
            traffic: Some(traffic),
            ..PeerStatus::example("192.0.2.1", &subnet, "tunnel")
        }
    }

    #[test]
    fn what_was_not_seen_before_has_no_rate() {
        let begin = Instant::now();
        let before = Look { at: begin, daemons: Vec::new() };
        let counters = [("tun_to_udp_packets", 1_000_000)];
        let mut now = look(begin + Duration::from_secs(1), &counters, 86_400_000);
        now.daemons[0].peers = vec![peer("c", 5_000, 0)];
        let view = View::of(&before, &now, 0);
        assert_eq!(view.rate("tun_to_udp_packets").to_bits(), 0f64.to_bits());
        assert_eq!(view.cpu_each(), "0.00 cores");
        assert!(view.peers(Order::Name)[0].1.is_none());
    }

    /// vxlan's and host-gw's packets are the kernel's, which tells of none.
    #[test]
    fn what_nobody_counts_is_not_zero() {
        let at = Instant::now();
        let (before, now) = (look(at, &[], 0), look(at + Duration::from_secs(1), &[], 0));
        let text = text(&View::of(&before, &now, 0), Order::Rate);
        let row = text.lines().find(|line| line.starts_with("tun_to_udp ")).unwrap();
        assert_eq!(row.split_whitespace().skip(1).collect::<Vec<_>>(), ["-"; 4]);
        assert!(text.contains("total counted"), "{text}");
    }

    #[test]
    fn peers_are_sorted_by_what_they_move() {
        let begin = Instant::now();
        let mut before = look(begin, &[], 0);
        before.daemons[0].peers = vec![peer("c", 5_000, 0), peer("bb", 0, 0)];
        let mut now = look(begin + Duration::from_secs(2), &[], 0);
        now.daemons[0].peers =
            vec![peer("c", 6_000, 0), peer("bb", 1_000, 2_000), peer("aaa", 0, 0)];
        let long = "2001:db8:1111:2222:3333:4444:5555:6666";
        now.daemons[0].peers[2].public_ip = long.parse().unwrap();
        let view = View::of(&before, &now, 0);
        let names = |order| -> Vec<&str> {
            view.peers(order).iter().map(|(peer, _)| peer.name.as_deref().unwrap()).collect()
        };
        assert_eq!(names(Order::Name), ["aaa", "bb", "c"]);
        assert_eq!(names(Order::Rate), ["bb", "c", "aaa"]);
        assert_eq!(names(Order::Total), ["c", "bb", "aaa"]);
        let text = text(&view, Order::Total);
        let row = text.lines().find(|line| line.contains(" c ")).unwrap();
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(words, ["192.0.2.1", "c", "tunnel", "0", "4.00k", "0", "0"]);
        assert!(text.contains(&format!("{long} aaa ")), "{text}");
    }

    #[test]
    fn what_happened_in_between_is_shown_on_a_small_terminal() {
        let begin = Instant::now();
        let before = [
            ("tun_to_udp_packets", 1000),
            ("tun_to_udp_no_route", 5),
            ("udp_to_tun_malformed", 100),
            ("icmp_limited", 1),
        ];
        let before = look(begin, &before, 100);
        let counters = [
            ("tun_to_udp_packets", 3000),
            ("tun_to_udp_bytes", 2_000_000),
            ("tun_to_udp_sends", 200),
            ("tun_to_udp_no_route", 9),
            ("udp_to_tun_foreign_destination", 50),
            ("udp_to_tun_malformed", 100),
            ("icmp_limited", 1),
        ];
        let now = look(begin + Duration::from_secs(2), &counters, 300);
        let view = View::of(&before, &now, 0);
        let text = text(&view, Order::Total);
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        let words = |start: &str| line(start).split_whitespace().collect::<Vec<_>>();
        assert_eq!(words("tun_to_udp "), ["tun_to_udp", "1.00k", "8.00M", "-", "10.0"]);
        assert!(text.contains("CPU 0.10 cores, 100.00 µs a packet"), "{text}");
        assert_eq!(words("tun_to_udp_no_route")[..3], ["tun_to_udp_no_route", "2", "9"]);
        let drops = |order| view.counters(true, order).iter().map(|row| row.0).collect::<Vec<_>>();
        let [route, foreign, malformed] =
            ["tun_to_udp_no_route", "udp_to_tun_foreign_destination", "udp_to_tun_malformed"];
        assert_eq!(drops(Order::Total), [malformed, foreign, route]);
        assert_eq!(drops(Order::Rate), [foreign, route, malformed]);
        assert_eq!(drops(Order::Name), [route, foreign, malformed]);
        assert!(text.contains(foreign), "{text}");
        let small = picture(&view, Order::Total, 24);
        assert_eq!(small.lines().count(), 24);
        assert!(small.contains("sorted by total") && small.contains(malformed), "{small}");
    }
}
