//! weftd, the overlay network daemon, and weft, the operator's command.

pub mod cni;
pub mod directories;
pub mod docker_opts;
pub mod firewall;
pub mod flags;
mod forwarding;
mod handed;
mod health;
mod http;
pub mod interface;
pub mod lab;
mod leasing;
pub mod netns;
mod node;
mod notify;
pub mod output;
mod overlap;
mod overlay;
mod registry;
pub mod registry_command;
mod repairs;
mod retry;
pub mod run;
mod state_file;
pub mod status;
pub mod status_command;
