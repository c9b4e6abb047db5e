//! The flags of the data plane: which backend, what it lets in, and how it goes about it.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use clap::builder::{
    PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser, ValueParser,
};
use weft_backends::{BackendKind, DscpMode, Feature, GuardMode, IoKind, SourcePort, Tuning};

/// Workers beyond this get no queue: the kernel's limit for one TUN device (MAX_TAP_QUEUES).
pub(super) const MAX_WORKERS: usize = 256;
/// Longer than this a sleeping thread would have answered many times over.
const BUSY_POLL_MICROS_MAX: u64 = 100_000;

/// How packets are carried.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineFlags {
    /// The backend where the network config names none [default: udp-tun]
    #[arg(long, value_name = "NAME", value_parser = backend())]
    pub backend: Option<BackendKind>,
    /// What is checked of received packets: strict (sender, inner source and
    /// inner destination), peer (sender and inner destination) or off
    #[arg(long, value_name = "MODE", default_value = "strict", value_parser = guard())]
    #[arg(hide_possible_values = true, verbatim_doc_comment)]
    pub guard: GuardMode,
    /// A further address that the node of this public IP sends from; repeatable
    #[arg(long, value_name = "PUBLICIP=ADDR", value_parser = peer_source)]
    pub peer_source: Vec<(IpAddr, IpAddr)>,
    /// Workers of the packet engine, 1 to 256 [default: one a core]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<usize>,
    /// How packets are read and sent: uring (io_uring), mmsg (recvmmsg and
    /// sendmsg), or auto for the best that the kernel allows
    #[arg(long, value_name = "WAY", default_value = "auto", value_parser = io())]
    #[arg(hide_possible_values = true, verbatim_doc_comment)]
    pub io: IoChoice,
    /// Goes without something that the kernel does for many packets at once:
    /// tun-tso, tun-uso, udp-segment, udp-gro, tcp-coalesce or udp-coalesce;
    /// repeatable, or separated by commas
    #[arg(long, value_name = "KIND=off", value_delimiter = ',', value_parser = offload)]
    #[arg(verbatim_doc_comment)]
    pub offload: Vec<Feature>,
    /// The port that datagrams leave from: one of several by flow, so that a
    /// peer's cores share the work, or fixed, the one that we listen on
    #[arg(long, value_name = "PORT", default_value = "flow", value_parser = source_port())]
    #[arg(hide_possible_values = true, verbatim_doc_comment)]
    pub udp_source_port: SourcePort,
    /// Microseconds that the engine looks for more packets before it sleeps:
    /// shorter round trips, for up to one busy core a worker
    #[arg(long, value_name = "MICROS", default_value = "0", value_parser = busy_poll())]
    #[arg(verbatim_doc_comment)]
    pub busy_poll: Duration,
    /// What of containers' DSCP shows on the underlay: clear (nothing) or copy
    #[arg(long, value_name = "MODE", default_value = "clear", value_parser = dscp())]
    #[arg(hide_possible_values = true)]
    pub dscp: DscpMode,
}

/// What `--io` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoChoice {
    /// The best that is to be had.
    Auto,
    /// This one or none.
    Only(IoKind),
}

impl EngineFlags {
    /// What the flags come to for the packet engine.
    pub(super) fn tuning(&self) -> Tuning {
        Tuning {
            io: match self.io {
                IoChoice::Auto => None,
                IoChoice::Only(kind) => Some(kind),
            },
            off: self.offload.clone(),
            source_port: self.udp_source_port,
            busy_poll: self.busy_poll,
            dscp: self.dscp,
        }
    }
}

/// One of a few names, each of which stands for a value.
fn choice<T: Copy + Send + Sync + 'static>(names: &'static [(&'static str, T)]) -> ValueParser {
    PossibleValuesParser::new(names.iter().map(|(name, _)| *name))
        .try_map(|text| {
            let found = names.iter().find(|(name, _)| *name == text);
            found.map(|(_, value)| *value).ok_or("no such choice")
        })
        .into()
}

fn backend() -> impl TypedValueParser<Value = BackendKind> {
    let udp_tun = PossibleValue::new("udp-tun").alias("udp");
    PossibleValuesParser::new([udp_tun, "vxlan".into(), "host-gw".into()])
        .try_map(|name| BackendKind::from_config(&name).ok_or("no such backend"))
}

fn guard() -> ValueParser {
    choice(&[("strict", GuardMode::Strict), ("peer", GuardMode::Peer), ("off", GuardMode::Off)])
}

fn io() -> ValueParser {
    choice(&[
        ("auto", IoChoice::Auto),
        ("uring", IoChoice::Only(IoKind::Uring)),
        ("mmsg", IoChoice::Only(IoKind::Mmsg)),
    ])
}

fn source_port() -> ValueParser {
    choice(&[("flow", SourcePort::Flow), ("fixed", SourcePort::Fixed)])
}

fn dscp() -> ValueParser {
    choice(&[("clear", DscpMode::Clear), ("copy", DscpMode::Copy)])
}

fn busy_poll() -> impl TypedValueParser<Value = Duration> {
    RangedU64ValueParser::<u64>::new().range(0..=BUSY_POLL_MICROS_MAX).map(Duration::from_micros)
}

fn offload(text: &str) -> Result<Feature, String> {
    let name = text.strip_suffix("=off").ok_or("give KIND=off, as in udp-gro=off")?;
    Feature::ALL.into_iter().find(|feature| feature.name() == name).ok_or_else(|| {
        let names: Vec<_> = Feature::ALL.iter().map(|feature| feature.name()).collect();
        format!("no offload is called {name}: give one of {}", names.join(", "))
    })
}

fn peer_source(text: &str) -> Result<(IpAddr, IpAddr), &'static str> {
    let pair = text
        .split_once('=')
        .and_then(|(public, address)| Some((public.parse().ok()?, address.parse().ok()?)));
    pair.ok_or("give two addresses, as in 192.0.2.7=198.51.100.7")
}

fn workers(text: &str) -> Result<usize, String> {
    let workers = text.parse().ok().filter(|workers| (1..=MAX_WORKERS).contains(workers));
    workers.ok_or_else(|| format!("give a number from 1 to {MAX_WORKERS}"))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn flags(args: &[&str]) -> EngineFlags {
        let args = ["weftd"].iter().chain(args).map(OsString::from);
        crate::flags::parse(args, |_| None).unwrap().engine
    }

    #[test]
    fn backend_guard_and_peers() {
        let found = flags(&["--backend", "udp", "-guard=off", "-peer-source=::1=::2"]);
        assert_eq!((found.backend, found.guard), (Some(BackendKind::UdpTun), GuardMode::Off));
        assert_eq!(found.peer_source, [("::1".parse().unwrap(), "::2".parse().unwrap())]);
    }

    #[test]
    fn nothing_asked_for_is_the_engines_own_default() {
        assert_eq!(flags(&[]).tuning(), Tuning::default());
    }

    #[test]
    fn tuning_by_flags() {
        let found = flags(&[
            "--io=mmsg",
            "--offload=udp-gro=off,tun-tso=off",
            "--offload=udp-coalesce=off",
            "--udp-source-port=fixed",
            "--busy-poll=50",
            "--dscp=copy",
        ]);
        let wanted = Tuning {
            io: Some(IoKind::Mmsg),
            off: vec![Feature::UdpGro, Feature::TunTso, Feature::UdpCoalesce],
            source_port: SourcePort::Fixed,
            busy_poll: Duration::from_micros(50),
            dscp: DscpMode::Copy,
        };
        assert_eq!(found.tuning(), wanted);
    }
}
