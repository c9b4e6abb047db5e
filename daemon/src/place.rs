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
    /// Takes it, for the daemon that uses the registry of this identity; the socket gets its name.
    ///
    /// # Errors
    /// Another daemon has it, or a directory cannot be written to.
    pub(crate) fn take(
        settings: &Settings,
        registry: &str,
        mut socket: Socket,
        interface: ExternalInterface,
        attrs: LeaseAttrs,
    ) -> anyhow::Result<Self> {
        let public_ip = public_ip(&attrs)?;
        let node = Node::claim(files(settings, registry, public_ip))?;
        socket.move_to(&node.files.socket)?;
        let identity = Identity { node_id: node.id.clone(), attrs };
        Ok(Self { interface, identity, public_ip, node, socket })
    }

    /// Moves to another interface, address or MTU, as the same node.
    ///
    /// # Errors
    /// As for [`Place::take`].
    pub(crate) fn move_to(
        &mut self,
        settings: &Settings,
        registry: &str,
        interface: ExternalInterface,
        attrs: LeaseAttrs,
    ) -> anyhow::Result<()> {
        let public_ip = public_ip(&attrs)?;
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

fn public_ip(attrs: &LeaseAttrs) -> anyhow::Result<IpAddr> {
    let first = attrs.public_addresses().next();
    first.context("the interface has no address that other nodes could send to")
}

fn files(settings: &Settings, registry: &str, public_ip: IpAddr) -> NodeFiles {
    NodeFiles::of(&settings.state_dir, &settings.run_dir, registry, public_ip)
}
