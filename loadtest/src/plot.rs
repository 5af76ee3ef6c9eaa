//! Line plots as inline SVG: what a page needs that must open without a network.
//!
//! In: series of points and bands to be shaded. Out: an `<svg>` element. An axis is linear, logarithmic (times), or one of
//! percentiles (as far apart as their distance from 100 % has digits).

use std::fmt::Write;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
const LEGEND_LINE: f64 = 18.0;
const LEGEND_ENTRY: f64 = 230.0;
/// Told apart by most people with a deficiency of colour vision (Okabe and Ito).
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Linear,
    Log,
    /// Of quantiles from 0 to below 1.
    Percentile,
}

pub struct Series {
    pub label: String,
    pub points: Vec<(f64, f64)>,
    pub dashed: bool,
    /// Series of the same number have the same colour.
    pub colour: usize,
}

/// A part of the x axis that is shaded.
#[derive(Clone, Debug)]
pub struct Band {
    pub from: f64,
    pub to: f64,
    pub label: String,
    pub strong: bool,
}

pub struct Plot {
    pub title: String,
    pub x_label: &'static str,
    pub y_label: &'static str,
    pub x_scale: Scale,
    pub y_scale: Scale,
    pub series: Vec<Series>,
    pub bands: Vec<Band>,
}

struct Axis {
    scale: Scale,
    /// After the scale's transformation.
    from: f64,
    to: f64,
}

impl Scale {
    fn transform(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Log => value.max(1e-6).log10(),
            Scale::Percentile => -(1.0 - value.min(1.0 - 1e-7)).log10(),
        }
    }
}

impl Axis {
    fn new(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let (mut from, mut to) = values
            .filter(|value| value.is_finite())
            .map(|value| scale.transform(value))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(from, to), value| {
                (from.min(value), to.max(value))
            });
        if from > to {
            (from, to) = (0.0, 1.0);
        }
        match scale {
            Scale::Log => (from, to) = (from.floor(), to.ceil().max(from.floor() + 1.0)),
            Scale::Percentile => (from, to) = (0.0, to.max(1.0)),
            Scale::Linear if to - from < 1e-9 => (from, to) = (from.min(0.0), to + 1.0),
            Scale::Linear => {}
        }
        Axis { scale, from, to }
    }

    fn starting_at_zero(mut self) -> Axis {
        if self.scale == Scale::Linear {
            self.from = self.from.min(0.0);
            self.to *= 1.05;
        }
        self
    }

    /// From 0 to 1.
    fn place(&self, value: f64) -> f64 {
        (self.scale.transform(value) - self.from) / (self.to - self.from)
    }

    /// Values and what they are called.
    fn ticks(&self) -> Vec<(f64, String)> {
        match self.scale {
            Scale::Linear => {
                let rough = (self.to - self.from) / 8.0;
                let power = 10f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0]
                    .into_iter()
                    .map(|factor| factor * power)
                    .find(|step| *step >= rough)
                    .unwrap_or(10.0 * power);
                let first = (self.from / step).ceil() as i64;
                let last = (self.to / step).floor() as i64;
                (first..=last)
                    .map(|number| number as f64 * step)
                    .map(|value| (value, short(value)))
                    .collect()
            }
            Scale::Log => (self.from as i32..=self.to as i32)
                .map(|power| 10f64.powi(power))
                .map(|value| (value, short(value)))
                .collect(),
            Scale::Percentile => [0.0, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999]
                .into_iter()
                .filter(|quantile| self.scale.transform(*quantile) <= self.to + 1e-9)
                .map(|quantile| (quantile, format!("{} %", short(quantile * 100.0))))
                .collect(),
        }
    }
}

/// Without noise behind the point.
fn short(value: f64) -> String {
    let text = format!("{value:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0" } else { text }.to_owned()
}

/// For element content and attribute values.
pub fn escape(text: &str) -> String {
    crate::element::escape(text).into_owned()
}

impl Plot {
    pub fn is_empty(&self) -> bool {
        self.series.iter().all(|series| series.points.len() < 2)
    }

    pub fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let band_ends = self.bands.iter().flat_map(|band| [band.from, band.to]);
        let x = Axis::new(self.x_scale, points().map(|point| point.0).chain(band_ends));
        let y = Axis::new(self.y_scale, points().map(|point| point.1)).starting_at_zero();
        let per_line = ((WIDTH - LEFT - RIGHT) / LEGEND_ENTRY).floor() as usize;
        let legend_lines = self.series.len().div_ceil(per_line);
        let height = HEIGHT + legend_lines as f64 * LEGEND_LINE;
        let (plot_width, plot_height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let at_x = |value: f64| LEFT + x.place(value) * plot_width;
        let at_y = |value: f64| TOP + (1.0 - y.place(value)) * plot_height;
        let bottom = TOP + plot_height;

        let mut svg = String::new();
        let mut draw = |text: std::fmt::Arguments| {
            svg.write_fmt(text).expect("a string takes it");
            svg.push('\n');
        };
        draw(format_args!(
            "<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{}'>",
            escape(&self.title)
        ));
        draw(format_args!(
            "<text class='title' x='{LEFT}' y='18'>{}</text>",
            escape(&self.title)
        ));
        for band in &self.bands {
            let (from, to) = (at_x(band.from), at_x(band.to));
            let class = if band.strong { "band strong" } else { "band" };
            draw(format_args!(
                "<rect class='{class}' x='{from:.1}' y='{TOP}' width='{:.1}' height='{plot_height}'/>\
                 <text class='note' x='{:.1}' y='{:.1}'>{}</text>",
                (to - from).max(0.0),
                from + 4.0,
                TOP + 12.0,
                escape(&band.label)
            ));
        }
        for (value, name) in x.ticks() {
            let place = at_x(value);
            draw(format_args!(
                "<line class='grid' x1='{place:.1}' x2='{place:.1}' y1='{TOP}' y2='{bottom}'/>\
                 <text class='tick' text-anchor='middle' x='{place:.1}' y='{:.1}'>{name}</text>",
                bottom + 16.0
            ));
        }
        for (value, name) in y.ticks() {
            let place = at_y(value);
            draw(format_args!(
                "<line class='grid' x1='{LEFT}' x2='{:.1}' y1='{place:.1}' y2='{place:.1}'/>\
                 <text class='tick' text-anchor='end' x='{:.1}' y='{:.1}'>{name}</text>",
                LEFT + plot_width,
                LEFT - 6.0,
                place + 4.0
            ));
        }
        draw(format_args!(
            "<text class='label' text-anchor='middle' x='{:.1}' y='{:.1}'>{}</text>\
             <text class='label' text-anchor='middle' transform='translate(16 {:.1}) rotate(-90)'>{}</text>",
            LEFT + plot_width / 2.0,
            bottom + 36.0,
            self.x_label,
            TOP + plot_height / 2.0,
            self.y_label
        ));
        for (number, series) in self.series.iter().enumerate() {
            let colour = COLOURS[series.colour % COLOURS.len()];
            let dashes = if series.dashed {
                " stroke-dasharray='5 4'"
            } else {
                ""
            };
            let path: Vec<String> = series
                .points
                .iter()
                .filter(|(_, value)| value.is_finite())
                .map(|(key, value)| format!("{:.1},{:.1}", at_x(*key), at_y(*value)))
                .collect();
            draw(format_args!(
                "<polyline fill='none' stroke='{colour}' stroke-width='1.6'{dashes} points='{}'>\
                 <title>{}</title></polyline>",
                path.join(" "),
                escape(&series.label)
            ));
            let column = LEFT + (number % per_line) as f64 * LEGEND_ENTRY;
            let line = HEIGHT + (number / per_line) as f64 * LEGEND_LINE + 4.0;
            draw(format_args!(
                "<line stroke='{colour}' stroke-width='3'{dashes} x1='{column}' x2='{:.1}' y1='{line}' y2='{line}'/>\
                 <text class='tick' x='{:.1}' y='{:.1}'>{}</text>",
                column + 22.0,
                column + 28.0,
                line + 4.0,
                escape(&series.label)
            ));
        }
        svg.push_str("</svg>\n");
        svg
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(y_scale: Scale, points: Vec<(f64, f64)>) -> Plot {
        Plot {
            title: "<latency>".into(),
            x_label: "s",
            y_label: "ms",
            x_scale: Scale::Linear,
            y_scale,
            series: vec![Series {
                label: "p99".into(),
                points,
                dashed: false,
                colour: 0,
            }],
            bands: vec![Band {
                from: 1.0,
                to: 2.0,
                label: "storm".into(),
                strong: true,
            }],
        }
    }

    #[test]
    fn all_that_is_drawn_is_well_formed_and_inside_of_the_frame() {
        for (scale, points) in [
            (Scale::Log, vec![(0.0, 0.5), (1.0, 20.0), (2.0, 300.0)]),
            (Scale::Linear, vec![(0.0, 5.0), (3.0, 5.0)]),
            (Scale::Linear, vec![]),
            (Scale::Log, vec![(0.0, 0.0), (1.0, f64::NAN)]),
        ] {
            let svg = plot(scale, points).svg();
            assert!(svg.contains("&lt;latency&gt;") && !svg.contains("<latency>"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
            let points = svg.split("points='").nth(1).unwrap();
            for point in points.split('\'').next().unwrap().split_whitespace() {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!(
                    (LEFT..=WIDTH).contains(&x) && (TOP..=HEIGHT).contains(&y),
                    "{point}"
                );
            }
        }
    }

    #[test]
    fn percentiles_are_as_far_apart_as_their_digits() {
        let axis = Axis::new(Scale::Percentile, [0.0, 0.999].into_iter());
        let ticks: Vec<_> = axis.ticks().into_iter().map(|(_, name)| name).collect();
        assert_eq!(ticks, ["0 %", "90 %", "99 %", "99.9 %"]);
        assert!((axis.place(0.9) - 1.0 / 3.0).abs() < 1e-9);
        let axis = Axis::new(Scale::Linear, [0.0, 40.0].into_iter());
        assert_eq!(axis.ticks().len(), 9);
        assert_eq!(short(0.25), "0.25");
    }
}
