//! From the command line and the environment to the flags.

use std::ffi::OsString;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::{Flags, arguments};

const PROGRAM: &str = "weftd";

/// The flags that flannel does not have; their variables begin with WEFT_.
const WEFT_FLAGS: [&str; 19] = [
    "registry",
    "subnet-lease-ttl",
    "etcd-api",
    "etcd-password-file",
    "network",
    "state-dir",
    "run-dir",
    "backend",
    "guard",
    "peer-source",
    "workers",
    "io",
    "offload",
    "udp-source-port",
    "busy-poll",
    "dscp",
    "firewall",
    "log-level",
    "log-format",
];

/// Reads the command line `args`, which begins with the program's name, and for each flag that it
/// lacks the variable: FLANNELD_IP_MASQ for --ip-masq, WEFT_GUARD for weft's own --guard. An empty
/// value, of a flag or a variable, counts as none.
///
/// # Errors
/// A flag or a value is wrong; or, with an exit code of 0, help or version was asked for, and is
/// what the error prints. See [`one_line`].
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Flags, clap::Error> {
    let command = command();
    let arguments = arguments::from_go(&command, args.into_iter().skip(1));
    let matches = matches(&command, &arguments)?;
    let mut all = from_variables(&command, &matches, variable)?;
    all.extend(arguments);
    Flags::from_arg_matches(&self::matches(&command, &all)?)
}

/// What is wrong with the command line and how to mend it, without line breaks.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim);
    let told =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let told = told.map(|line| line.trim_start_matches("error: ").trim_start_matches("tip: "));
    let mut told: Vec<&str> = told.filter(|line| !line.is_empty()).collect();
    if !text.contains("tip: ") {
        told.push("see --help");
    }
    told.join("; ")
}

/// The definition of weftd's command line.
pub fn command() -> Command {
    let version =
        Arg::new("version").long("version").action(ArgAction::Version).help("Print version");
    let command = Command::new(PROGRAM).disable_version_flag(true).arg(version);
    Flags::augment_args(command)
        .about("Carries container packets between hosts, in flannel's place")
        .version(env!("CARGO_PKG_VERSION"))
        .args_override_self(true)
        .mut_args(|arg| if arguments::is_switch(&arg) { as_switch(arg) } else { arg })
        .next_line_help(true)
        .after_help(format!(
            "A flag may be written with one dash or two. An empty value counts as none.\n\
             For a flag that is missing, a variable is read: FLANNELD_IP_MASQ for --ip-masq, and \
             so on;\nWEFT_LOG_LEVEL for --log-level, and so on, for weft's own flags:\n  --{}",
            WEFT_FLAGS.join(", --")
        ))
}

/// Go's booleans take a value only behind `=`.
fn as_switch(arg: Arg) -> Arg {
    arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("BOOL")
}

fn matches(command: &Command, arguments: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let program = [OsString::from(PROGRAM)];
    command.clone().try_get_matches_from(program.iter().chain(arguments))
}

/// The flags that only variables give, as arguments.
fn from_variables(
    command: &Command,
    given: &ArgMatches,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<OsString>, clap::Error> {
    let mut arguments = Vec::new();
    for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
        let name = arg.get_long().unwrap_or_default();
        if given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            continue;
        }
        let variable_name = variable_name(name);
        let Some(value) = variable(&variable_name).filter(|value| !value.is_empty()) else {
            continue;
        };
        let argument = arguments::with_value(name.as_ref(), &value);
        // By itself, so that an error is known to be this variable's.
        matches(command, std::slice::from_ref(&argument)).map_err(|error| {
            let text = format!("{} (from the variable {variable_name})", one_line(&error));
            clap::Error::raw(error.kind(), text)
        })?;
        arguments.push(argument);
    }
    Ok(arguments)
}

fn variable_name(flag: &str) -> String {
    let prefix = if WEFT_FLAGS.contains(&flag) { "WEFT" } else { "FLANNELD" };
    format!("{prefix}_{}", flag.to_uppercase().replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::super::Settings;
    use super::*;

    /// flannel's flags, of all versions: the variable, the default, and another value.
    const FLANNEL: [[&str; 4]; 30] = [
        [
            "etcd-endpoints",
            "FLANNELD_ETCD_ENDPOINTS",
            "http://127.0.0.1:4001,http://127.0.0.1:2379",
            "https://192.0.2.1:2379,https://192.0.2.2:2379",
        ],
        ["etcd-prefix", "FLANNELD_ETCD_PREFIX", "/coreos.com/network", "/overlay/network"],
        ["etcd-keyfile", "FLANNELD_ETCD_KEYFILE", "", "/etc/key.pem"],
        ["etcd-certfile", "FLANNELD_ETCD_CERTFILE", "", "/etc/cert.pem"],
        ["etcd-cafile", "FLANNELD_ETCD_CAFILE", "", "/etc/ca.pem"],
        ["etcd-username", "FLANNELD_ETCD_USERNAME", "", "weft"],
        ["etcd-password", "FLANNELD_ETCD_PASSWORD", "", "-secret=="],
        ["iface", "FLANNELD_IFACE", "", "eth1"],
        ["iface-regex", "FLANNELD_IFACE_REGEX", "", "^eth\\d+$"],
        ["iface-can-reach", "FLANNELD_IFACE_CAN_REACH", "", "192.0.2.1"],
        ["public-ip", "FLANNELD_PUBLIC_IP", "", "192.0.2.7"],
        ["public-ipv6", "FLANNELD_PUBLIC_IPV6", "", "2001:db8::7"],
        ["subnet-file", "FLANNELD_SUBNET_FILE", "/run/flannel/subnet.env", "/tmp/subnet.env"],
        ["subnet-lease-renew-margin", "FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "60", "1439"],
        ["ip-masq", "FLANNELD_IP_MASQ", "false", "true"],
        ["ip-masq-fully-random-disable", "FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE", "false", "1"],
        ["iptables-resync", "FLANNELD_IPTABLES_RESYNC", "5", "30"],
        ["iptables-forward-rules", "FLANNELD_IPTABLES_FORWARD_RULES", "true", "F"],
        ["ip-blackhole-route", "FLANNELD_IP_BLACKHOLE_ROUTE", "false", "t"],
        ["kube-subnet-mgr", "FLANNELD_KUBE_SUBNET_MGR", "false", "TRUE"],
        ["kube-api-url", "FLANNELD_KUBE_API_URL", "", "https://192.0.2.1:6443"],
        ["kubeconfig-file", "FLANNELD_KUBECONFIG_FILE", "", "/etc/kubeconfig"],
        [
            "kube-annotation-prefix",
            "FLANNELD_KUBE_ANNOTATION_PREFIX",
            "flannel.alpha.coreos.com",
            "example.org",
        ],
        [
            "net-config-path",
            "FLANNELD_NET_CONFIG_PATH",
            "/etc/kube-flannel/net-conf.json",
            "/etc/net-conf.json",
        ],
        ["set-node-network-unavailable", "FLANNELD_SET_NODE_NETWORK_UNAVAILABLE", "true", "false"],
        ["healthz-ip", "FLANNELD_HEALTHZ_IP", "0.0.0.0", "0.0.0.0"],
        ["healthz-port", "FLANNELD_HEALTHZ_PORT", "0", "8081"],
        ["v", "FLANNELD_V", "0", "10"],
        ["vmodule", "FLANNELD_VMODULE", "", "main=2"],
        ["log_backtrace_at", "FLANNELD_LOG_BACKTRACE_AT", "", "main.go:10"],
    ];

    const WEFT: [(&str, &str); 19] = [
        ("registry", "dir:/srv/registry"),
        ("subnet-lease-ttl", "30m"),
        ("etcd-api", "v2"),
        ("etcd-password-file", "/etc/password"),
        ("network", "10.42.0.0/16"),
        ("state-dir", "/srv/state"),
        ("run-dir", "/srv/run"),
        ("backend", "vxlan"),
        ("guard", "peer"),
        ("peer-source", "192.0.2.7=198.51.100.7"),
        ("workers", "3"),
        ("io", "mmsg"),
        ("offload", "udp-gro=off"),
        ("udp-source-port", "fixed"),
        ("busy-poll", "50"),
        ("dscp", "copy"),
        ("firewall", "nftables"),
        ("log-level", "warn,weft_engine=trace"),
        ("log-format", "json"),
    ];

    /// The flags of both, with a value other than the default.
    fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
        FLANNEL.into_iter().map(|[name, .., value]| (name, value)).chain(WEFT)
    }

    fn parsed(args: &[&str], variables: &[(&str, &str)]) -> Result<Flags, clap::Error> {
        let args = [PROGRAM].iter().chain(args).map(OsString::from);
        parse(args, |name| {
            let (_, value) = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(value.into())
        })
    }

    fn flags(args: &[&str]) -> Flags {
        parsed(args, &[]).unwrap()
    }

    fn refused(args: &[&str]) -> String {
        let error = parsed(args, &[]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        one_line(&error)
    }

    #[test]
    fn every_flag_parses_in_every_form() {
        let defaults = flags(&[]);
        for (name, value) in all() {
            let variable = variable_name(name);
            let joined = [format!("-{name}={value}"), format!("--{name}={value}")];
            let apart = [format!("-{name}"), format!("--{name}")];
            let expected = flags(&[&joined[0]]);
            assert_ne!(expected, defaults, "{name}");
            assert_eq!(flags(&[&joined[1]]), expected, "{name}");
            assert_eq!(flags(&[&apart[0], value]), expected, "{name}");
            assert_eq!(flags(&[&apart[1], value]), expected, "{name}");
            assert_eq!(parsed(&[], &[(&variable, value)]).unwrap(), expected, "{variable}");
        }
    }

    #[test]
    fn variables_and_defaults_are_flannels() {
        let settings = |args: &[&str]| {
            let settings = flags(args).settings().unwrap();
            Settings { notes: Vec::new(), ..settings }
        };
        for [name, variable, default, _] in FLANNEL {
            assert_eq!(variable_name(name), variable);
            // Where health is told is another address by default, which counts only with a port.
            assert_eq!(settings(&[&format!("-{name}={default}")]), settings(&[]), "{name}");
        }
    }

    #[test]
    fn the_tables_of_these_tests_are_whole() {
        let command = command();
        let known = command.get_arguments().filter_map(Arg::get_long);
        let mut known: Vec<&str> = known.filter(|name| *name != "version").collect();
        let mut tested: Vec<&str> = all().map(|(name, _)| name).collect();
        known.sort_unstable();
        tested.sort_unstable();
        assert_eq!(known, tested);
        let own: Vec<&str> = WEFT.into_iter().map(|(name, _)| name).collect();
        assert_eq!(own, WEFT_FLAGS);
    }

    #[test]
    fn help_names_every_flag_under_its_heading() {
        for spelling in ["-h", "-help", "--help"] {
            let error = parsed(&["-ip-masq", spelling, "-unknown"], &[]).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (ErrorKind::DisplayHelp, 0));
            assert!(!error.use_stderr());
            let help = error.to_string();
            for (name, _) in all() {
                let named = help.split_whitespace().any(|word| {
                    word.split(['[', '=']).next() == Some(format!("--{name}").as_str())
                });
                assert!(named, "--{name} is missing");
            }
            for heading in [
                "Registry",
                "Network",
                "Interface",
                "Engine",
                "Firewall",
                "Health",
                "Kubernetes",
                "Logging",
            ] {
                assert!(help.contains(&format!("\n{heading}:\n")), "{heading} is missing");
            }
        }
    }

    #[test]
    fn version_is_told_before_variables_are_looked_at() {
        for spelling in ["-version", "--version", "-version=true"] {
            let error = parsed(&[spelling], &[("FLANNELD_HEALTHZ_PORT", "x")]).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (ErrorKind::DisplayVersion, 0));
        }
        assert!(parsed(&[], &[("FLANNELD_VERSION", "true")]).is_ok());
    }

    #[test]
    fn a_flag_comes_before_its_variable_and_an_empty_variable_is_none() {
        let variable = [("FLANNELD_IP_MASQ", "true"), ("FLANNELD_IFACE", "eth0,eth1")];
        let found = parsed(&["-ip-masq=false", "-iface=lo", "-iface", "eth2"], &variable).unwrap();
        assert!(!found.firewall.ip_masq);
        assert_eq!(found.interface.iface, ["lo", "eth2"]);
        // A variable gives a repeatable flag one element, whatever is in it.
        assert_eq!(parsed(&[], &variable).unwrap().interface.iface, ["eth0,eth1"]);
        let empty = [("FLANNELD_HEALTHZ_PORT", ""), ("FLANNELD_IP_MASQ", "")];
        assert_eq!(parsed(&[], &empty).unwrap(), flags(&[]));
        // A flag without a value leaves the variable its say, as if it had not been given.
        assert!(parsed(&["-ip-masq="], &variable).unwrap().firewall.ip_masq);
    }

    #[test]
    fn a_variable_of_the_other_kind_is_not_read() {
        let found = parsed(&[], &[("FLANNELD_GUARD", "off"), ("WEFT_IP_MASQ", "true")]).unwrap();
        assert_eq!(found, flags(&[]));
    }

    #[test]
    fn a_bad_variable_is_named() {
        for (variable, value) in [
            ("FLANNELD_HEALTHZ_PORT", "http"),
            ("FLANNELD_IP_MASQ", "maybe"),
            ("WEFT_BACKEND", "ipip"),
            ("WEFT_WORKERS", "0"),
        ] {
            let error = parsed(&["-v=1"], &[(variable, value)]).unwrap_err();
            let text = one_line(&error);
            assert_eq!(error.exit_code(), 2);
            assert!(text.contains(variable) && text.contains(value), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn the_last_of_a_flag_counts() {
        assert_eq!(flags(&["-v=1", "-v", "2"]).logging.v, Some(2));
        assert!(!flags(&["-ip-masq", "-ip-masq=false"]).firewall.ip_masq);
    }

    #[test]
    fn gos_booleans() {
        for text in ["1", "t", "T", "TRUE", "true", "True"] {
            assert!(flags(&[&format!("-ip-masq={text}")]).firewall.ip_masq, "{text}");
            assert!(flags(&["-ip-masq", text]).firewall.ip_masq, "{text}");
        }
        for text in ["0", "f", "F", "FALSE", "false", "False"] {
            let found = flags(&[&format!("-iptables-forward-rules={text}")]);
            assert!(!found.firewall.iptables_forward_rules, "{text}");
        }
        assert!(flags(&["-ip-masq"]).firewall.ip_masq);
    }

    #[test]
    fn the_seeds_command_line_survives_unset_variables() {
        let found = flags(&["--ip-masq", "", "-etcd-prefix=/x", "", "", "-etcd-cafile=/ca"]);
        assert!(found.firewall.ip_masq);
        assert_eq!(found.registry.etcd_prefix.as_deref(), Some("/x"));
        assert_eq!(found.registry.etcd_cafile, Some("/ca".into()));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["-etcd-prefx=/x"], &["'--etcd-prefx'", "'--etcd-prefix'"]),
            (&["-unknown", "x"], &["'--unknown'"]),
            (&["-ip-masq", "extra", "-v=1"], &["'extra'"]),
            (&["--", "-ip-masq"], &["'-ip-masq'"]),
            (&["-"], &["'-'"]),
            (&["---x"], &["---x"]),
            (&["--=x"], &["'--'"]),
            (&["-etcd-prefix"], &["a value is required", "--etcd-prefix"]),
            (&["-ip-masq=maybe"], &["'maybe'", "--ip-masq", "true or false"]),
            (&["-public-ip=2001:db8::1"], &["'2001:db8::1'", "--public-ip"]),
            (&["-healthz-port=70000"], &["70000", "--healthz-port"]),
            (&["-subnet-lease-renew-margin=0"], &["'0'", "out of acceptable range", "1439"]),
            (&["-subnet-lease-renew-margin=1440"], &["out of acceptable range"]),
            (&["--backend=ipip"], &["'ipip'", "udp-tun, vxlan, host-gw"]),
            (&["--guard=of"], &["'of'", "strict, peer, off"]),
            (&["--registry=/srv"], &["'/srv'", "dir:/var/lib/weft/registry"]),
            (&["--registry=dir:srv"], &["absolute path"]),
            (&["--network=10.42.0.0"], &["10.42.0.0/16"]),
            (&["--peer-source=192.0.2.7"], &["192.0.2.7=198.51.100.7"]),
            (&["--workers=0"], &["from 1 to 256"]),
            (&["--workers=257"], &["from 1 to 256"]),
            (&["--io=epoll"], &["'epoll'", "auto, uring, mmsg"]),
            (&["--offload=udp-gro"], &["udp-gro=off"]),
            (&["--offload=udp-gro=on"], &["udp-gro=off"]),
            (&["--offload=gro=off"], &["no offload is called gro", "udp-gro", "tun-tso"]),
            (&["--busy-poll=1s"], &["'1s'"]),
            (&["--busy-poll=100001"], &["100001"]),
            (&["--log-level=inof"], &["\"inof\" is no level", "info"]),
        ];
        for (args, told) in cases {
            let text = refused(args);
            assert!(!text.contains('\n') && !text.starts_with("error"), "{text}");
            for word in *told {
                assert!(text.contains(word), "{args:?}: {text}");
            }
        }
    }

    #[test]
    fn log_levels_are_as_tracing_has_them() {
        assert_eq!(flags(&[]).logging.log_level, "info");
        assert_eq!(flags(&["-log-level=DEBUG"]).logging.log_level, "DEBUG");
    }

    #[test]
    fn the_password_stays_out_of_logs() {
        let found = flags(&["-etcd-password=secret"]);
        assert!(!format!("{found:?}").contains("secret"));
    }
}
