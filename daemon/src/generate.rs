//! `weft generate`, for `make install`: man pages and completions, from the definitions of the command
//! lines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command, Subcommand};
use clap_complete::Shell;
use clap_mangen::Man;

/// Write man pages and completions.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Man pages, into man1 and man8 of this directory
    Man { directory: PathBuf },
    /// Completions of one shell, into this directory
    Completions { shell: Shell, directory: PathBuf },
}

/// Writes them for both programs; `weft` is the command line of ours.
///
/// # Errors
/// A file cannot be written.
pub fn run(arguments: &GenerateArgs, weft: Command) -> anyhow::Result<()> {
    match &arguments.what {
        What::Man { directory } => man(directory, weft),
        What::Completions { shell, directory } => completions(*shell, directory, weft),
    }
}

fn man(directory: &Path, weft: Command) -> anyhow::Result<()> {
    let commands = made(&directory.join("man1"))?;
    clap_mangen::generate_to(weft, &commands).with_context(|| cannot_write(&commands))?;
    let daemons = made(&directory.join("man8"))?;
    let page = Man::new(crate::flags::command()).section("8");
    page.generate_to(&daemons).with_context(|| cannot_write(&daemons))?;
    Ok(())
}

fn completions(shell: Shell, directory: &Path, weft: Command) -> anyhow::Result<()> {
    let directory = made(directory)?;
    for mut command in [weft, crate::flags::command()] {
        let name = command.get_name().to_owned();
        clap_complete::generate_to(shell, &mut command, &name, &directory)
            .with_context(|| cannot_write(&directory))?;
    }
    Ok(())
}

fn made(directory: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory.to_owned())
}

fn cannot_write(directory: &Path) -> String {
    format!("cannot write to {}", directory.display())
}
