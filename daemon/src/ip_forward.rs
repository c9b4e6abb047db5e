//! Whether the kernel forwards packets, as it has to for containers.

use std::fs;

/// What is told where it forwards none of this family that come in by a device (`all`: by any; see
/// ip-sysctl.rst). What cannot be read is not held against it.
pub(crate) fn off(ipv6: bool, device: &str) -> Option<String> {
    // A device has a say in IPv4 only.
    let (family, at) = if ipv6 { ("ipv6", "all") } else { ("ipv4", device) };
    let is_off = |at: &str| {
        let value = fs::read_to_string(format!("/proc/sys/net/{family}/conf/{at}/forwarding"));
        value.is_ok_and(|it| it.trim() == "0")
    };
    let cure = match is_off("all") {
        _ if ipv6 => "net.ipv6.conf.all.forwarding=1".to_owned(),
        true => "net.ipv4.ip_forward=1".to_owned(),
        false => format!("net/ipv4/conf/{device}/forwarding=1"),
    };
    is_off(at).then(|| {
        format!(
            "this host forwards no {family} packets that come in by {device}, so none get to containers: \
             sysctl -w {cure}"
        )
    })
}
