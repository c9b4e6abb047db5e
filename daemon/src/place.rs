//! Where this node stands: on which interface, and under which names others know it. All of it
//! moves when the host's address does.

use std::net::IpAddr;

use anyhow::Context;
use weft_backends::ExternalInterface;
use weft_control::LeaseAttrs;
use weft_control::keeper::Identity;

use crate::flags::Settings;
use crate::node::{Node, NodeFiles};
use crate::socket::Socket;
use crate::state_file::LastKnown;

/// Under what others last knew a node of this registry that has lived by this state directory.
pub(crate) fn formerly(settings: &Settings, registry: &str) -> Option<LeaseAttrs> {
    let found = LastKnown::read_all(&settings.state_dir).ok()?;
    let known = found.into_iter().filter_map(|(path, LastKnown { lease, .. }, since)| {
        let public_ip = lease.attrs.public_addresses().next()?;
        // Another registry's has another name.
        let is_ours = files(settings, registry, public_ip).last_known == path;
        is_ours.then_some((since, lease.attrs))
    });
    known.max_by_key(|(since, _)| *since).map(|(_, attrs)| attrs)
}

/// One node's place.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) interface: ExternalInterface,
    pub(crate) identity: Identity,
    /// The first of the addresses that other nodes send to.
    pub(crate) public_ip: IpAddr,
    pub(crate) node: Node,
    socket: Socket,
}

impl Place {
    /// Claims the node on this interface, for the daemon that uses the registry of this identity.
    ///
    /// # Errors
    /// Another daemon has it, or a directory cannot be written to.
    pub(crate) fn claim(
        settings: &Settings,
        registry: &str,
        interface: &ExternalInterface,
    ) -> anyhow::Result<Node> {
        Node::claim(files(settings, registry, public_ip(interface)?))
    }

    /// Takes the place of a node that is claimed; the socket gets its name.
    ///
    /// # Errors
    /// A directory cannot be written to.
    pub(crate) fn take(
        node: Node,
        mut socket: Socket,
        interface: ExternalInterface,
        attrs: LeaseAttrs,
    ) -> anyhow::Result<Self> {
        let public_ip = public_ip(&interface)?;
        socket.move_to(&node.files.socket)?;
        let identity = Identity { node_id: node.id.clone(), attrs };
        Ok(Self { interface, identity, public_ip, node, socket })
    }

    /// Moves to another interface, address or MTU, as the same node.
    ///
    /// # Errors
    /// As for [`Place::claim`].
    pub(crate) fn move_to(
        &mut self,
        settings: &Settings,
        registry: &str,
        interface: ExternalInterface,
        attrs: LeaseAttrs,
    ) -> anyhow::Result<()> {
        let public_ip = public_ip(&interface)?;
        if public_ip != self.public_ip {
            self.node.move_to(files(settings, registry, public_ip))?;
            self.socket.move_to(&self.node.files.socket)?;
        }
        self.interface = interface;
        self.identity.attrs = attrs;
        self.public_ip = public_ip;
        Ok(())
    }
}

fn public_ip(interface: &ExternalInterface) -> anyhow::Result<IpAddr> {
    let first = interface.public_addresses().next();
    first.context("the interface has no address that other nodes could send to")
}

fn files(settings: &Settings, registry: &str, public_ip: IpAddr) -> NodeFiles {
    NodeFiles::of(&settings.state_dir, &settings.run_dir, registry, public_ip)
}
