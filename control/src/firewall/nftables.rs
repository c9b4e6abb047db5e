//! The rules by nft: in one table of our own for both families, replaced in one transaction. Other
//! tables are neither read nor written, but for those of flannel that it leaves behind.
//!
//! A verdict "accept" ends only its own chain here: a later chain of another table, such as the
//! chain FORWARD that iptables makes, still drops what it drops (nft(8), "verdict statements").

use std::fmt::Write as _;

use super::rules::{Rule, Side, Verdict};
use super::{FirewallError, Rules, run};

/// Ours.
pub const TABLE: &str = "inet weft";
/// flannel's, since 0.25.
const FLANNELS: [&str; 2] = ["ip flannel-ipv4", "ip6 flannel-ipv6"];

/// The writer, which remembers how nft shows what it wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nftables {
    written: Option<(Rules, String)>,
}

impl Nftables {
    /// Makes our table hold just these rules. Writes only what is not so; says whether anything was
    /// not.
    ///
    /// # Errors
    /// nft failed, and the table is as it was; or what it took is not there.
    pub async fn apply(&mut self, rules: &Rules) -> Result<bool, FirewallError> {
        if rules.is_empty() {
            return self.remove().await;
        }
        let found = list().await?;
        let is_right =
            |(written, shown): &(Rules, String)| (written, Some(shown)) == (rules, found.as_ref());
        if self.written.as_ref().is_some_and(is_right) {
            return Ok(false);
        }
        let script = script(rules);
        run("nft", &["-f", "-"], &script).await?;
        let shown = list().await?.unwrap_or_default();
        // Somebody may have written in between; what they made of it must not pass for ours. nft says
        // things in its own words, but as many of them.
        if statements(&shown) != statements(&script) {
            self.written = None;
            return Err(FirewallError::NotKept("nft".into()));
        }
        self.written = Some((rules.clone(), shown));
        Ok(true)
    }

    /// The rules that there are in our table; none where it, or nft, is missing.
    ///
    /// # Errors
    /// nft failed.
    pub async fn rules() -> Result<Option<String>, FirewallError> {
        match list().await {
            Err(FirewallError::Missing(_)) => Ok(None),
            answer => answer,
        }
    }

    /// Removes our table, and says whether there was one.
    ///
    /// # Errors
    /// nft failed.
    pub async fn remove(&mut self) -> Result<bool, FirewallError> {
        self.written = None;
        remove(TABLE).await
    }

    /// Removes what flannel made by nft, and says whether there was any.
    ///
    /// # Errors
    /// nft failed.
    pub async fn remove_flannels() -> Result<bool, FirewallError> {
        let mut removed = false;
        for table in FLANNELS {
            removed |= remove(table).await?;
        }
        Ok(removed)
    }
}

/// How many lines say something within a table.
fn statements(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with('\t')).count()
}

async fn remove(table: &str) -> Result<bool, FirewallError> {
    if show(table).await?.is_none() {
        return Ok(false);
    }
    run("nft", &["-f", "-"], &format!("delete table {table}\n")).await.map(|_| true)
}

/// Our table as nft shows it, without counters; `None` if there is none.
async fn list() -> Result<Option<String>, FirewallError> {
    show(TABLE).await
}

async fn show(table: &str) -> Result<Option<String>, FirewallError> {
    let arguments: Vec<&str> =
        ["-s", "list", "table"].into_iter().chain(table.split(' ')).collect();
    match run("nft", &arguments, "").await {
        Ok(shown) => Ok(Some(shown)),
        Err(FirewallError::Failed { reason, .. }) if reason.contains("No such file") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces the table, whatever it holds: to add it makes sure that there is one to delete.
fn script(rules: &Rules) -> String {
    let mut script = format!("add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let families = [&rules.ipv4, &rules.ipv6];
    let postrouting: Vec<&Rule> = families.into_iter().flat_map(|it| &it.postrouting).collect();
    let forward: Vec<&Rule> = families.into_iter().flat_map(|it| &it.forward).collect();
    for (name, hook, comment, rules_of_chain) in [
        ("postrouting", "type nat hook postrouting priority srcnat", "flanneld masq", postrouting),
        ("forward", "type filter hook forward priority filter", "flanneld forward", forward),
    ] {
        if rules_of_chain.is_empty() {
            continue;
        }
        // Writing to a String cannot fail.
        let _ = writeln!(script, "\tchain {name} {{\n\t\t{hook}; policy accept;");
        for rule in rules_of_chain {
            let rule = statement(rule, rules.random_fully);
            let _ = writeln!(script, "\t\t{rule} comment \"{comment}\"");
        }
        script += "\t}\n";
    }
    script + "}\n"
}

fn statement(rule: &Rule, random_fully: bool) -> String {
    let mut parts: Vec<String> =
        rule.input.iter().map(|input| format!("iifname \"{input}\"")).collect();
    for (field, side) in [("saddr", rule.from), ("daddr", rule.to)] {
        let (network, not) = match side {
            None => continue,
            Some(Side::In(network)) => (network, ""),
            Some(Side::Out(network)) => (network, "!= "),
        };
        let family = if network.is_ipv6() { "ip6" } else { "ip" };
        parts.push(format!("{family} {field} {not}{network}"));
    }
    parts.extend(rule.mark.map(|mark| format!("meta mark & {mark:#x} == {mark:#x}")));
    parts.push(match rule.verdict {
        Verdict::Return => "return".into(),
        Verdict::Masquerade if random_fully => "masquerade fully-random".into(),
        Verdict::Masquerade => "masquerade".into(),
        Verdict::Accept => "accept".into(),
        Verdict::Drop => "drop".into(),
    });
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::rules::Switches;
    use super::*;

    #[test]
    fn the_rules_mean_what_iptables_does() {
        let config =
            r#"{"EnableIPv6":true,"Network":"172.22.0.0/16","IPv6Network":"fd00:22::/48"}"#;
        let switches = Switches { masquerade: true, forward: true, random_fully: true };
        let key = "172.22.82.0-24&fd00:22:0:7::-64".parse().unwrap();
        let found = script(&Rules::new(&config.parse().unwrap(), &key, switches, Some("eth0")));
        let masq = |rule: &str| format!("\t\t{rule} comment \"flanneld masq\"\n");
        let pass = |rule: &str| format!("\t\t{rule} comment \"flanneld forward\"\n");
        let postrouting = [
            "meta mark & 0x4000 == 0x4000 return",
            "ip saddr 172.22.82.0/24 ip daddr 172.22.0.0/16 return",
            "ip saddr 172.22.0.0/16 ip daddr 172.22.82.0/24 return",
            "ip saddr != 172.22.0.0/16 ip daddr 172.22.82.0/24 return",
            "ip saddr 172.22.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
            "ip saddr != 172.22.0.0/16 ip daddr 172.22.0.0/16 masquerade fully-random",
            "meta mark & 0x4000 == 0x4000 return",
            "ip6 saddr fd00:22:0:7::/64 ip6 daddr fd00:22::/48 return",
            "ip6 saddr fd00:22::/48 ip6 daddr fd00:22:0:7::/64 return",
            "ip6 saddr != fd00:22::/48 ip6 daddr fd00:22:0:7::/64 return",
            "ip6 saddr fd00:22::/48 ip6 daddr != ff00::/8 masquerade fully-random",
            "ip6 saddr != fd00:22::/48 ip6 daddr fd00:22::/48 masquerade fully-random",
        ];
        let forward = [
            "iifname \"eth0\" ip saddr 172.22.0.0/16 ip daddr 172.22.0.0/16 drop",
            "ip saddr 172.22.0.0/16 accept",
            "ip daddr 172.22.0.0/16 accept",
            "iifname \"eth0\" ip6 saddr fd00:22::/48 ip6 daddr fd00:22::/48 drop",
            "ip6 saddr fd00:22::/48 accept",
            "ip6 daddr fd00:22::/48 accept",
        ];
        let wanted = format!(
            "add table inet weft\ndelete table inet weft\ntable inet weft {{\n\tchain postrouting \
             {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n{}\t}}\n\tchain \
             forward {{\n\t\ttype filter hook forward priority filter; policy accept;\n{}\t}}\n}}\n",
            postrouting.map(masq).concat(),
            forward.map(pass).concat(),
        );
        assert_eq!(found, wanted);
    }
}
