//! `weft cni`: the configuration of a CNI bridge for this node's subnet, as flannel's CNI plugin
//! would delegate it.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use weft_control::subnet_env::SubnetEnv;

/// The newest version of the CNI specification that the bridge plugins of all distributions know.
const CNI_VERSION: &str = "0.3.1";

/// Print the CNI configuration of a bridge for this node's subnet, as for /etc/cni/net.d/.
#[derive(Debug, Args)]
pub struct CniArgs {
    /// subnet.env, as weftd or flanneld writes it.
    #[arg(short = 'f', value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    subnet_file: PathBuf,
    /// The network's name.
    #[arg(long, value_name = "NAME", default_value = "cbr0")]
    name: String,
    /// The bridge's name.
    #[arg(long, value_name = "DEVICE", default_value = "cni0")]
    bridge: String,
}

/// Prints it.
///
/// # Errors
/// subnet.env is missing or names no subnet.
pub fn run(arguments: &CniArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let env = SubnetEnv::read(&arguments.subnet_file).map_err(anyhow::Error::msg)?;
    writeln!(out, "{:#}", configuration(&env, arguments))?;
    Ok(())
}

fn configuration(env: &SubnetEnv, arguments: &CniArgs) -> Value {
    let range = |gateway: &IpNetwork| {
        let subnet = format!("{}/{}", gateway.network(), gateway.prefix());
        json!([{ "subnet": subnet }])
    };
    let ranges: Vec<Value> = env.gateways.iter().map(range).collect();
    let routes: Vec<Value> = env.networks.iter().map(|net| json!({ "dst": net })).collect();
    let bridge = json!({
        "type": "bridge",
        "bridge": arguments.bridge,
        "isDefaultGateway": true,
        "hairpinMode": true,
        // Who masquerades: weftd or the bridge, not both.
        "ipMasq": !env.ip_masq,
        "mtu": env.mtu,
        "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
    });
    json!({ "cniVersion": CNI_VERSION, "name": arguments.name, "plugins": [bridge] })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: CniArgs,
    }

    #[test]
    fn the_bridge_is_the_delegate_of_flannels_plugin() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            file.path(),
            "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\n\
             FLANNEL_IPV6_NETWORK=fd00:1::/48\nFLANNEL_IPV6_SUBNET=fd00:1:0:7::1/64\n\
             FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n",
        )
        .unwrap();
        let arguments = Cli::parse_from(["weft", "-f", file.path().to_str().unwrap()]).arguments;
        let mut out = Vec::new();
        run(&arguments, &mut out).unwrap();
        let found: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            found,
            json!({
                "cniVersion": "0.3.1",
                "name": "cbr0",
                "plugins": [{
                    "type": "bridge",
                    "bridge": "cni0",
                    "isDefaultGateway": true,
                    "hairpinMode": true,
                    "ipMasq": false,
                    "mtu": 1472,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{ "subnet": "10.1.74.0/24" }], [{ "subnet": "fd00:1:0:7::/64" }]],
                        "routes": [{ "dst": "10.1.0.0/16" }, { "dst": "fd00:1::/48" }],
                    },
                }],
            })
        );
    }
}
