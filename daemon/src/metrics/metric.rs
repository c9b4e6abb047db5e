//! The form of metrics: names with samples, and how OpenMetrics writes them.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// What has one name.
#[derive(Debug)]
pub(super) struct Metric {
    /// Without the prefix, and without what the format puts behind it.
    pub(super) name: &'static str,
    /// The names of the labels that each sample has.
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
    pub(super) kind: MetricType,
    pub(super) samples: Vec<Sample>,
}

#[derive(Debug)]
pub(super) struct Sample {
    pub(super) labels: Vec<(&'static str, String)>,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Gauge(f64),
    Counter(u64),
    Seconds(f64),
    Info,
    Histogram { buckets: Vec<(f64, u64)>, sum: f64 },
}

#[derive(Debug)]
pub(super) struct Metrics(pub(super) Vec<Metric>);

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in &self.0 {
            let Metric { name, labels, help, kind, samples } = metric;
            debug_assert!(samples.iter().all(|sample| sample.has(labels)), "{metric:?}");
            let mut encoder = encoder.encode_descriptor(name, help, None, *kind)?;
            for sample in samples {
                sample.encode(&mut encoder)?;
            }
        }
        Ok(())
    }
}

impl Sample {
    /// Whether its labels are just these.
    fn has(&self, labels: &[&str]) -> bool {
        self.labels.iter().map(|(name, _)| *name).eq(labels.iter().copied())
    }

    fn encode(&self, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        let labels: &[(&str, String)] = &self.labels;
        if labels.is_empty() || matches!(self.value, Value::Info) {
            return self.value.encode(encoder, labels);
        }
        self.value.encode(&mut encoder.encode_family(&labels)?, labels)
    }
}

impl Value {
    /// `labels` is all that an info has to say.
    fn encode(
        &self,
        encoder: &mut MetricEncoder<'_>,
        labels: &[(&'static str, String)],
    ) -> fmt::Result {
        match self {
            Self::Gauge(value) => encoder.encode_gauge(value),
            Self::Counter(count) => encoder.encode_counter::<NoLabelSet, _, u64>(count, None),
            Self::Seconds(seconds) => encoder.encode_counter::<NoLabelSet, _, u64>(seconds, None),
            Self::Histogram { buckets, sum } => {
                let count = buckets.iter().map(|(_, count)| count).sum();
                encoder.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)
            }
            Self::Info => encoder.encode_info(&labels),
        }
    }
}

pub(super) fn gauge(
    name: &'static str,
    help: &'static str,
    value: impl IntoIterator<Item = f64>,
) -> Metric {
    gauges(name, &[], help, value.into_iter().map(|value| gauged(&[], value)).collect())
}

pub(super) fn gauges(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
    samples: Vec<Sample>,
) -> Metric {
    Metric { name, labels, help, kind: MetricType::Gauge, samples }
}

pub(super) fn gauged(labels: &[(&'static str, &str)], value: f64) -> Sample {
    Sample { labels: owned(labels), value: Value::Gauge(value) }
}

/// What its one label says is all there is to it.
pub(super) fn info(
    name: &'static str,
    label: &'static [&'static str; 1],
    help: &'static str,
    value: Option<&str>,
) -> Metric {
    let sample = |value| Sample { labels: owned(&[(label[0], value)]), value: Value::Info };
    let samples = value.map(sample).into_iter().collect();
    Metric { name, labels: label, help, kind: MetricType::Info, samples }
}

pub(super) fn counter(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
    samples: Vec<Sample>,
) -> Metric {
    Metric { name, labels, help, kind: MetricType::Counter, samples }
}

pub(super) fn counted(labels: &[(&'static str, &str)], count: u64) -> Sample {
    Sample { labels: owned(labels), value: Value::Counter(count) }
}

fn owned(labels: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
    labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}
