//! The report of a run as one HTML page that needs nothing else: no script, no style sheet, no picture from anywhere.
//!
//! In: what the [`Report`](crate::report::Report) holds. Out: the page: verdict, table, latency over time with its marks, throughput,
//! percentile curves, the server's own histograms by shard, and the JSON document.

use std::fmt::Write;

use crate::metrics::ShardHistogram;
use crate::plot::{Band, Plot, Scale, Series, escape};
use crate::report::Histogram;
use crate::timeline::{Kind, Point};

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2430;--paper:#fff;--soft:#5b6675;--line:#dfe4ea;--band:#8a94a611;--strong:#d55e0022;--bad:#b3261e;--good:#1b7f4b}\
@media(prefers-color-scheme:dark){:root{--ink:#e5e9ef;--paper:#14181f;--soft:#9aa5b4;--line:#2c3440;--band:#8a94a622;--strong:#d55e0044;--bad:#ff8a80;--good:#6fd6a0}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}p.sub{color:var(--soft);margin:.2rem 0 1.2rem;overflow-wrap:anywhere}\
table{border-collapse:collapse;width:100%}td{padding:.22rem .8rem .22rem 0;border-bottom:1px solid var(--line);vertical-align:top}\
td:first-child{white-space:pre-wrap;color:var(--soft);width:38%}td+td{font-variant-numeric:tabular-nums}\
.bad{color:var(--bad);font-weight:600}.good{color:var(--good);font-weight:600}\
svg{width:100%;height:auto;margin:.6rem 0 1.2rem}svg text{fill:var(--ink);font:12px system-ui,sans-serif}\
svg .title{font-size:14px;font-weight:600}svg .tick,svg .note{fill:var(--soft)}svg .note{font-size:11px}svg .label{fill:var(--soft)}\
svg .grid{stroke:var(--line);stroke-width:1}svg .band{fill:var(--band)}svg .strong{fill:var(--strong)}\
pre{overflow:auto;font-size:12px;border:1px solid var(--line);padding:.8rem}";

/// Quantiles of a curve: ten for each digit.
const CURVE_DIGITS: usize = 6;

/// What a page is made of.
pub struct Page<'a> {
    pub scenario: &'a str,
    pub command: String,
    pub when: String,
    pub rows: &'a [(String, String)],
    pub sentences: &'a [String],
    pub failed: &'a [String],
    /// What was checked, and what it was.
    pub limits: &'a [(bool, String)],
    pub histograms: &'a [(String, String, Histogram)],
    /// By fleet and kind.
    pub points: Vec<(Kind, &'a [Point])>,
    pub interval_s: f64,
    pub bands: &'a [Band],
    /// Readings of the server: label with unit, (second, value).
    pub samples: &'a [(String, Vec<(f64, f64)>)],
    pub shards: &'a [ShardHistogram],
    pub json: String,
}

impl Page<'_> {
    pub fn html(&self) -> String {
        let mut html = String::new();
        let mut put = |text: &str| html.push_str(text);
        put("<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>");
        put("<meta name='viewport' content='width=device-width,initial-scale=1'>");
        put(&format!(
            "<title>loadtest {}</title><style>{STYLE}</style></head><body>\n",
            escape(self.scenario)
        ));
        put(&format!(
            "<h1>loadtest {}</h1><p class='sub'>{}<br><code>{}</code></p>\n",
            escape(self.scenario),
            escape(&self.when),
            escape(&self.command)
        ));
        put(&self.verdict());
        for plot in self.plots_over_time() {
            put(&plot.svg());
        }
        let curves = self.curves();
        if !curves.is_empty() {
            put("<h2>Percentiles</h2>\n");
            put(&curves.svg());
        }
        put("<h2>Figures</h2>\n<table>");
        for (label, value) in self.rows {
            put(&format!(
                "<tr><td>{}</td><td>{}</td></tr>\n",
                escape(label),
                escape(value)
            ));
        }
        put("</table>\n");
        for sentence in self.sentences {
            put(&format!("<p>{}</p>\n", escape(sentence)));
        }
        put(&self.shard_plots());
        put(&format!(
            "<h2>JSON</h2><details><summary>the same figures for programs</summary><pre>{}</pre></details>\n",
            escape(&self.json)
        ));
        put("</body></html>\n");
        html
    }

    fn verdict(&self) -> String {
        let mut html = String::new();
        let broken = self.limits.iter().any(|(held, _)| !held);
        let (class, text) = if self.failed.is_empty() && !broken {
            ("good", "All went well.")
        } else {
            ("bad", "The run failed.")
        };
        let _ = writeln!(html, "<p class='{class}'>{text}</p>");
        if !self.failed.is_empty() || !self.limits.is_empty() {
            html.push_str("<ul>");
            for (held, text) in self.limits {
                let (class, word) = if *held {
                    ("good", "held")
                } else {
                    ("bad", "broken")
                };
                let _ = writeln!(
                    html,
                    "<li><span class='{class}'>{word}</span> {}</li>",
                    escape(text)
                );
            }
            for sentence in self.failed {
                let _ = writeln!(html, "<li class='bad'>{}</li>", escape(sentence));
            }
            html.push_str("</ul>\n");
        }
        html
    }

    fn plots_over_time(&self) -> Vec<Plot> {
        let mut plots = Vec::new();
        let bands = self.bands.to_vec();
        // what was before the first mark is preparation
        let start = bands
            .first()
            .map_or(0.0, |band| band.from - self.interval_s);
        let end = bands.last().map_or(f64::INFINITY, |band| band.to);
        let shown = |points: &[Point], value: &dyn Fn(&Point) -> f64| -> Vec<(f64, f64)> {
            points
                .iter()
                .filter(|point| point.second >= start)
                .map(|point| (point.second + self.interval_s / 2.0, value(point)))
                .collect()
        };
        for (kind, points) in &self.points {
            let series = |label: &str, value: fn(&Point) -> u64, dashed, colour| Series {
                label: label.into(),
                points: shown(points, &|point| value(point) as f64 / 1e6),
                dashed,
                colour,
            };
            plots.push(Plot {
                title: format!("{}: latency over time", title(*kind)),
                x_label: "seconds since the start of the generator",
                y_label: "milliseconds",
                x_scale: Scale::Linear,
                y_scale: Scale::Log,
                series: vec![
                    series("median", |point| point.p50, false, 0),
                    series("p99", |point| point.p99, false, 1),
                    series("maximum", |point| point.max, true, 6),
                ],
                bands: bands.clone(),
            });
        }
        plots.push(Plot {
            title: "throughput over time".into(),
            x_label: "seconds since the start of the generator",
            y_label: "per second",
            x_scale: Scale::Linear,
            y_scale: Scale::Linear,
            series: self
                .points
                .iter()
                .filter(|(kind, _)| *kind != Kind::Lag)
                .enumerate()
                .map(|(number, (kind, points))| Series {
                    label: title(*kind).into(),
                    // an interval that was not over says nothing about a rate
                    points: shown(points, &|point| point.count as f64 / self.interval_s)
                        .into_iter()
                        .filter(|(middle, _)| middle + self.interval_s / 2.0 <= end)
                        .collect(),
                    dashed: false,
                    colour: number,
                })
                .collect(),
            bands: bands.clone(),
        });
        for (label, points) in self.samples {
            plots.push(Plot {
                title: label.clone(),
                x_label: "seconds since the start of the generator",
                y_label: "",
                x_scale: Scale::Linear,
                y_scale: Scale::Linear,
                series: vec![Series {
                    label: label.clone(),
                    points: points.clone(),
                    dashed: false,
                    colour: 0,
                }],
                bands: bands.clone(),
            });
        }
        for plot in &mut plots {
            plot.series.retain(|series| series.points.len() > 1);
        }
        plots.retain(|plot| !plot.is_empty());
        plots
    }

    fn curves(&self) -> Plot {
        let series = self
            .histograms
            .iter()
            .filter(|(_, _, histogram)| histogram.len() > 1)
            .enumerate()
            .map(|(number, (_, label, histogram))| Series {
                label: label.clone(),
                points: curve(histogram),
                dashed: label.contains("lag") || label.contains("turns"),
                colour: number,
            });
        Plot {
            title: "latency by percentile".into(),
            x_label: "percentile",
            y_label: "milliseconds",
            x_scale: Scale::Percentile,
            y_scale: Scale::Log,
            series: series.collect(),
            bands: Vec::new(),
        }
    }

    fn shard_plots(&self) -> String {
        let mut names: Vec<&String> = self.shards.iter().map(|shard| &shard.name).collect();
        names.dedup();
        let plots: Vec<String> = names
            .into_iter()
            .map(|name| {
                let of_name = self.shards.iter().filter(|shard| shard.name == *name);
                Plot {
                    title: name.clone(),
                    x_label: "percentile",
                    y_label: "upper bound of the bucket",
                    x_scale: Scale::Percentile,
                    y_scale: Scale::Log,
                    series: of_name
                        .enumerate()
                        .map(|(number, shard)| Series {
                            label: shard.label(),
                            points: shard.curve(),
                            dashed: false,
                            colour: number,
                        })
                        .collect(),
                    bands: Vec::new(),
                }
            })
            .filter(|plot| !plot.is_empty())
            .map(|plot| plot.svg())
            .collect();
        if plots.is_empty() {
            return String::new();
        }
        format!(
            "<h2>The server's own histograms, by shard</h2>\n<p>From its metrics, grown during the run.</p>\n{}",
            plots.concat()
        )
    }
}

fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Login => "logins",
        Kind::Logout => "log-outs",
        Kind::Registration => "registrations",
        Kind::Message => "messages",
        Kind::Acknowledgement => "acknowledgements",
        Kind::Presence => "presence",
        Kind::Resumption => "resumptions",
        Kind::Page => "page of an archive",
        Kind::Lag => "the generator's own lag",
    }
}

/// (quantile, milliseconds), as far as there are values to tell.
fn curve(histogram: &Histogram) -> Vec<(f64, f64)> {
    let digits = (histogram.len() as f64).log10();
    (0..=CURVE_DIGITS * 10)
        .map(|step| step as f64 / 10.0)
        .take_while(|step| *step <= digits)
        .map(|step| 1.0 - 10f64.powf(-step))
        .map(|quantile| (quantile, histogram.value_at_quantile(quantile) as f64 / 1e6))
        .collect()
}
