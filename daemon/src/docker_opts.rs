//! `weft docker-opts`: what docker is started with, from subnet.env; flannel's mk-docker-opts.sh.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use ipnetwork::IpNetwork;
use weft_control::file::{self, PUBLIC};
use weft_control::subnet_env::SubnetEnv;

/// Where they are written, unless -d names another file.
pub(crate) const DOCKER_FILE: &str = "/run/docker_opts.env";

/// Write docker's options for this node's subnet to a file for docker's unit (EnvironmentFile=).
///
/// Without -i and -c both forms are written. What the environment has in DOCKER_OPT_... and in the variable
/// of -k is kept.
#[derive(Debug, Args)]
pub struct DockerOptsArgs {
    /// subnet.env, as weftd or flanneld writes it.
    #[arg(short = 'f', value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    subnet_file: PathBuf,
    /// The file to write.
    #[arg(short = 'd', value_name = "FILE", default_value = DOCKER_FILE)]
    docker_file: PathBuf,
    /// One variable an option: DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU.
    #[arg(short = 'i')]
    individual: bool,
    /// All options in one variable.
    #[arg(short = 'c')]
    combined: bool,
    /// The name of that variable.
    #[arg(short = 'k', value_name = "KEY", default_value = "DOCKER_OPTS")]
    key: String,
    /// Without --ip-masq, which very old dockers do not know.
    #[arg(short = 'm')]
    no_ip_masq: bool,
}

/// Writes the file.
///
/// # Errors
/// subnet.env is missing or lacks what docker needs, or the file cannot be written.
pub fn run(arguments: &DockerOptsArgs) -> anyhow::Result<()> {
    let subnet_env = SubnetEnv::read(&arguments.subnet_file).map_err(anyhow::Error::msg)?;
    ensure!(
        is_variable(&arguments.key),
        "{:?} is no name of a variable: give -k letters, digits and underscores",
        arguments.key
    );
    // What is no text is no option either.
    let texts =
        |(name, value): (OsString, OsString)| name.into_string().ok().zip(value.into_string().ok());
    let text = text(&subnet_env, arguments, env::vars_os().filter_map(texts).collect())?;
    // Where a link leads to; and a terminal or a pipe, as /dev/stdout, stays what it is.
    let path = &arguments.docker_file;
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let is_special = fs::metadata(path).is_ok_and(|found| !found.is_file());
    let written = if is_special {
        File::options().write(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()))
    } else {
        file::replace(&target, text.as_bytes(), PUBLIC)
    };
    written.with_context(|| format!("cannot write {}; see -d", path.display()))
}

fn is_variable(name: &str) -> bool {
    let mut letters = name.bytes();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && letters.all(|other| other.is_ascii_alphanumeric() || other == b'_')
}

/// The address of docker's bridge in what was written.
pub(crate) fn bridge_in(text: &str) -> Option<IpNetwork> {
    let (_, rest) = text.split_once("--bip=")?;
    rest.split(|it: char| it.is_whitespace() || it == '"').next()?.parse().ok()
}

/// In the order of the variables' names, as the shell lists them for flannel.
fn text(
    subnet_env: &SubnetEnv,
    arguments: &DockerOptsArgs,
    mut environment: BTreeMap<String, String>,
) -> anyhow::Result<String> {
    let Some(subnet) = subnet_env.gateways.iter().find(|gateway| gateway.is_ipv4()) else {
        bail!(
            "{} names no IPv4 subnet, which docker's --bip needs",
            arguments.subnet_file.display()
        );
    };
    let before =
        environment.remove(&arguments.key).map(|options| options + " ").unwrap_or_default();
    let mut options = environment;
    options.retain(|name, _| name.starts_with("DOCKER_OPT_"));
    options.insert("DOCKER_OPT_BIP".into(), format!("--bip={subnet}"));
    // Who masquerades: weftd or docker, not both.
    if !arguments.no_ip_masq {
        options.insert("DOCKER_OPT_IPMASQ".into(), format!("--ip-masq={}", !subnet_env.ip_masq));
    }
    options.insert("DOCKER_OPT_MTU".into(), format!("--mtu={}", subnet_env.mtu));
    let both = arguments.individual == arguments.combined;
    let mut text = String::new();
    if arguments.individual || both {
        let lines = options.iter().map(|(name, option)| format!("{name}=\"{option}\"\n"));
        text.extend(lines);
    }
    if arguments.combined || both {
        let all: String = options.values().map(|option| format!(" {option}")).collect();
        text += &format!("{}=\"{before}{all}\"\n", arguments.key);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: DockerOptsArgs,
    }

    const SAMPLE: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\n\
         FLANNEL_IPMASQ=false\n";
    const EACH: &str = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\n\
         DOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n";
    const ALL: &str = "=\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";

    fn made(sample: &str, flags: &[&str]) -> anyhow::Result<String> {
        let dir = tempfile::tempdir()?;
        let (from, to) = (dir.path().join("subnet.env"), dir.path().join("docker.env"));
        fs::write(&from, sample)?;
        let files = ["weft", "-f", from.to_str().unwrap(), "-d", to.to_str().unwrap()];
        run(&Cli::try_parse_from(files.iter().chain(flags))?.arguments)?;
        Ok(fs::read_to_string(to)?)
    }

    /// The cases of the reference's own test.
    #[test]
    fn the_options_are_flannels() {
        let made = |flags: &[&str]| made(SAMPLE, flags).unwrap();
        assert_eq!(made(&[]), format!("{EACH}DOCKER_OPTS{ALL}"));
        assert_eq!(made(&["-i", "-c"]), format!("{EACH}DOCKER_OPTS{ALL}"));
        assert_eq!(made(&["-i"]), EACH);
        assert_eq!(made(&["-c"]), format!("DOCKER_OPTS{ALL}"));
        assert_eq!(made(&["-k", "CUSTOM_KEY"]), format!("{EACH}CUSTOM_KEY{ALL}"));
        assert_eq!(
            made(&["-m"]),
            "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n\
             DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n"
        );
    }

    /// As flannel's own script printed it.
    #[test]
    fn what_the_environment_has_is_kept() {
        let environment = [
            ("DOCKER_OPTS", "--insecure-registry=10.0.0.0/8"),
            ("DOCKER_OPT_LOG", "--log-level=warn"),
            ("DOCKER_HOST", "unix:///run/docker.sock"),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let subnet_env = SubnetEnv {
            networks: Vec::new(),
            gateways: vec!["10.1.74.1/24".parse().unwrap()],
            mtu: 1472,
            ip_masq: false,
        };
        let arguments = Cli::try_parse_from(["weft", "-c"]).unwrap().arguments;
        assert_eq!(
            text(&subnet_env, &arguments, environment.into()).unwrap(),
            "DOCKER_OPTS=\"--insecure-registry=10.0.0.0/8  --bip=10.1.74.1/24 --ip-masq=true \
             --log-level=warn --mtu=1472\"\n"
        );
    }

    #[test]
    fn a_link_is_followed_and_a_device_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to, link) =
            (dir.path().join("subnet.env"), dir.path().join("to"), dir.path().join("link"));
        fs::write(&from, SAMPLE).unwrap();
        fs::write(&to, "").unwrap();
        std::os::unix::fs::symlink(&to, &link).unwrap();
        for target in [link.to_str().unwrap(), "/dev/null"] {
            let words = ["weft", "-i", "-f", from.to_str().unwrap(), "-d", target];
            run(&Cli::try_parse_from(words).unwrap().arguments).unwrap();
        }
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&to).unwrap(), EACH);
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn who_masquerades_is_not_told_to_docker_as_well() {
        let found = made(&SAMPLE.replace("false", "true"), &["-c"]).unwrap();
        assert_eq!(found, "DOCKER_OPTS=\" --bip=10.1.74.1/24 --ip-masq=false --mtu=1472\"\n");
    }

    #[test]
    fn what_docker_cannot_use_is_told() {
        let error = made("FLANNEL_IPV6_SUBNET=fd00:1::1/64\nFLANNEL_MTU=1472\n", &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("names no IPv4 subnet"), "{error}");
        let error = made(SAMPLE, &["-k", "x; rm"]).unwrap_err().to_string();
        assert!(error.contains("no name of a variable"), "{error}");
        let missing = Cli::try_parse_from(["weft", "-f", "/nowhere"]).unwrap().arguments;
        assert!(run(&missing).unwrap_err().to_string().contains("cannot read /nowhere"));
    }
}
