//! Metrics as tables: name, kind and help are said once, beside the figure. In: figures. Out: families of samples, which
//! [`super::page`] writes and the documentation lists. The unit is the end of the name.

/// What may become of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)] // written as in the tables
pub enum Kind {
    /// Only grows.
    counter,
    /// Goes up and down.
    gauge,
    /// Durations, in buckets.
    histogram,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::counter => "counter",
            Kind::gauge => "gauge",
            Kind::histogram => "histogram",
        }
    }
}

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Count,
    Bytes,
    /// Held in microseconds, shown in seconds.
    Seconds,
    /// Of two metrics that are older than the rule; new ones are in seconds.
    Microseconds,
}

/// All that there is to say about a metric.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Without the `_total` of counters.
    pub name: &'static str,
    pub kind: Kind,
    /// What it means, and what to do when it is bad.
    pub help: &'static str,
    pub labels: &'static [&'static str],
}

impl About {
    pub fn unit(&self) -> Unit {
        if self.name.ends_with("_bytes") {
            Unit::Bytes
        } else if self.name.ends_with("_seconds") {
            Unit::Seconds
        } else if self.name.contains("_microseconds") {
            Unit::Microseconds
        } else {
            Unit::Count
        }
    }

    /// As a reader of Prometheus writes it.
    pub fn full_name(&self) -> String {
        match self.kind {
            Kind::counter => format!("{}_total", self.name),
            _ => self.name.to_owned(),
        }
    }
}

/// A figure of a `T`, and what there is to say about it.
pub struct Row<T: 'static> {
    pub about: About,
    pub get: fn(&T) -> u64,
}

/// A table of [`Row`]s: `/// help`, then `kind "name" => |figures| number;`.
#[macro_export]
macro_rules! rows {
    ($of:ty, $labels:expr; $( $(#[doc = $help:literal])+ $kind:ident $name:literal => $get:expr; )*) => {
        &[ $( $crate::observe::Row::<$of> {
            about: $crate::observe::About {
                name: $name,
                kind: $crate::observe::Kind::$kind,
                help: concat!($($help),+),
                labels: $labels,
            },
            get: $get,
        }, )* ]
    };
}

/// Names and values of labels.
pub type Labels = Vec<(&'static str, String)>;

/// A metric with its samples.
pub struct Family {
    pub about: About,
    pub samples: Vec<(Labels, Value)>,
}

pub enum Value {
    /// In the unit of [`About::unit`]; seconds in microseconds.
    Number(u64),
    /// `counts[n]` of them took at most [`super::BUCKETS_US`]`[n]` and more than the bound before; the last counts the rest.
    Durations { sum_us: u64, counts: Vec<u64> },
}

/// One family for each row, with a sample for each of `all`.
pub fn families<'a, T: 'static>(
    rows: &'static [Row<T>],
    all: impl Iterator<Item = (Labels, &'a T)>,
) -> Vec<Family> {
    let all: Vec<(Labels, &T)> = all.collect();
    rows.iter()
        .map(|row| Family {
            about: row.about,
            samples: all
                .iter()
                .map(|(labels, figures)| (labels.clone(), Value::Number((row.get)(figures))))
                .collect(),
        })
        .collect()
}
