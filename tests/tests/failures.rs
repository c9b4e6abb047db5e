//! Holds docs/failures.md to its word: each row names a test that shows it, and there is that test.

use std::fs;

use anyhow::{Context, Result, ensure};
use weft_tests::repository;

/// What stands between backquotes in a text.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_row_of_the_contract_has_its_test() -> Result<()> {
    let root = repository();
    let text = fs::read_to_string(root.join("docs/failures.md"))?;
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| what happens |"))
        .map(|line| line.trim_matches('|').split(" | ").collect())
        .collect();
    ensure!(rows.len() > 20, "the table is not read: {} rows", rows.len());
    for row in &rows {
        let [what, _, shown] = row[..] else { panic!("not three columns: {row:?}") };
        let mut names = quoted(shown);
        let test = names.next().with_context(|| format!("no test shows: {what}"))?;
        let path = names.next().unwrap_or("tests/tests/etcd.rs");
        let source = fs::read_to_string(root.join(path)).with_context(|| path.to_owned())?;
        let function = format!("fn {test}() ");
        let (before, _) = source.split_once(&function).with_context(|| format!("no {test}"))?;
        let marks = before.rsplit("\n\n").next().unwrap_or_default();
        ensure!(marks.contains("#[test]") || marks.contains("#[tokio::test"), "{test} is no test");
        ensure!(names.next().is_none(), "{what}: one test a row");
    }
    Ok(())
}
