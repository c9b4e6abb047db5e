//! The external interface, chosen from what the host has now: at the start, and again whenever the
//! kernel tells of a change.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context;
use weft_backends::netlink::{KernelRoute, Link, Netlink, WayOut};
use weft_backends::{BackendError, BackendKind, ExternalInterface, Options};
use weft_control::lease::addresses;
use weft_control::{LeaseAttrs, NetworkConfig};

use crate::flags::Settings;
use crate::interface::{self, Chosen, Families, InterfaceError};
use crate::overlap;
use crate::overlay::Overlay;

/// What the host has.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) links: Vec<Link>,
    routes: Vec<KernelRoute>,
    /// The way to the address that was asked for.
    way: WayOut,
}

impl Surroundings {
    /// Looks around; `reach` is the address that `--iface-can-reach` names.
    ///
    /// # Errors
    /// netlink failed.
    pub(crate) async fn look(reach: Option<IpAddr>) -> anyhow::Result<Self> {
        tokio::task::spawn_blocking(move || {
            let netlink = Netlink::open().context("cannot open a netlink socket")?;
            // An address that no route leads to has no way; the choice says so.
            let way = reach.and_then(|ip| netlink.way_out(ip).ok()).unwrap_or_default();
            Ok(Self { links: netlink.links()?, routes: netlink.routes()?, way })
        })
        .await?
    }

    /// The interface that the flags ask for; `held`: the addresses in use.
    ///
    /// # Errors
    /// None can be used.
    pub(crate) fn choose(
        &self,
        settings: &Settings,
        config: &NetworkConfig,
        held: &[IpAddr],
    ) -> Result<Chosen, InterfaceError> {
        let families = Families { ipv4: config.ipv4.is_some(), ipv6: config.ipv6.is_some() };
        interface::choose(&settings.wish, families, &self.links, &self.routes, self.way, held)
    }

    /// The address by which others know this node, where it may come yet: at a host's start another one may be
    /// there before it, and by that this would be another node. One that is on another interface, or for which
    /// the flags have another, is not waited for.
    pub(crate) fn lacks(
        &self,
        formerly: &LeaseAttrs,
        settings: &Settings,
        config: &NetworkConfig,
        next: &ExternalInterface,
    ) -> Option<IpAddr> {
        let known = formerly.public_addresses().next()?;
        if next.public_addresses().any(|ip| ip == known) {
            return None;
        }
        let given = addresses(settings.wish.public_ip, settings.wish.public_ipv6);
        let given: Vec<IpAddr> = given.collect();
        let is_given = given.contains(&known);
        if !is_given && !given.is_empty() {
            return None;
        }
        let mut there = self.links.iter().flat_map(|link| &link.addresses);
        let is_there = there.any(|address| address.network.ip() == known);
        let has_no_ipv4 = config.ipv4.is_some() && known.is_ipv4() && next.ipv4.is_none();
        (is_given || !is_there || has_no_ipv4).then_some(known)
    }

    /// What keeps packets from leaving by this interface, if anything does.
    fn fault(&self, interface: &ExternalInterface) -> Option<String> {
        let link = self.links.iter().find(|link| link.index == interface.index)?;
        link.fault().map(|fault| format!("{} {fault}", link.name))
    }

    /// Why the overlay would cut off a host that is reached by this interface.
    pub(crate) fn conflict(
        &self,
        settings: &Settings,
        config: &NetworkConfig,
        interface: &ExternalInterface,
    ) -> Option<String> {
        overlap::conflict(config, interface, &self.routes, &settings.registry)
    }
}

/// What to go on with, now that the interface is not what is known of it; `None` if it is.
///
/// # Errors
/// There is no interface to use, or nothing leaves by it, and why.
pub(crate) async fn changed(
    settings: &Settings,
    config: &NetworkConfig,
    known: &ExternalInterface,
) -> Result<Option<Chosen>, String> {
    let look = Surroundings::look(settings.wish.can_reach).await;
    let around = look.map_err(|error| format!("{error:#}"))?;
    let held: Vec<IpAddr> = known.addresses().collect();
    // A link that goes down takes its routes with it: that there are none is not what to mend.
    let chosen =
        around.choose(settings, config, &held).map_err(|error| match around.fault(known) {
            Some(fault) => format!("{fault}, and no other interface can be used"),
            None => error.to_string(),
        })?;
    if chosen.interface == *known {
        return around.fault(known).map_or(Ok(None), Err);
    }
    if let Some(family) = lost_family(known, &chosen.interface) {
        return Err(format!(
            "{} has no {family} address any more that others know; restart weftd if it is to do without",
            chosen.interface.name
        ));
    }
    around.conflict(settings, config, &chosen.interface).map_or(Ok(Some(chosen)), Err)
}

/// Without a family all its peers are cut off, with a link-local address those behind routers; and an address is
/// often gone for a moment only, as while a host's network is set up anew.
fn lost_family(known: &ExternalInterface, next: &ExternalInterface) -> Option<&'static str> {
    // None is worth less than one of the link only, and that less than one that others know.
    let worth = |ip: Option<Ipv4Addr>| ip.map(|ip| !ip.is_link_local());
    let ipv4 = worth(next.ipv4) < worth(known.ipv4);
    let worth = |ip: Option<Ipv6Addr>| ip.map(|ip| !ip.is_unicast_link_local());
    let ipv6 = worth(next.ipv6) < worth(known.ipv6);
    ipv4.then_some("IPv4").or(ipv6.then_some("IPv6"))
}

/// A backend that is ready to begin on an interface.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) interface: ExternalInterface,
    /// Why it is this one.
    pub(crate) why: String,
    pub(crate) overlay: Overlay,
    /// What goes into the lease.
    pub(crate) attrs: LeaseAttrs,
}

/// Makes the backend for an interface; nothing in the kernel changes yet.
///
/// # Errors
/// An option of the config is wrong, or netlink is not to be had.
pub(crate) fn open(
    settings: &Settings,
    config: &NetworkConfig,
    kind: BackendKind,
    interface: &ExternalInterface,
) -> Result<Overlay, BackendError> {
    let options = Options {
        guard: settings.guard,
        workers: settings.workers,
        tuning: settings.tuning.clone(),
    };
    weft_backends::open(kind, config, interface, options).map(Overlay::new)
}

impl Prepared {
    /// Has the backend make or adopt what the lease of the node with this id tells of.
    ///
    /// # Errors
    /// The inner error is the backend's; the outer one that it panicked.
    pub(crate) async fn new(
        mut overlay: Overlay,
        chosen: Chosen,
        node_id: &str,
    ) -> anyhow::Result<Result<Self, BackendError>> {
        let Chosen { interface, why } = chosen;
        let node_id = node_id.to_owned();
        let attrs = overlay.call(move |backend| backend.prepare(&node_id)).await?;
        Ok(attrs.map(|attrs| Self { interface, why, overlay, attrs }))
    }

    /// Opens the backend before that.
    ///
    /// # Errors
    /// As [`open`] and [`Prepared::new`].
    pub(crate) async fn open(
        settings: &Settings,
        config: &NetworkConfig,
        kind: BackendKind,
        chosen: Chosen,
        node_id: &str,
    ) -> anyhow::Result<Result<Self, BackendError>> {
        match open(settings, config, kind, &chosen.interface) {
            Ok(overlay) => Self::new(overlay, chosen, node_id).await,
            Err(error) => Ok(Err(error)),
        }
    }
}
