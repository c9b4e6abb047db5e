//! weft's control plane: the network config, leases, the registries that hold them, and subnet.env.
//!
//! It knows no packets and no kernel devices. The registry's content is never trusted: what cannot
//! be read is skipped and named, what could take over traffic is refused.

pub mod allocate;
pub mod backoff;
pub mod config;
pub mod file;
pub mod firewall;
pub mod keeper;
pub mod lease;
pub mod peers;
pub mod registry;
pub mod subnet_env;

pub use backoff::Backoff;
pub use config::{ConfigError, NetworkConfig};
pub use lease::{Lease, LeaseAttrs, LeaseKey};
pub use registry::access::{Access, Password, Secret};
pub use registry::directory::DirectoryRegistry;
pub use registry::etcd2::Etcd2Registry;
pub use registry::etcd3::Etcd3Registry;
pub use registry::{Registry, RegistryError, View};
