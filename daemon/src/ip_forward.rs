//! Whether the kernel forwards packets, as it has to for containers.

use std::fs;

/// What is told where it forwards none of this family that come in by a device (`all`: by any; see
/// ip-sysctl.rst). What cannot be read is not held against it.
pub(crate) fn off(ipv6: bool, device: &str) -> Option<String> {
    let (family, cure) = if ipv6 {
        ("ipv6", "net.ipv6.conf.all.forwarding=1")
    } else {
        ("ipv4", "net.ipv4.ip_forward=1")
    };
    let value = fs::read_to_string(format!("/proc/sys/net/{family}/conf/{device}/forwarding"));
    value.is_ok_and(|it| it.trim() == "0").then(|| {
        format!(
            "this host forwards no {family} packets that come in by {device}, so none get to containers: \
             sysctl -w {cure}"
        )
    })
}
