//! How commands of `weft` write their results.

use clap::ValueEnum;

/// For people, or for programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

/// Three digits and a unit.
pub(crate) fn short(number: f64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match UNITS.into_iter().find(|(unit, _)| number >= *unit) {
        Some((unit, letter)) => {
            let digits = number / unit;
            let places = usize::from(digits < 10.0) + usize::from(digits < 100.0);
            format!("{digits:.places$}{letter}")
        }
        None => format!("{number:.0}"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let written = [0.0, 999.4, 1000.0, 12_345.0, 999_900.0, 1.5e9].map(short);
        assert_eq!(written, ["0", "999", "1.00k", "12.3k", "1000k", "1.50G"]);
    }
}
