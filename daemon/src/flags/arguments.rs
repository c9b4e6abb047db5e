//! Go's way of writing flags into clap's: `-name value`, `-name=value` and their like all become
//! `--name=value`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, Command};

/// Rewrites the arguments behind the program's name. As in Go, the argument after a flag that
/// takes a value is that value, whatever it looks like. Other than in Go, empty arguments and
/// empty values, which systemd makes of an unset `${X}`, are dropped, and a boolean flag may be
/// followed by its value.
pub(super) fn from_go(
    command: &Command,
    given: impl IntoIterator<Item = OsString>,
) -> Vec<OsString> {
    let mut given = given.into_iter().peekable();
    let mut arguments = Vec::new();
    while let Some(argument) = given.next() {
        if argument == "--" {
            arguments.push(argument);
            arguments.extend(given.by_ref().filter(|rest| !rest.is_empty()));
        } else if let Some((name, value)) = split(&argument) {
            let value = value.map(OsString::from).or_else(|| match takes(command, name) {
                Takes::Value => given.next(),
                Takes::Boolean => given.next_if(|next| next.to_str().is_some_and(is_boolean)),
                Takes::Nothing => None,
            });
            arguments.extend(spell(name, value));
        } else if !argument.is_empty() {
            arguments.push(argument);
        }
    }
    arguments
}

/// `--name=value`.
pub(super) fn with_value(name: &OsStr, value: &OsStr) -> OsString {
    let mut argument = OsString::from("--");
    argument.push(name);
    argument.push("=");
    argument.push(value);
    argument
}

/// Reads a boolean as Go's strconv.ParseBool does.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "True" | "TRUE" => Some(true),
        "0" | "f" | "F" | "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// Whether the flag is a boolean one.
pub(super) fn is_switch(arg: &Arg) -> bool {
    arg.get_value_parser().type_id() == ValueParser::bool().type_id()
}

/// What the argument after a flag may be to it.
enum Takes {
    Value,
    Boolean,
    Nothing,
}

fn takes(command: &Command, name: &OsStr) -> Takes {
    let arg = command.get_arguments().find(|arg| arg.get_long().map(OsStr::new) == Some(name));
    match arg {
        Some(arg) if is_switch(arg) || is_version(arg) => Takes::Boolean,
        Some(_) => Takes::Value,
        // An unknown flag, which clap reports.
        None => Takes::Nothing,
    }
}

fn is_version(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Version)
}

fn is_boolean(text: &str) -> bool {
    boolean(text).is_some()
}

/// The name behind one dash or two, and the value behind the first `=`; `None` for what Go takes
/// for no flag, or for a malformed one.
fn split(argument: &OsStr) -> Option<(&OsStr, Option<&OsStr>)> {
    let bytes = argument.as_bytes();
    let bytes = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-"))?;
    if matches!(bytes.first(), None | Some(b'-' | b'=')) {
        return None;
    }
    let mut parts = bytes.splitn(2, |byte| *byte == b'=');
    let name = OsStr::from_bytes(parts.next()?);
    Some((name, parts.next().map(OsStr::from_bytes)))
}

fn spell(name: &OsStr, value: Option<OsString>) -> Option<OsString> {
    if name == "h" || name == "help" {
        return Some("--help".into());
    }
    match value {
        Some(value) if value.is_empty() => None,
        // clap's own flag for the version takes no value.
        Some(value) if name == "version" && value.to_str().is_some_and(is_boolean) => {
            value.to_str().and_then(boolean)?.then(|| "--version".into())
        }
        Some(value) => Some(with_value(name, &value)),
        None => {
            let mut argument = OsString::from("--");
            argument.push(name);
            Some(argument)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::command;
    use super::*;

    fn rewritten(given: &[&str]) -> Vec<OsString> {
        from_go(&command(), given.iter().map(OsString::from))
    }

    #[test]
    fn go_spelling_becomes_claps() {
        let cases: &[(&[&str], &[&str])] = &[
            (&[], &[]),
            (&["-etcd-prefix=/x"], &["--etcd-prefix=/x"]),
            (&["-etcd-prefix", "/x"], &["--etcd-prefix=/x"]),
            (&["--etcd-prefix", "/x"], &["--etcd-prefix=/x"]),
            (&["--etcd-prefix", "a=b"], &["--etcd-prefix=a=b"]),
            (&["-etcd-prefix=a=b"], &["--etcd-prefix=a=b"]),
            (&["-v", "3"], &["--v=3"]),
            // The next argument is the value, whatever it looks like.
            (&["-etcd-prefix", "-foo"], &["--etcd-prefix=-foo"]),
            (&["-etcd-prefix", "--ip-masq", "-v=1"], &["--etcd-prefix=--ip-masq", "--v=1"]),
            (&["-etcd-prefix", "--", "-v=1"], &["--etcd-prefix=--", "--v=1"]),
            (&["-etcd-prefix"], &["--etcd-prefix"]),
            // systemd's unset variables.
            (&["", "-ip-masq", "", "", "-v=1", ""], &["--ip-masq", "--v=1"]),
            (&["-etcd-prefix", "", "-ip-masq"], &["--ip-masq"]),
            (&["-etcd-prefix=", "-ip-masq"], &["--ip-masq"]),
            (&["-ip-masq=", "-v=1"], &["--v=1"]),
            // Booleans.
            (&["-ip-masq"], &["--ip-masq"]),
            (&["-ip-masq=T"], &["--ip-masq=T"]),
            (&["-ip-masq", "true", "-v=1"], &["--ip-masq=true", "--v=1"]),
            (&["-ip-masq", "0"], &["--ip-masq=0"]),
            (&["-ip-masq", "-v=1"], &["--ip-masq", "--v=1"]),
            (&["-ip-masq", "maybe"], &["--ip-masq", "maybe"]),
            // Help and version.
            (&["-h"], &["--help"]),
            (&["--h"], &["--help"]),
            (&["-help"], &["--help"]),
            (&["-version"], &["--version"]),
            (&["-version=true"], &["--version"]),
            (&["-version=false"], &[]),
            // What clap is left to complain about.
            (&["--", "", "-ip-masq", "x"], &["--", "-ip-masq", "x"]),
            (&["-unknown", "x"], &["--unknown", "x"]),
            (&["x", "-", "---x", "-=x", "--=x"], &["x", "-", "---x", "-=x", "--=x"]),
        ];
        for (given, expected) in cases {
            assert_eq!(rewritten(given), *expected, "{given:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_stay_as_they_are() {
        let given = OsStr::from_bytes(b"-subnet-file=/\xff=").to_owned();
        let expected = OsStr::from_bytes(b"--subnet-file=/\xff=").to_owned();
        assert_eq!(from_go(&command(), [given]), [expected]);
    }
}
