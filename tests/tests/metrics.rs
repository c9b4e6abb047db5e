//! `/metrics` against its document, and what is shipped to look at it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use regex::Regex;
use serde_json::Value;
use weft_daemon::lab::Bytes;
use weft_tests::{bring_up, hosts, metrics, repository};

/// The names of all metrics in `docs/metrics.md`, and the labels of each.
fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let text = fs::read_to_string(repository().join("docs/metrics.md"))?;
    let row = Regex::new(r"(?m)^\| `(weft_\w+)` \| (\w+) \| ([\w, ]*) \|")?;
    let rows = row.captures_iter(&text).map(|row| {
        let labels = row[3].split(", ").filter(|label| !label.is_empty());
        let mut labels: BTreeSet<String> = labels.map(str::to_owned).collect();
        if &row[2] == "histogram" {
            labels.insert("le".into());
        }
        (row[1].to_owned(), labels)
    });
    Ok(rows.collect())
}

/// A sample's name without what a histogram puts behind it.
fn family(sample: &str, known: &BTreeMap<String, BTreeSet<String>>) -> Option<String> {
    let bare = ["_bucket", "_sum", "_count"].iter().filter_map(|it| sample.strip_suffix(it));
    std::iter::once(sample).chain(bare).find(|name| known.contains_key(*name)).map(str::to_owned)
}

/// Everything that a text calls weft_….
fn named(text: &str) -> Result<BTreeSet<String>> {
    let name = Regex::new(r"\bweft_\w+")?;
    Ok(name.find_iter(text).map(|found| found.as_str().to_owned()).collect())
}

/// The expressions in a dashboard.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let own = ["expr", "query"].iter().filter_map(|key| fields.get(*key)?.as_str());
            found.extend(own.map(str::to_owned));
            fields.values().for_each(|it| expressions(it, found));
        }
        Value::Array(items) => items.iter().for_each(|it| expressions(it, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn what_comes_out_is_what_is_documented_and_what_dashboards_ask_for() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &["--healthz-port=8081"])?;
    assert!(lab.transfer(0, 1, Bytes(1 << 20))?.intact());
    let told = metrics(&lab.host(0).netns, 8081)?;
    lab.remove()?;

    let documented = documented()?;
    let label = Regex::new(r#"(\w+)=""#)?;
    let mut seen = BTreeMap::new();
    let mut names = BTreeSet::new();
    for sample in told.keys() {
        let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
        let family = family(name, &documented).with_context(|| format!("undocumented: {name}"))?;
        let labels = label.captures_iter(labels).map(|found| found[1].to_owned());
        seen.entry(family).or_insert_with(BTreeSet::new).extend(labels);
        names.insert(name.to_owned());
    }
    assert_eq!(seen, documented);

    let alerts = fs::read_to_string(repository().join("packaging/metrics/weft-alerts.yml"))?;
    let alerts: Value = serde_yaml_ng::from_str(&alerts)?;
    let rules = alerts["groups"][0]["rules"].as_array().context("no rules")?;
    assert!(rules.iter().all(|rule| rule["alert"].is_string() && rule["expr"].is_string()));
    let dashboard = fs::read_to_string(repository().join("packaging/metrics/weft-dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&dashboard)?;
    for document in [alerts, dashboard] {
        let mut asked = Vec::new();
        expressions(&document, &mut asked);
        let asked = named(&asked.join("\n"))?;
        assert!(asked.len() > 9, "{asked:?}");
        let unknown: Vec<&String> = asked.difference(&names).collect();
        assert!(unknown.is_empty(), "nothing is called {unknown:?}");
    }
    Ok(())
}
