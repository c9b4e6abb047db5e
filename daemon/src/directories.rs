//! Where the daemons of this host keep their files, for the commands of `weft`.

use std::path::PathBuf;

use clap::Args;

/// weftd's default for what outlives a reboot.
pub const STATE_DIR: &str = "/var/lib/weft";
/// weftd's default for what does not.
pub const RUN_DIR: &str = "/run/weft";

/// The directories that weftd was started with; given before or after the subcommand.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(next_help_heading = "Directories")]
pub struct Directories {
    /// Where the daemons' sockets are, as weftd's --run-dir.
    #[arg(long, value_name = "DIR", default_value = RUN_DIR, env = "WEFT_RUN_DIR", global = true)]
    pub run_dir: PathBuf,
    /// What the daemons keep over a reboot, as weftd's --state-dir.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR, env = "WEFT_STATE_DIR", global = true)]
    pub state_dir: PathBuf,
}
