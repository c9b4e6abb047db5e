//! subnet.env: what container runtimes read to know this node's subnet and MTU.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::config::{NetworkConfig, from_bits, to_bits};
use crate::file::{self, PUBLIC};
use crate::lease::{Lease, LeaseKey};

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole overlay, of each family, IPv4 first.
    pub networks: Vec<IpNetwork>,
    /// Our subnets by their first host addresses, which are the bridge's and the containers' gateways.
    pub gateways: Vec<IpNetwork>,
    /// The MTU of bridge and container.
    pub mtu: u32,
    /// Whether packets that leave the overlay are masqueraded already.
    pub ip_masq: bool,
}

impl SubnetEnv {
    /// What a node with this lease tells its containers. `mtu` in bytes.
    pub fn new(config: &NetworkConfig, lease: &Lease, mtu: u32, ip_masq: bool) -> Self {
        let subnets = lease.key.networks().filter_map(|subnet| {
            let network = config.family(subnet.is_ipv6())?.network;
            Some((network, IpNetwork::new(first_host(subnet), subnet.prefix()).ok()?))
        });
        let (networks, gateways) = subnets.unzip();
        Self { networks, gateways, mtu, ip_masq }
    }

    /// Reads the file that weftd or flanneld wrote.
    ///
    /// # Errors
    /// It is missing, or lacks something, or something in it is not what it should be.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(path).map_err(|error| {
            format!("cannot read {}, which weftd writes: {error}", path.display())
        })?;
        parse(&text).map_err(|error| format!("cannot use {}: {error}", path.display()))
    }

    /// Replaces the file in one step, so that no reader sees half of it. Its directory is made if
    /// missing; everybody may read it.
    ///
    /// # Errors
    /// The file system refused; the old file, if any, is as it was.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        file::replace(path, self.text().as_bytes(), PUBLIC)
    }

    /// Whether the file says just this.
    pub fn is_in(&self, path: &Path) -> bool {
        fs::read(path).is_ok_and(|found| found == self.text().as_bytes())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (network, gateway) in self.networks.iter().zip(&self.gateways) {
            let infix = if network.is_ipv6() { "IPV6_" } else { "" };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "FLANNEL_{infix}NETWORK={network}");
            let _ = writeln!(text, "FLANNEL_{infix}SUBNET={gateway}");
        }
        let _ = writeln!(text, "FLANNEL_MTU={}", self.mtu);
        let _ = writeln!(text, "FLANNEL_IPMASQ={}", self.ip_masq);
        text
    }
}

fn first_host(subnet: IpNetwork) -> IpAddr {
    from_bits(to_bits(subnet.network()) + 1, subnet)
}

fn parse(text: &str) -> Result<SubnetEnv, String> {
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.trim().split_once('='));
        pairs.find_map(|(name, value)| (name == key).then_some(value))
    };
    let both = |keys: [&str; 2]| -> Result<Vec<IpNetwork>, String> {
        let found = keys.into_iter().filter_map(|key| Some((key, value(key)?)));
        let parse = |(key, text): (&str, &str)| {
            text.parse().map_err(|error| format!("{key}={text} is no subnet: {error}"))
        };
        found.map(parse).collect()
    };
    let networks = both(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"])?;
    let gateways = both(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"])?;
    if gateways.is_empty() {
        return Err("it has neither FLANNEL_SUBNET nor FLANNEL_IPV6_SUBNET".into());
    }
    let mtu = value("FLANNEL_MTU").ok_or("it has no FLANNEL_MTU")?;
    let mtu = mtu.parse().map_err(|error| format!("FLANNEL_MTU={mtu} is no number: {error}"))?;
    let ip_masq = value("FLANNEL_IPMASQ") == Some("true");
    Ok(SubnetEnv { networks, gateways, mtu, ip_masq })
}

/// The subnets of the last run, by an old file, ours or flannel's. Whatever cannot be read counts as absent, with a warning:
/// the node then gets another subnet.
pub fn read_previous(path: &Path) -> LeaseKey {
    match fs::read(path) {
        Ok(bytes) => parse_previous(&String::from_utf8_lossy(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => LeaseKey::default(),
        Err(error) => {
            tracing::warn!("cannot read the last subnet from {}: {error}", path.display());
            LeaseKey::default()
        }
    }
}

fn parse_previous(text: &str) -> LeaseKey {
    LeaseKey {
        ipv4: only_one(text, "FLANNEL_SUBNET", |text| {
            let net: Ipv4Network = text.parse().ok()?;
            Ipv4Network::new(net.network(), net.prefix()).ok()
        }),
        ipv6: only_one(text, "FLANNEL_IPV6_SUBNET", |text| {
            let net: Ipv6Network = text.parse().ok()?;
            Ipv6Network::new(net.network(), net.prefix()).ok()
        }),
    }
}

/// flannel takes a comma list, of which it uses the valid entry if there is just one.
fn only_one<T>(text: &str, key: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    let mut lines = text.lines().filter_map(|line| line.trim().split_once('='));
    let (_, value) = lines.rfind(|(name, _)| name.trim() == key)?;
    let entries = value.trim().trim_matches(['"', '\'']).split(',').map(str::trim);
    let mut valid = Vec::new();
    for entry in entries.filter(|entry| !entry.is_empty()) {
        match parse(entry) {
            Some(net) => valid.push(net),
            None => tracing::warn!("{key} of the last run holds {entry:?}, which is no subnet"),
        }
    }
    if valid.len() > 1 {
        tracing::warn!("{key} of the last run holds more than one subnet; none is used");
        return None;
    }
    valid.pop()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::lease::{Expiry, LeaseAttrs};

    fn env(config: &str, key: &str) -> SubnetEnv {
        let lease = Lease {
            key: key.parse().unwrap(),
            attrs: LeaseAttrs::default(),
            expires: Expiry::Never,
            revision: 0,
        };
        SubnetEnv::new(&config.parse().unwrap(), &lease, 1472, true)
    }

    #[test]
    fn is_flannels_file() {
        let found = env(r#"{"Network":"172.22.0.0/16"}"#, "172.22.82.0-24").text();
        assert_eq!(
            found,
            "FLANNEL_NETWORK=172.22.0.0/16\nFLANNEL_SUBNET=172.22.82.1/24\n\
             FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
        );
        let dual = env(
            r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"2001:cafe:42::/56"}"#,
            "10.42.0.0-24&2001:cafe:42::-64",
        );
        assert_eq!(
            dual.text(),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\n\
             FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n\
             FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn reads_what_it_wrote() {
        let dual = env(
            r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/56"}"#,
            "10.42.7.0-24&fd00:42:0:7::-64",
        );
        assert_eq!(parse(&dual.text()).unwrap(), dual);
    }

    #[test]
    fn says_what_is_missing_or_wrong() {
        for (text, complaint) in [
            ("", "neither FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=10.42.7.1/24\n", "no FLANNEL_MTU"),
            ("FLANNEL_SUBNET=ten/24\nFLANNEL_MTU=1472\n", "FLANNEL_SUBNET=ten/24"),
            ("FLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=-1\n", "FLANNEL_MTU=-1"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn everybody_may_read_it_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flannel/subnet.env");
        let env = env(r#"{"Network":"172.22.0.0/16"}"#, "172.22.82.0-24");
        env.write(&path).unwrap();
        env.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let found = read_previous(&path);
        assert_eq!(found.ipv4, "172.22.82.0/24".parse().ok());
        assert_eq!(found.ipv6, None);
    }

    #[test]
    fn no_reader_sees_half_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        let env = env(r#"{"Network":"172.22.0.0/16"}"#, "172.22.82.0-24");
        env.write(&path).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(fs::read_to_string(&path).unwrap(), env.text());
                }
            });
            for _ in 0..200 {
                env.write(&path).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
    }

    #[test]
    fn odd_files_yield_no_subnet() {
        let ipv4 = |value: &str| parse_previous(&format!("FLANNEL_SUBNET={value}\n")).ipv4;
        assert_eq!(ipv4("10.244.1.1/24"), "10.244.1.0/24".parse().ok());
        assert_eq!(ipv4("\"10.244.1.1/24\""), "10.244.1.0/24".parse().ok());
        assert_eq!(ipv4("10.244.1.0/24,not-a-cidr"), "10.244.1.0/24".parse().ok());
        assert_eq!(ipv4("10.244.1.0/24,not-a-cidr,10.244.2.0/24"), None);
        assert_eq!(ipv4("not-a-cidr"), None);
        assert_eq!(ipv4(""), None);
        assert_eq!(read_previous(Path::new("/nonexistent/subnet.env")), LeaseKey::default());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,60}") {
            let _ = parse_previous(&format!("FLANNEL_SUBNET={text}\n{text}"));
        }
    }
}
