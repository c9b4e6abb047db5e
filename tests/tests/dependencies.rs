//! Holds ARCHITECTURE.md to its word: which crate of the workspace may depend on which.

use std::collections::BTreeMap;

use cargo_metadata::{DependencyKind, MetadataCommand};

#[test]
fn crates_depend_as_the_architecture_says() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("weft-engine", &[][..]),
        ("weft-control", &[]),
        ("weft-backends", &["weft-engine", "weft-control"]),
        ("weft-daemon", &["weft-backends", "weft-control"]),
        ("weft-benches", &["weft-engine", "weft-backends", "weft-control", "weft-daemon"]),
        (
            "weft-tests",
            &["weft-engine", "weft-backends", "weft-control", "weft-daemon", "weft-benches"],
        ),
    ]);
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    let members = metadata.workspace_packages();
    let names: Vec<&str> = members.iter().map(|package| package.name.as_str()).collect();
    assert_eq!(
        names.len(),
        allowed.len(),
        "a crate that the architecture does not know: {names:?}"
    );

    for package in &members {
        let ours = package
            .dependencies
            .iter()
            .filter(|it| it.kind != DependencyKind::Development)
            .filter(|it| names.contains(&it.name.as_str()));
        for dependency in ours {
            let name = package.name.as_str();
            assert!(
                allowed[name].contains(&dependency.name.as_str()),
                "{name} must not depend on {}",
                dependency.name
            );
        }
    }
}

/// The pure rooms of the engine import no ring, no device and no socket.
#[test]
fn the_pure_parts_of_the_engine_stay_pure() {
    let source = weft_tests::repository().join("engine/src");
    for file in [
        "packet.rs",
        "routes.rs",
        "guard.rs",
        "icmp.rs",
        "stats.rs",
        "batch.rs",
        "ecn.rs",
        "features.rs",
        "offload/segment.rs",
        "offload/coalesce.rs",
    ] {
        let text = std::fs::read_to_string(source.join(file)).unwrap();
        for impure in ["crate::io", "crate::sys", "crate::tun", "crate::udp", "io_uring", "socket2"]
        {
            assert!(!text.contains(impure), "engine/src/{file} imports {impure}");
        }
    }
}
