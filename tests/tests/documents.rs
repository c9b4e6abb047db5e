//! What the documents say is so: their commands run or are understood, and the errors in them are
//! the program's own.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use regex::Regex;
use weft_daemon::flags;
use weft_daemon::lab::Lab;
use weft_tests::machine::Machine;
use weft_tests::{Weftd, etcd, program, repository, until};

fn read(name: &str) -> Result<String> {
    fs::read_to_string(repository().join(name)).with_context(|| name.to_owned())
}

/// The lines of a document's blocks of code.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix("    ")).map(str::trim_end)
}

/// The commands in a document, block by block and within its sentences.
fn commands(text: &str) -> Vec<String> {
    let inline = Regex::new(r"`(weftd? [^`]+)`").expect("an expression");
    // Errors, in the headings, begin with a program's name, too.
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let joined = lines.join(" ");
    let inline = inline.captures_iter(&joined).map(|found| found[1].to_owned());
    let own = |line: &&str| line.starts_with("weft ") || line.starts_with("weftd ");
    let blocks = code(text).filter(own).map(|line| {
        let line = line.split('#').next().unwrap_or(line);
        line.split('|').next().unwrap_or(line).trim().to_owned()
    });
    blocks.chain(inline).collect()
}

/// Whether the program knows the subcommand and the flags.
fn is_understood(command: &str) -> Result<()> {
    let words: Vec<&str> = command.split_whitespace().collect();
    if words[0] == "weftd" {
        return match flags::parse(words.iter().map(Into::into), |_| None) {
            Err(mistake) if mistake.exit_code() != 0 => Err(mistake).context(command.to_owned()),
            Ok(_) | Err(_) => Ok(()),
        };
    }
    let output = Command::new(program("weft")?).args(&words[1..]).arg("--help").output()?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn every_command_is_understood() -> Result<()> {
    let mut seen = BTreeSet::new();
    let documents = fs::read_dir(repository().join("docs"))?;
    let documents = documents.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    for path in documents.iter().chain([&repository().join("README.md")]) {
        for command in commands(&fs::read_to_string(path)?) {
            // What goes on in the next line, or stands for several.
            let is_name = |word: &str| word.chars().all(|it| it.is_uppercase() || it == '_');
            let is_open = command.ends_with('\\') || command.contains(['…', '[', '$']);
            if is_open || command.split_whitespace().any(is_name) {
                continue;
            }
            is_understood(&command).with_context(|| path.display().to_string())?;
            seen.insert(command);
        }
    }
    assert!(seen.len() > 20, "{seen:?}");
    Ok(())
}

/// Every line of code of the workspace, with the pieces of long texts joined.
fn sources() -> Result<String> {
    let mut text = String::new();
    let mut directories: Vec<PathBuf> =
        ["engine", "backends", "control", "daemon"].map(|it| repository().join(it)).into();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                text += &fs::read_to_string(path)?;
            }
        }
    }
    Ok(Regex::new(r"\\\n\s*")?.replace_all(&text, "").into_owned())
}

#[test]
fn every_error_in_the_document_is_the_programs() -> Result<()> {
    let sources = sources()?;
    let text = read("docs/troubleshooting.md")?;
    let headings: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("### `")).collect();
    assert!(headings.len() > 15);
    for heading in headings {
        for piece in heading.trim_end_matches('`').split('…') {
            let piece = piece.trim();
            assert!(sources.contains(piece), "nothing says {piece:?}");
        }
    }
    Ok(())
}

/// The text's own commands, on two hosts and an etcd.
#[test]
fn the_quick_start_works_as_it_is_written() -> Result<()> {
    let lab: Lab = etcd::hosts(2, 1)?;
    let url = lab.etcd_urls()[0].clone();
    let text = read("docs/quickstart.md")?.replace("http://10.0.0.1:2379", &url);
    let lines: Vec<&str> = code(&text).collect();
    let mut machines = Vec::new();
    for host in 0..2 {
        let mut machine = Machine::new(&lab.host(host).netns)?;
        machine.boot()?;
        machines.push(machine);
    }
    let mut daemons = Vec::new();
    for line in lines {
        if line.starts_with("weftd ") {
            for (host, machine) in machines.iter().enumerate() {
                let log = lab.host(host).log.clone();
                let mut command = machine.command(line)?;
                daemons.push(Weftd::start_command(machine.netns(), &log, &mut command)?);
            }
            for machine in &machines {
                until("both know each other", || {
                    let text = machine.shell("weft status")?;
                    Ok(text.contains("10.168.0.9") && text.contains("tunnel"))
                })?;
            }
        } else if line.contains("trace") {
            let status = machines[0].shell("weft status -o json")?;
            let status: serde_json::Value = serde_json::from_str(&status)?;
            let subnet: IpNetwork =
                serde_json::from_value(status[0]["peers"][0]["subnets"][0].clone())?;
            let line = line.replace("10.42.7.9", &subnet.network().to_string());
            let text = machines[0].shell(&line)?;
            assert!(text.contains(&format!("{subnet} of the peer 10.168.0.95")), "{text}");
        } else {
            // Once: the config is there the second time.
            machines[0].shell(line)?;
        }
    }
    assert_eq!(daemons.len(), 2);
    for machine in &mut machines {
        machine.cut_power()?;
    }
    lab.remove()
}
