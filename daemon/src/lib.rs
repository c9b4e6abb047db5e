//! weftd, the overlay network daemon, and weft, the operator's command.

pub mod flags;
mod forwarding;
pub mod interface;
pub mod lab;
mod leasing;
pub mod netns;
mod node;
mod overlap;
mod overlay;
mod registry;
pub mod registry_command;
mod retry;
pub mod run;
mod state_file;
pub mod status;
