//! Benchmark runs: weft beside what else carries packets between containers.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use weft_benches::naive::Naive;
use weft_benches::on_tokio_uring;
use weft_benches::report::{Machine, Report};
use weft_benches::run::{Outcome, Plan, run};
use weft_benches::subject::{PORT, Subject};
use weft_benches::topology::{Mode, outer, subnet};
use weft_daemon::lab::Cancel;
use weft_engine::{EcnMode, Peer, RouteTable};

/// Subjects of a quick run: those that targets speak of.
const QUICK: [Subject; 7] = [
    Subject::Vxlan,
    Subject::WeftUring,
    Subject::WeftMmsg,
    Subject::WeftBusy,
    Subject::WeftOneRoute,
    Subject::WeftManyRoutes,
    Subject::Naive,
];

/// Measures weft beside what else carries packets between containers.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(RunArgs),
    /// Forwards one packet a call (a subject of `run`, started by it)
    #[command(hide = true)]
    Naive {
        side: usize,
        mtu: u16,
    },
    /// Forwards on tokio-uring (likewise)
    #[command(hide = true)]
    TokioUring {
        side: usize,
        mtu: u16,
    },
}

/// Measures all subjects in all modes, in turn, and writes a report
#[derive(Debug, Args)]
struct RunArgs {
    /// Only what has a target, and shorter: less than three minutes
    #[arg(long)]
    quick: bool,
    /// Modes of the wire, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_enum)]
    mode: Vec<Mode>,
    /// Subjects, separated by commas [default: all, quick: those with a target]
    #[arg(long, value_delimiter = ',', value_enum)]
    subject: Vec<Subject>,
    /// How often each is measured [default: 3, quick: 2]
    #[arg(long)]
    repeats: Option<usize>,
    /// Milliseconds for each figure [default: 1500, quick: 600]
    #[arg(long)]
    millis: Option<u64>,
    /// Where report.json and report.html go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(arguments) => run_all(&arguments),
        Command::Naive { side, mtu } => {
            let open = Naive::open("naive", mtu, listen(side), routes(side));
            open.and_then(|it| it.run().context("forwarding ended"))
        }
        Command::TokioUring { side, mtu } => {
            on_tokio_uring::forward("tokio-uring", mtu, listen(side), routes(side))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_all(arguments: &RunArgs) -> anyhow::Result<()> {
    let cancel = Cancel::on_signals().context("cannot listen to signals")?;
    let modes = arguments.mode.clone();
    let wanted = match (arguments.subject.is_empty(), arguments.quick) {
        (false, _) => arguments.subject.clone(),
        (true, true) => QUICK.to_vec(),
        (true, false) => Subject::ALL.to_vec(),
    };
    let (subjects, missing): (Vec<_>, Vec<_>) =
        wanted.into_iter().partition(|subject| subject.is_installed());
    let plan = Plan {
        modes: if modes.is_empty() { Mode::ALL.to_vec() } else { modes },
        subjects,
        repeats: arguments.repeats.unwrap_or(if arguments.quick { 2 } else { 3 }),
        time: Duration::from_millis(arguments.millis.unwrap_or(if arguments.quick {
            600
        } else {
            1500
        })),
        quick: arguments.quick,
    };
    let (machine, mut outcome) = (Machine::here(), Outcome::default());
    let ended = run(&plan, &cancel, &mut |what| eprintln!("{what}"), &mut outcome);
    let why = ended.as_ref().err().map(|error| format!("the run ended here: {error:#}"));
    outcome.failed.extend(why);
    let report = Report {
        machine,
        command: std::env::args().skip(1).fold("weft-bench".into(), |line, it| line + " " + &it),
        repeats: plan.repeats,
        seconds_per_figure: plan.time.as_secs_f64(),
        missing,
        failed: outcome.failed,
        samples: outcome.samples,
        commands: outcome.commands,
    };
    report.write(&arguments.out)?;
    if !arguments.quick {
        say(&report.figures());
    }
    say(&report.targets());
    say(&format!("written: {}", arguments.out.join("report.html").display()));
    ended
}

#[expect(clippy::print_stdout, reason = "the result of the command")]
fn say(text: &str) {
    println!("{text}");
}

fn listen(side: usize) -> SocketAddr {
    SocketAddr::new(outer(side), PORT)
}

/// A forwarder's routes: its own subnet, and the other's.
fn routes(side: usize) -> RouteTable {
    let far = 1 - side;
    let net = |side| subnet(side).parse().expect("the topology's subnets are networks");
    let peer = Peer {
        endpoint: listen(far),
        outer: Vec::new(),
        subnets: vec![net(far)],
        ecn: EcnMode::Compatibility,
        segments: true,
        traffic: Arc::default(),
    };
    RouteTable::new(&[net(side)], vec![peer])
}
