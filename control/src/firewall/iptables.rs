//! The rules by iptables and ip6tables: in chains of our own, each table written in one transaction
//! of `iptables-restore --noflush`, so that nobody ever sees half of a chain. A line `:CHAIN - [0:0]`
//! there makes the chain or empties it (iptables-restore(8)).

use std::fmt::{self, Write as _};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use ipnetwork::IpNetwork;

use super::rules::{Rule, Side, Verdict};
use super::{FirewallError, Rules, run};

/// flannel's chains, which hold our rules, and the comments that flannel's rules bear.
const MASQUERADE: Chain =
    Chain { table: "nat", hook: "POSTROUTING", name: "FLANNEL-POSTRTG", comment: "flanneld masq" };
const FORWARD: Chain =
    Chain { table: "filter", hook: "FORWARD", name: "FLANNEL-FWD", comment: "flanneld forward" };

/// As flannel 0.16.2 and 0.16.3 spell that of one rule: left there, it masquerades what containers send to
/// each other.
const MISSPELT: &str = "flannel masq";

/// The first version that knows `--random-fully`, and `--wait` for iptables-restore.
const RANDOM_FULLY_SINCE: (u32, u32, u32) = (1, 6, 2);

/// A chain of ours and where the kernel's own chain jumps to it.
#[derive(Debug, Clone, Copy)]
struct Chain {
    table: &'static str,
    hook: &'static str,
    name: &'static str,
    comment: &'static str,
}

/// A chain that has rules of ours.
#[derive(Debug, Clone, Copy)]
pub struct OwnChain {
    ipv6: bool,
    chain: Chain,
}

impl fmt::Display for OwnChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = if self.ipv6 { "ip6tables" } else { "iptables" };
        write!(f, "chain {} of {program} -t {}", self.chain.name, self.chain.table)
    }
}

/// iptables, as it is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iptables {
    /// As it calls itself: "iptables v1.8.9 (nf_tables)".
    pub version: String,
    is_recent: bool,
    /// What the programs' names have before "-save": nothing, or which of two kinds of tables in
    /// the kernel they work on.
    kind: &'static str,
}

impl Iptables {
    /// Finds out which iptables there is.
    ///
    /// # Errors
    /// There is none, or it does not run.
    pub async fn find() -> Result<Self, FirewallError> {
        let version = run("iptables", &["--version"], "").await?.trim().to_owned();
        let is_recent = number(&version).is_none_or(|number| number >= RANDOM_FULLY_SINCE);
        Ok(Self { version, is_recent, kind: "" })
    }

    /// The one that works on the other kind of tables in the kernel, whose rules count as well; if
    /// it is installed, and there is anything of flannel's in them. To look into the older kind
    /// would make them, so only those that are there are looked into.
    pub async fn other_kind(&self) -> Option<Self> {
        let other = self.other();
        for ipv6 in [false, true] {
            if run(&other.program(ipv6, "-save"), &[], "").await.ok()?.contains("flanneld ") {
                return Some(other);
            }
        }
        None
    }

    fn other(&self) -> Self {
        let kind = if self.is_legacy() { "-nft" } else { "-legacy" };
        Self { kind, ..self.clone() }
    }

    fn is_legacy(&self) -> bool {
        self.kind == "-legacy" || self.kind.is_empty() && !self.version.contains("nf_tables")
    }

    /// The program of the other kind, if what no rule of its chain FORWARD knows is dropped: our rules are
    /// not there.
    pub async fn other_that_drops(&self, ipv6: bool) -> Option<String> {
        let other = self.other();
        let drops = other.forward_drops(ipv6).await.ok()?;
        drops.then(|| other.program(ipv6, ""))
    }

    /// Makes the kernel have just these rules in our chains, and our chains jumped to. Writes only
    /// what is not so; says whether anything was not. `adopt`: rules that earlier versions of flannel
    /// left outside of our chains are removed too.
    ///
    /// # Errors
    /// A program failed; a table that was not written is as it was.
    pub async fn apply(&self, rules: &Rules, adopt: bool) -> Result<bool, FirewallError> {
        let (mut changed, mut refused) = (false, None);
        for ipv6 in [false, true] {
            let family = rules.family(ipv6);
            let wanted = [(MASQUERADE, &family.postrouting), (FORWARD, &family.forward)];
            for (chain, rules_of_chain) in wanted {
                // Without IPv6 in the overlay nobody needs ip6tables.
                if !rules_of_chain.is_empty() || adopt {
                    let random = rules.random_fully && self.is_recent;
                    let lines = rules_of_chain.iter().map(|it| chain.line(it, random)).collect();
                    match self.apply_chain(ipv6, chain, lines, adopt).await {
                        Ok(written) => changed |= written,
                        // The other tables do not depend on it.
                        Err(error) => refused = refused.or(Some(error)),
                    }
                }
            }
        }
        refused.map_or(Ok(changed), Err)
    }

    async fn apply_chain(
        &self,
        ipv6: bool,
        chain: Chain,
        lines: Vec<String>,
        adopt: bool,
    ) -> Result<bool, FirewallError> {
        let saved = match self.save(ipv6, chain.table).await {
            Ok(saved) => saved,
            // Nothing to remove, then.
            Err(_) if lines.is_empty() => return Ok(false),
            Err(error) => return Err(error),
        };
        self.change(ipv6, chain, &saved, &lines, adopt).await
    }

    /// `saved`: what the table holds.
    async fn change(
        &self,
        ipv6: bool,
        chain: Chain,
        saved: &str,
        lines: &[String],
        adopt: bool,
    ) -> Result<bool, FirewallError> {
        let Some(script) = chain.script(&Found::read(saved, chain), lines, adopt) else {
            return Ok(false);
        };
        let restore = self.program(ipv6, "-restore");
        let wait: &[&str] = if self.is_recent { &["--wait", "5"] } else { &[] };
        run(&restore, &[&["--noflush"], wait].concat(), &script).await?;
        let kept = Found::read(&self.save(ipv6, chain.table).await?, chain);
        match chain.script(&kept, lines, adopt) {
            None => Ok(true),
            Some(_) => Err(FirewallError::NotKept(restore)),
        }
    }

    /// Where the table is of the older kind and not there, it holds nothing: to look into it would make it.
    async fn save(&self, ipv6: bool, table: &str) -> Result<String, FirewallError> {
        if self.is_legacy() && !has_legacy(table, ipv6) {
            return Ok(String::new());
        }
        run(&self.program(ipv6, "-save"), &["-t", table], "").await
    }

    fn program(&self, ipv6: bool, work: &str) -> String {
        format!("{}{}{work}", if ipv6 { "ip6tables" } else { "iptables" }, self.kind)
    }

    /// Whether packets that no rule of the chain FORWARD knows are dropped.
    ///
    /// # Errors
    /// iptables failed.
    pub async fn forward_drops(&self, ipv6: bool) -> Result<bool, FirewallError> {
        Ok(self.save(ipv6, FORWARD.table).await?.lines().any(|it| it.starts_with(":FORWARD DROP")))
    }

    /// The chains with rules for one of these networks, by their names perhaps flannel's; and what
    /// kept us from looking into others.
    pub async fn chains(&self, networks: &[IpNetwork]) -> (Vec<OwnChain>, Vec<FirewallError>) {
        let (mut chains, mut failures) = (Vec::new(), Vec::new());
        for ipv6 in [false, true] {
            if !networks.iter().any(|network| network.is_ipv6() == ipv6) {
                continue;
            }
            for chain in [MASQUERADE, FORWARD] {
                let saved = match self.save(ipv6, chain.table).await {
                    Ok(saved) => saved,
                    Err(FirewallError::Missing(_)) => continue,
                    Err(error) => {
                        failures.push(error);
                        continue;
                    }
                };
                let rules = Found::read(&saved, chain).rules.unwrap_or_default();
                let mut words = rules.iter().flat_map(|rule| rule.split(' '));
                if words.any(|word| word.parse().is_ok_and(|word| networks.contains(&word))) {
                    chains.push(OwnChain { ipv6, chain });
                }
            }
        }
        (chains, failures)
    }

    /// Removes a chain and the jumps to it.
    ///
    /// # Errors
    /// A program failed.
    pub async fn remove_chain(&self, chain: OwnChain) -> Result<(), FirewallError> {
        let OwnChain { ipv6, chain } = chain;
        let saved = self.save(ipv6, chain.table).await?;
        self.change(ipv6, chain, &saved, &[], false).await.map(drop)
    }

    /// Removes all that weft or flannel made by iptables.
    ///
    /// # Errors
    /// A program failed.
    pub async fn remove(&self) -> Result<bool, FirewallError> {
        self.apply(&Rules::default(), true).await
    }
}

/// Whether the kernel has this table of the older kind. Who asks iptables-legacy for it makes it.
pub fn has_legacy(table: &str, ipv6: bool) -> bool {
    let names = if ipv6 { "ip6_tables_names" } else { "ip_tables_names" };
    match fs::read_to_string(Path::new("/proc/self/net").join(names)) {
        Ok(names) => names.lines().any(|name| name == table),
        // Without its module there is no such file; what we may not read may name it.
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}

/// "iptables v1.8.9 (nf_tables)" is 1.8.9.
fn number(version: &str) -> Option<(u32, u32, u32)> {
    let text = version.split_whitespace().nth(1)?.strip_prefix('v')?;
    let mut parts = text.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

impl Chain {
    /// A rule as iptables-save prints it.
    fn line(&self, rule: &Rule, random_fully: bool) -> String {
        let mut line = format!("-A {}", self.name);
        // Writing to a String cannot fail.
        for (flag, side) in [("-s", rule.from), ("-d", rule.to)] {
            let _ = match side {
                None => Ok(()),
                Some(Side::In(network)) => write!(line, " {flag} {network}"),
                Some(Side::Out(network)) => write!(line, " ! {flag} {network}"),
            };
        }
        if let Some(input) = &rule.input {
            let _ = write!(line, " -i {input}");
        }
        if let Some(mark) = rule.mark {
            let _ = write!(line, " -m mark --mark {mark:#x}/{mark:#x}");
        }
        line += &self.comment_and(match rule.verdict {
            Verdict::Return => "RETURN",
            Verdict::Masquerade => "MASQUERADE",
            Verdict::Accept => "ACCEPT",
            Verdict::Drop => "DROP",
        });
        if rule.verdict == Verdict::Masquerade && random_fully {
            line += " --random-fully";
        }
        line
    }

    fn comment_and(&self, target: &str) -> String {
        format!(" -m comment --comment \"{}\" -j {target}", self.comment)
    }

    /// The rule that leads into our chain, without the command before it.
    fn jump(&self) -> String {
        format!("{}{}", self.hook, self.comment_and(self.name))
    }

    /// What makes of `found` what it should be; `None` if it is that.
    fn script(&self, found: &Found, lines: &[String], adopt: bool) -> Option<String> {
        let mut script = format!("*{}\n", self.table);
        let empty = script.len();
        if adopt {
            for foreign in &found.of_flannel {
                let _ = writeln!(script, "-D {foreign}");
            }
        }
        let jump = self.jump();
        // Once, and where packets get to it.
        let is_in_place = found.jumps.len() == 1 && found.jumps[0] <= found.end;
        let wanted = !lines.is_empty();
        if !wanted || !is_in_place {
            found.jumps.iter().for_each(|_| {
                let _ = writeln!(script, "-D {jump}");
            });
        }
        if wanted && (found.rules.as_deref() != Some(lines)) {
            let _ = writeln!(script, ":{} - [0:0]", self.name);
            lines.iter().for_each(|line| {
                let _ = writeln!(script, "{line}");
            });
        }
        if wanted && !is_in_place {
            // Behind the rules that were there, but before one that lets nobody pass.
            let before = found.jumps.iter().filter(|at| **at < found.end).count();
            let adopted = if adopt { found.adopted_before_end } else { 0 };
            let _ = match found.end {
                usize::MAX => writeln!(script, "-A {jump}"),
                end => {
                    let body = jump.strip_prefix(self.hook).unwrap_or_default();
                    writeln!(script, "-I {} {}{body}", self.hook, end + 1 - before - adopted)
                }
            };
        }
        if !wanted && found.rules.is_some() {
            let _ = writeln!(script, "-F {0}\n-X {0}", self.name);
        }
        (script.len() > empty).then(|| script + "COMMIT\n")
    }
}

/// What a table holds of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    /// The rules of our chain, if there is one.
    rules: Option<Vec<String>>,
    /// Where the kernel's chain jumps to ours, counted from 0.
    jumps: Vec<usize>,
    /// Where that chain has a rule that drops or rejects whatever comes to it; far away if nowhere.
    end: usize,
    /// Rules there that flannel up to 0.19 made, without `-A`, and how many of them are before `end`.
    of_flannel: Vec<String>,
    adopted_before_end: usize,
}

impl Found {
    fn read(saved: &str, chain: Chain) -> Self {
        let (own_head, own) = (format!(":{} ", chain.name), format!("-A {} ", chain.name));
        let hook = format!("-A {} ", chain.hook);
        let jump = format!("-A {}", chain.jump());
        let comments = [chain.comment, MISSPELT].map(|it| format!("--comment \"{it}\""));
        let mut found = Self {
            rules: None,
            jumps: Vec::new(),
            end: usize::MAX,
            of_flannel: Vec::new(),
            adopted_before_end: 0,
        };
        let mut number = 0;
        for line in saved.lines() {
            if line.starts_with(&own_head) {
                found.rules = Some(Vec::new());
            } else if line.starts_with(&own) {
                found.rules.get_or_insert_default().push(line.to_owned());
            } else if line.starts_with(&hook) {
                if line == jump {
                    found.jumps.push(number);
                } else if comments.iter().any(|it| line.contains(it)) {
                    found.of_flannel.push(line.trim_start_matches("-A ").to_owned());
                    found.adopted_before_end += usize::from(found.end == usize::MAX);
                } else if ends_all(line, &hook) {
                    found.end = found.end.min(number);
                }
                number += 1;
            }
        }
        found
    }
}

/// Whether a rule drops or rejects without any condition.
fn ends_all(line: &str, hook: &str) -> bool {
    let rest = line.strip_prefix(hook).unwrap_or_default();
    rest == "-j DROP" || rest == "-j REJECT" || rest.starts_with("-j REJECT --reject-with ")
}

#[cfg(test)]
mod tests {
    use super::super::rules::{FamilyRules, Switches};
    use super::*;
    use crate::config::NetworkConfig;

    const ALL: Switches = Switches { masquerade: true, forward: true, random_fully: true };

    fn rules(config: &str, key: &str, switches: Switches) -> Rules {
        Rules::new(&config.parse().unwrap(), &key.parse().unwrap(), switches, None)
    }

    fn lines(chain: Chain, family: &FamilyRules) -> Vec<String> {
        let rules = if chain.table == "nat" { &family.postrouting } else { &family.forward };
        rules.iter().map(|rule| chain.line(rule, true)).collect()
    }

    fn ipv4() -> Rules {
        rules(r#"{"Network":"172.22.0.0/16"}"#, "172.22.82.0-24", ALL)
    }

    #[test]
    fn the_rules_are_flannels() {
        let found = ipv4();
        assert_eq!(
            lines(MASQUERADE, &found.ipv4),
            [
                "-m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN",
                "-s 172.22.82.0/24 -d 172.22.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN",
                "-s 172.22.0.0/16 -d 172.22.82.0/24 -m comment --comment \"flanneld masq\" -j RETURN",
                "! -s 172.22.0.0/16 -d 172.22.82.0/24 -m comment --comment \"flanneld masq\" -j RETURN",
                "-s 172.22.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" \
                 -j MASQUERADE --random-fully",
                "! -s 172.22.0.0/16 -d 172.22.0.0/16 -m comment --comment \"flanneld masq\" \
                 -j MASQUERADE --random-fully",
            ]
            .map(|rule| format!("-A FLANNEL-POSTRTG {rule}"))
        );
        assert_eq!(
            lines(FORWARD, &found.ipv4),
            [
                "-s 172.22.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
                "-d 172.22.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
            ]
            .map(|rule| format!("-A FLANNEL-FWD {rule}"))
        );
        assert_eq!(found.ipv6, FamilyRules::default());
    }

    #[test]
    fn what_comes_unwrapped_from_outside_is_dropped_first() {
        let config: NetworkConfig = r#"{"Network":"172.22.0.0/16"}"#.parse().unwrap();
        let key = "172.22.82.0-24".parse().unwrap();
        let forward = |outside| lines(FORWARD, &Rules::new(&config, &key, ALL, outside).ipv4);
        assert_eq!(
            forward(Some("eth0.7"))[0],
            "-A FLANNEL-FWD -s 172.22.0.0/16 -d 172.22.0.0/16 -i eth0.7 -m comment --comment \
             \"flanneld forward\" -j DROP"
        );
        assert_eq!(forward(Some("eth0.7"))[1..], forward(None));
        assert_eq!(forward(Some("x\" accept")), forward(None));
    }

    #[test]
    fn switches_leave_chains_out_and_ipv6_has_its_own_multicast() {
        let dual = r#"{"EnableIPv6":true,"Network":"172.22.0.0/16","IPv6Network":"fd00:22::/48"}"#;
        let none = Switches { masquerade: false, forward: false, random_fully: true };
        let found = rules(dual, "172.22.82.0-24&fd00:22:0:7::-64", none);
        assert_eq!((found.ipv4, found.ipv6), Default::default());
        let found = rules(dual, "172.22.82.0-24&fd00:22:0:7::-64", ALL);
        assert_eq!(found.ipv6.postrouting.len(), 6);
        assert_eq!(
            MASQUERADE.line(&found.ipv6.postrouting[4], false),
            "-A FLANNEL-POSTRTG -s fd00:22::/48 ! -d ff00::/8 -m comment --comment \
             \"flanneld masq\" -j MASQUERADE"
        );
    }

    fn script(chain: Chain, saved: &str, adopt: bool) -> Option<String> {
        chain.script(&Found::read(saved, chain), &lines(chain, &ipv4().ipv4), adopt)
    }

    const FORWARDED: &str = "-A FLANNEL-FWD -s 172.22.0.0/16 -m comment --comment \
         \"flanneld forward\" -j ACCEPT\n-A FLANNEL-FWD -d 172.22.0.0/16 -m comment --comment \
         \"flanneld forward\" -j ACCEPT\n";
    const JUMP: &str = "FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";

    #[test]
    fn an_empty_table_gets_all_and_a_right_one_nothing() {
        let wanted = format!("*filter\n:FLANNEL-FWD - [0:0]\n{FORWARDED}-A {JUMP}COMMIT\n");
        let empty = "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n";
        assert_eq!(script(FORWARD, empty, false).as_deref(), Some(wanted.as_str()));
        let right = format!(
            "*filter\n:FORWARD ACCEPT [1:2]\n:FLANNEL-FWD - [3:4]\n-A FORWARD -i x -j DROP\n\
             -A {JUMP}-A FORWARD -j KUBE\n{FORWARDED}COMMIT\n"
        );
        assert_eq!(script(FORWARD, &right, true), None);
        let twice = right.replace("-A FORWARD -j KUBE\n", &format!("-A {JUMP}"));
        let wanted = format!("*filter\n-D {JUMP}-D {JUMP}-A {JUMP}COMMIT\n");
        assert_eq!(script(FORWARD, &twice, false).as_deref(), Some(wanted.as_str()));
    }

    /// An appended jump would be reached by nobody, as on hosts whose FORWARD ends in a REJECT.
    #[test]
    fn the_jump_comes_before_what_lets_nobody_pass() {
        let reject = "-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n";
        let saved = format!("*filter\n-A FORWARD -i x -j DROP\n{reject}COMMIT\n");
        let found = script(FORWARD, &saved, false).unwrap();
        assert!(found.contains("\n-I FORWARD 2 -m comment"), "{found}");
        let behind = format!(
            "*filter\n:FLANNEL-FWD - [0:0]\n-A FORWARD -i x -j DROP\n{reject}-A {JUMP}{FORWARDED}"
        );
        let found = script(FORWARD, &behind, false).unwrap();
        let jump = JUMP.trim_start_matches("FORWARD");
        assert_eq!(found, format!("*filter\n-D {JUMP}-I FORWARD 2{jump}COMMIT\n"));
    }

    #[test]
    fn what_earlier_flannels_left_goes_only_when_it_is_adopted() {
        let old = "-A FORWARD -s 10.1.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n";
        let saved = format!("*filter\n:FLANNEL-FWD - [0:0]\n{old}-A {JUMP}{FORWARDED}COMMIT\n");
        assert_eq!(script(FORWARD, &saved, false), None);
        let wanted = format!("*filter\n{}COMMIT\n", old.replacen("-A", "-D", 1));
        assert_eq!(script(FORWARD, &saved, true).as_deref(), Some(wanted.as_str()));
        let misspelt = "POSTROUTING -s 172.22.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flannel masq\" \
             -j MASQUERADE --random-fully\n";
        let found = script(MASQUERADE, &format!("*nat\n-A {misspelt}COMMIT\n"), true).unwrap();
        assert!(found.contains(&format!("-D {misspelt}")), "{found}");
    }

    #[test]
    fn nothing_wanted_leaves_nothing() {
        let saved = format!("*filter\n:FLANNEL-FWD - [0:0]\n-A {JUMP}{FORWARDED}COMMIT\n");
        let found = FORWARD.script(&Found::read(&saved, FORWARD), &[], true);
        let wanted = format!("*filter\n-D {JUMP}-F FLANNEL-FWD\n-X FLANNEL-FWD\nCOMMIT\n");
        assert_eq!(found, Some(wanted));
        assert_eq!(FORWARD.script(&Found::read("*filter\nCOMMIT\n", FORWARD), &[], true), None);
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(number("iptables v1.8.9 (nf_tables)"), Some((1, 8, 9)));
        assert_eq!(number("iptables v1.4.21"), Some((1, 4, 21)));
        assert_eq!(number("garbage"), None);
    }
}
