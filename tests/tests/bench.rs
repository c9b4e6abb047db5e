//! A benchmark run measures what it says, and writes its report.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use weft_benches::report::Report;
use weft_tests::program;

#[test]
fn a_short_run_has_its_figures() -> Result<()> {
    let out = tempfile::tempdir()?;
    let output = Command::new(program("weft-bench")?)
        .args(["run", "--quick", "--mode=wire", "--repeats=1"])
        .arg("--subject=host-gw,weft-host-gw,weft-vxlan,weft-uring")
        .args(["--millis=200", "--out"])
        .arg(out.path())
        .output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Report =
        serde_json::from_str(&fs::read_to_string(out.path().join("report.json"))?)?;
    assert_eq!(report.samples.len(), 4);
    for sample in &report.samples {
        for name in ["tcp1_gbit", "tcp4_gbit", "udp64_flood_kpps", "rtt_p50_us", "paced_cpus"] {
            let value = sample.figures.get(name).with_context(|| format!("no {name}"))?;
            assert!(*value > 0.0, "{name} of {:?} is {value}", sample.subject);
        }
    }
    assert!(fs::read_to_string(out.path().join("report.html"))?.contains("<svg"));
    Ok(())
}
