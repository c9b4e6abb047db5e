//! What a run came to: tables for the terminal, JSON for programs, and one HTML page with plots.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::check::CHECKS;
use crate::load::CONGESTION;
use crate::run::Sample;
use crate::subject::Subject;
use crate::summary::{Bound, Spread, TARGETS, figure, ratio};
use crate::topology::Mode;

/// A run and where it was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    /// The command line that makes such a run again.
    pub command: String,
    pub repeats: usize,
    pub seconds_per_figure: f64,
    /// Subjects that are not installed here.
    pub missing: Vec<Subject>,
    /// What others' programs failed at, and what ended the run before its time.
    #[serde(default)]
    pub failed: Vec<String>,
    pub samples: Vec<Sample>,
    /// The commands that set up each mode and each subject, by its name; `h1#` is where one ran.
    #[serde(default)]
    pub commands: BTreeMap<String, Vec<String>>,
}

/// What the figures depend on besides the code.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub date: String,
    pub commit: String,
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    pub congestion_control: String,
    pub tcp_rmem: String,
    pub tcp_wmem: String,
}

impl Machine {
    /// This one, now. What cannot be found out is empty.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let run = |line: &[&str]| {
            let output = Command::new(line[0]).args(&line[1..]).output();
            let text = output.map(|output| output.stdout).unwrap_or_default();
            String::from_utf8_lossy(&text).trim().to_owned()
        };
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        Self {
            date: run(&["date", "--utc", "+%Y-%m-%d %H:%M"]),
            commit: run(&[
                "git",
                "-C",
                env!("CARGO_MANIFEST_DIR"),
                "describe",
                "--always",
                "--dirty",
                "--exclude=*",
            ]),
            kernel: read("/proc/sys/kernel/osrelease"),
            processor: model.map_or("", |it| it.trim_start_matches([' ', '\t', ':'])).to_owned(),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            congestion_control: CONGESTION.to_owned(),
            tcp_rmem: read("/proc/sys/net/ipv4/tcp_rmem"),
            tcp_wmem: read("/proc/sys/net/ipv4/tcp_wmem"),
        }
    }

    fn line(&self) -> String {
        format!(
            "{} UTC, commit {}, Linux {}, {} × {}, TCP {}, tcp_rmem {}, tcp_wmem {}",
            self.date,
            self.commit,
            self.kernel,
            self.processors,
            self.processor,
            self.congestion_control,
            self.tcp_rmem,
            self.tcp_wmem
        )
    }
}

/// Figures that are plotted, with their titles.
const PLOTS: [(&str, &str); 7] = [
    ("tcp1_gbit", "TCP, 1 stream, Gbit/s"),
    ("tcp4_gbit", "TCP, 4 streams, Gbit/s"),
    ("tcp1_cpu_s_per_gb", "Processor seconds per GB, TCP, 1 stream, whole machine"),
    ("udp64_flood_kpps", "UDP of 64 bytes at flood, thousand packets per second"),
    ("paced_cpus", "Processors busy at 100,000 packets of 64 bytes a second"),
    ("rtt_p50_us", "Round trip, idle, median, µs"),
    ("rtt_p99_us", "Round trip, idle, 99th percentile, µs"),
];

impl Report {
    /// Ratios beside their targets.
    pub fn targets(&self) -> String {
        let mut table = table(&["figure", "mode", "subject", "ratio", "min", "max", "target", ""]);
        for target in TARGETS {
            for mode in target.modes {
                let pair = (target.subject, target.other);
                let Some(found) = ratio(&self.samples, *mode, pair, target.figure) else {
                    continue;
                };
                let bound = match target.bound {
                    Bound::AtLeast(bound) => format!("≥ {bound}"),
                    Bound::AtMost(bound) => format!("≤ {bound}"),
                };
                table.add_row([
                    target.what.to_owned(),
                    mode.name().to_owned(),
                    format!("{} / {}", target.subject.name(), target.other.name()),
                    format!("{:.2}", found.median),
                    format!("{:.2}", found.min),
                    format!("{:.2}", found.max),
                    bound,
                    if target.bound.holds(found.median) { "holds" } else { "missed" }.to_owned(),
                ]);
            }
        }
        table.to_string()
    }

    /// All figures of all subjects: medians, with minimum and maximum in brackets.
    pub fn figures(&self) -> String {
        let mut text = String::new();
        for mode in Mode::ALL {
            let subjects: Vec<Subject> = Subject::ALL
                .into_iter()
                .filter(|it| self.samples.iter().any(|at| (at.mode, at.subject) == (mode, *it)))
                .collect();
            if subjects.is_empty() {
                continue;
            }
            let names: Vec<&str> = subjects.iter().map(|subject| subject.name()).collect();
            let mut table = table(&[&[mode.name()], &names[..]].concat());
            for name in self.figure_names() {
                let cell = |it: &Subject| figure(&self.samples, mode, *it, name).map(cell);
                let row = subjects.iter().map(|it| cell(it).unwrap_or_default());
                table.add_row([name.to_owned()].into_iter().chain(row));
            }
            let _ = writeln!(text, "{table}\n");
        }
        text.push_str(&self.checks());
        for subject in &self.missing {
            let _ = writeln!(text, "{} is not installed here and was not measured", subject.name());
        }
        for failure in &self.failed {
            let _ = writeln!(text, "not measured: {failure}");
        }
        text
    }

    /// Our figures beside those of other tools, where they are installed.
    fn checks(&self) -> String {
        let mut table = table(&["figure", "mode", "subject", "ours", "theirs", "by"]);
        for check in &CHECKS {
            let pairs = |mode| Subject::ALL.map(|subject| (mode, subject));
            for (mode, subject) in Mode::ALL.into_iter().flat_map(pairs) {
                let of = |name| figure(&self.samples, mode, subject, name);
                if let (Some(ours), Some(theirs)) = (of(check.ours), of(check.theirs)) {
                    let names = [check.what, mode.name(), subject.name()].map(str::to_owned);
                    let figures = [cell(ours), cell(theirs), check.program.to_owned()];
                    table.add_row(names.into_iter().chain(figures));
                }
            }
        }
        if table.is_empty() { String::new() } else { format!("{table}\n\n") }
    }

    fn figure_names(&self) -> BTreeSet<&str> {
        self.samples.iter().flat_map(|it| it.figures.keys()).map(String::as_str).collect()
    }

    /// Writes `report.json` and `report.html` into a directory, which may be new.
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn write(&self, directory: &Path) -> anyhow::Result<()> {
        let context = || format!("cannot write to {}", directory.display());
        fs::create_dir_all(directory).with_context(context)?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(directory.join("report.json"), &json).with_context(context)?;
        fs::write(directory.join("report.html"), self.html(&json)?).with_context(context)
    }

    fn html(&self, json: &str) -> anyhow::Result<String> {
        let mut plots = String::new();
        for (name, title) in PLOTS {
            if self.figure_names().contains(name) {
                plots.push_str(&self.plot(name, title)?);
            }
        }
        Ok(format!(
            "<!doctype html>\n<meta charset=\"utf-8\">\n<title>weft: benchmark run</title>\n\
             <style>body {{ font: 15px sans-serif; max-width: 72em; margin: 2em auto; }} \
             pre {{ font-size: 12px; overflow-x: auto; }}</style>\n\
             <h1>weft: benchmark run</h1>\n<p>{machine}</p>\n\
             <p><code>{command}</code>: {repeats} repeats, {seconds} s a figure. Bars are medians, \
             whiskers minimum and maximum.</p>\n<h2>Targets</h2>\n<pre>{targets}</pre>\n\
             <h2>Plots</h2>\n{plots}\n<h2>Figures</h2>\n<pre>{figures}</pre>\n\
             <h2>Commands</h2>\n<pre>{commands}</pre>\n\
             <h2>Raw</h2>\n<pre>{json}</pre>\n",
            machine = escape(&self.machine.line()),
            command = escape(&self.command),
            repeats = self.repeats,
            seconds = self.seconds_per_figure,
            targets = escape(&self.targets()),
            figures = escape(&self.figures()),
            commands = escape(&self.command_lines()),
            json = escape(json),
        ))
    }

    fn command_lines(&self) -> String {
        let block =
            |(name, lines): (&String, &Vec<String>)| format!("{name}:\n{}\n", lines.join("\n"));
        self.commands.iter().map(block).collect::<Vec<_>>().join("\n")
    }

    /// A group of bars for each mode, a bar for each subject.
    fn plot(&self, name: &str, title: &str) -> anyhow::Result<String> {
        let bars: Vec<(Mode, Subject, Spread)> = Mode::ALL
            .into_iter()
            .flat_map(|mode| Subject::ALL.map(|subject| (mode, subject)))
            .filter_map(|(mode, it)| Some((mode, it, figure(&self.samples, mode, it, name)?)))
            .collect();
        let most = bars.iter().map(|(_, _, spread)| spread.max).fold(0.0, f64::max) * 1.1;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (1000, 320)).into_drawing_area();
            let count = bars.len() as f64;
            let mut chart = ChartBuilder::on(&root)
                .caption(title, ("sans-serif", 18))
                .margin(10)
                .x_label_area_size(10)
                .y_label_area_size(60)
                .build_cartesian_2d(0.0..count, 0.0..most.max(1e-9))?;
            chart.configure_mesh().disable_x_mesh().disable_x_axis().draw()?;
            for (at, (mode, subject, spread)) in bars.iter().enumerate() {
                let left = at as f64;
                let color = Palette99::pick(*subject as usize);
                let bar = [(left + 0.1, 0.0), (left + 0.9, spread.median)];
                chart.draw_series([Rectangle::new(bar, color.filled())])?;
                let whisker = vec![(left + 0.5, spread.min), (left + 0.5, spread.max)];
                chart.draw_series([PathElement::new(whisker, BLACK)])?;
                let label = format!("{} {}", mode.name(), subject.name());
                let style = ("sans-serif", 11).into_font().transform(FontTransform::Rotate270);
                let place = (left + 0.35, most * 0.02);
                chart.draw_series([Text::new(label, place, style)])?;
            }
            root.present()?;
        }
        Ok(svg)
    }
}

fn cell(spread: Spread) -> String {
    let number = |value: f64| {
        let digits = if value.abs() < 10.0 { 3 } else { usize::from(value.abs() < 1000.0) };
        format!("{value:.digits$}")
    };
    if spread.min == spread.max {
        return number(spread.median);
    }
    format!("{} [{}, {}]", number(spread.median), number(spread.min), number(spread.max))
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let sample = |subject, value: f64| Sample {
            mode: Mode::WireGro,
            subject,
            repeat: 0,
            figures: [("tcp1_gbit".to_owned(), value)].into(),
        };
        Report {
            machine: Machine::here(),
            command: "weft-bench run <quick>".into(),
            repeats: 1,
            seconds_per_figure: 1.0,
            missing: vec![Subject::Tinc],
            failed: vec!["fastd in mode wire: no datagram came back".into()],
            samples: vec![sample(Subject::WeftUring, 9.0), sample(Subject::Naive, 1.0)],
            commands: [("naive".into(), vec!["h1# ip link set naive up".into()])].into(),
        }
    }

    #[test]
    fn targets_are_judged_by_what_was_measured() {
        let text = report().targets();
        let row = text.lines().find(|line| line.contains("weft-uring / naive")).unwrap();
        assert!(row.contains("9.00") && row.contains("≥ 6") && row.contains("holds"), "{row}");
        assert!(!text.contains("vxlan"), "what was not measured has no row");
        assert!(report().figures().contains("tinc is not installed"));
        assert!(report().figures().contains("not measured: fastd in mode wire: no datagram"));
    }

    #[test]
    fn json_comes_back_and_html_holds_plots_and_no_bare_markup() {
        let directory = tempfile::tempdir().unwrap();
        report().write(directory.path()).unwrap();
        let json = fs::read_to_string(directory.path().join("report.json")).unwrap();
        let back: Report = serde_json::from_str(&json).unwrap();
        assert_eq!(back.samples, report().samples);
        let html = fs::read_to_string(directory.path().join("report.html")).unwrap();
        assert!(html.contains("<svg") && html.contains("weft-bench run &lt;quick&gt;"));
        assert!(html.contains("naive:\nh1# ip link set naive up"));
    }
}
