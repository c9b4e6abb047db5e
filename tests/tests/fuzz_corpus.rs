//! What fuzzers have found interesting so far is replayed: nothing that ever failed may fail again.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use weft_tests::fuzz::TARGETS;

#[test]
fn every_input_of_every_corpus_holds() -> Result<()> {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in TARGETS {
        let directory = corpora.join(name);
        let entries = fs::read_dir(&directory)
            .with_context(|| format!("no corpus in {}", directory.display()))?;
        let mut count = 0;
        for entry in entries {
            let path = entry?.path();
            // The name of the input that fails is in the test's output.
            println!("{}", path.display());
            target(&fs::read(&path)?);
            count += 1;
        }
        assert!(count >= 10, "{name} has only {count} inputs");
    }
    Ok(())
}
