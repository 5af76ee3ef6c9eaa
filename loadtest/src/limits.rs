//! `--fail-if`: limits that a run must keep, as comparisons of its figures.
//!
//! ```text
//! limit = term ( ">" | ">=" | "<" | "<=" ) term
//! term  = number [ "us" | "ms" | "s" ]             150us, 2ms, 0.5
//!       | number "*" term                          3 * live_quiet.p99
//!       | ( "max" | "min" ) "(" term { "," term } ")"
//!       | name                                     failed, logins_per_s: a key of the JSON document
//!       | name "." ( "p" number | "max" | "mean" | "count" )
//! ```
//!
//! A name with a dot is a histogram (its key in the JSON document without `_ms`) or an object of figures there. Times of
//! histograms want a unit on the other side. In: the expression. Out: [`Limit`], which asks [`Figures`] after the run.

use std::fmt;

/// Where the figures of a run are found.
pub trait Figures {
    fn figure(&self, name: &str) -> Option<f64>;
    /// A member of an object of figures, or a statistic of a histogram.
    fn statistic(&self, name: &str, statistic: &str) -> Option<Value>;
    /// What there is, for who misspelt it.
    fn names(&self) -> Vec<String>;
}

/// A figure; times are in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value {
    pub number: f64,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Number,
    Time,
}

/// A comparison; the run has failed if it is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    text: String,
    left: Term,
    comparison: Comparison,
    right: Term,
}

#[derive(Clone, Debug, PartialEq)]
enum Term {
    Value(Value),
    Times(f64, Box<Term>),
    Extreme { largest: bool, of: Vec<Term> },
    Name(String),
    Statistic(String, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

/// What became of a limit.
pub struct Verdict {
    pub held: bool,
    pub left: Value,
    pub right: Value,
}

impl std::str::FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Limit, String> {
        let mut parser = Parser { rest: text.trim() };
        let left = parser.term()?;
        let comparison = parser.comparison()?;
        let right = parser.term()?;
        if !parser.rest.is_empty() {
            return Err(format!("{:?} is too much", parser.rest));
        }
        let (text, limit) = (text.trim().to_owned(), (left, comparison, right));
        Ok(Limit {
            text,
            left: limit.0,
            comparison: limit.1,
            right: limit.2,
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Number => write!(out, "{:.4}", self.number),
            Kind::Time => write!(out, "{:.3} ms", self.number),
        }
    }
}

impl Limit {
    /// Compares. An error: a figure that this run does not have, or a time against a bare number.
    pub fn check(&self, figures: &dyn Figures) -> Result<Verdict, String> {
        let (left, right) = (self.left.value(figures)?, self.right.value(figures)?);
        if left.kind != right.kind {
            return Err(format!(
                "--fail-if {:?}: a time is compared with a number: give it a unit (us, ms, s), or none where the figure has none",
                self.text
            ));
        }
        // a figure that is not a number (a quotient of nothing) keeps no limit
        let broken = match self.comparison {
            Comparison::Greater => left.number > right.number,
            Comparison::GreaterOrEqual => left.number >= right.number,
            Comparison::Less => left.number < right.number,
            Comparison::LessOrEqual => left.number <= right.number,
        } || left.number.is_nan()
            || right.number.is_nan();
        Ok(Verdict {
            held: !broken,
            left,
            right,
        })
    }
}

impl Term {
    fn value(&self, figures: &dyn Figures) -> Result<Value, String> {
        let missing = |name: &str| {
            let names = figures.names().join(", ");
            format!("--fail-if: this run has no figure {name}; it has: {names}")
        };
        match self {
            Term::Value(value) => Ok(*value),
            Term::Times(factor, term) => {
                let value = term.value(figures)?;
                Ok(Value {
                    number: value.number * factor,
                    ..value
                })
            }
            Term::Name(name) => {
                let number = figures.figure(name).ok_or_else(|| missing(name))?;
                Ok(Value {
                    number,
                    kind: Kind::Number,
                })
            }
            Term::Statistic(name, statistic) => figures
                .statistic(name, statistic)
                .ok_or_else(|| missing(&format!("{name}.{statistic}"))),
            Term::Extreme { largest, of } => {
                let values: Vec<_> = of
                    .iter()
                    .map(|term| term.value(figures))
                    .collect::<Result<_, _>>()?;
                if values.iter().any(|value| value.kind != values[0].kind) {
                    return Err("--fail-if: max and min want all times or all numbers".into());
                }
                let numbers = values.iter().map(|value| value.number);
                let number = match largest {
                    true => numbers.fold(f64::NEG_INFINITY, f64::max),
                    false => numbers.fold(f64::INFINITY, f64::min),
                };
                Ok(Value {
                    number,
                    kind: values[0].kind,
                })
            }
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn comparison(&mut self) -> Result<Comparison, String> {
        let comparisons = [
            (">=", Comparison::GreaterOrEqual),
            ("<=", Comparison::LessOrEqual),
            (">", Comparison::Greater),
            ("<", Comparison::Less),
        ];
        comparisons
            .into_iter()
            .find(|(sign, _)| self.accept(sign))
            .map(|(_, comparison)| comparison)
            .ok_or_else(|| format!("one of > >= < <= is expected at {:?}", self.rest))
    }

    fn term(&mut self) -> Result<Term, String> {
        if self
            .rest
            .starts_with(|first: char| first.is_ascii_digit() || first == '.')
        {
            return self.number_or_product();
        }
        let name = self.take(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
        if name.is_empty() {
            return Err(format!(
                "a figure or a number is expected at {:?}",
                self.rest
            ));
        }
        if matches!(name, "max" | "min") && self.accept("(") {
            return self.extreme(name == "max");
        }
        let name = name.to_owned();
        if !self.accept(".") {
            self.skip_space();
            return Ok(Term::Name(name));
        }
        let statistic =
            self.take(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_'));
        let statistic = statistic.to_owned();
        self.skip_space();
        if statistic.is_empty() {
            return Err(format!("{name}. wants p50, p99, p99.9, max, mean or count"));
        }
        Ok(Term::Statistic(name, statistic))
    }

    fn number_or_product(&mut self) -> Result<Term, String> {
        let digits = self.take(|byte| byte.is_ascii_digit() || byte == b'.');
        let number: f64 = digits
            .parse()
            .map_err(|_| format!("{digits:?} is not a number"))?;
        let unit = self.take(|byte| byte.is_ascii_alphabetic());
        let scale = match unit {
            "" => None,
            "us" => Some(1e-3),
            "ms" => Some(1.0),
            "s" => Some(1e3),
            other => return Err(format!("{other:?} is not a unit: us, ms or s")),
        };
        self.skip_space();
        if scale.is_none() && self.accept("*") {
            return Ok(Term::Times(number, Box::new(self.term()?)));
        }
        Ok(Term::Value(Value {
            number: number * scale.unwrap_or(1.0),
            kind: if scale.is_some() {
                Kind::Time
            } else {
                Kind::Number
            },
        }))
    }

    fn extreme(&mut self, largest: bool) -> Result<Term, String> {
        let mut of = vec![self.term()?];
        while self.accept(",") {
            of.push(self.term()?);
        }
        if !self.accept(")") {
            return Err(format!("a ) is expected at {:?}", self.rest));
        }
        Ok(Term::Extreme { largest, of })
    }

    /// Takes a sign with the space behind it, if it is next.
    fn accept(&mut self, sign: &str) -> bool {
        let Some(rest) = self.rest.strip_prefix(sign) else {
            return false;
        };
        self.rest = rest.trim_start();
        true
    }

    fn take(&mut self, accepts: impl Fn(u8) -> bool) -> &'a str {
        let end = self.rest.bytes().position(|byte| !accepts(byte));
        let (taken, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        taken
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Run;

    impl Figures for Run {
        fn figure(&self, name: &str) -> Option<f64> {
            (name == "failed").then_some(3.0)
        }

        fn statistic(&self, name: &str, statistic: &str) -> Option<Value> {
            let (number, kind) = match (name, statistic) {
                ("chat", "p99") => (2.5, Kind::Time),
                ("chat", "p99.9") => (9.0, Kind::Time),
                ("quiet", "p99") => (1.0, Kind::Time),
                ("ratio", "p99") => (2.5, Kind::Number),
                ("nothing", "mean") => (f64::NAN, Kind::Time),
                _ => return None,
            };
            Some(Value { number, kind })
        }

        fn names(&self) -> Vec<String> {
            vec!["chat".into(), "failed".into()]
        }
    }

    fn held(text: &str) -> bool {
        text.parse::<Limit>().unwrap().check(&Run).unwrap().held
    }

    #[test]
    fn a_limit_is_kept_or_broken() {
        for (text, expected) in [
            ("chat.p99>2ms", false),
            ("chat.p99 > 2.5ms", true),
            ("chat.p99>=2500us", false),
            ("chat.p99.9<0.01s", false),
            ("chat.p99.9 <= 8ms", true),
            ("failed>0", false),
            ("failed > 3", true),
            ("ratio.p99>3", true),
            ("chat.p99 > max(3*quiet.p99, 1ms)", true),
            ("chat.p99 > max( 2 * quiet.p99 , 1ms )", false),
            ("chat.p99 > min(2*quiet.p99, 10ms)", false),
            ("2*chat.p99 < 5ms", true),
            ("nothing.mean > 1ms", false),
        ] {
            assert_eq!(held(text), expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_a_limit_is_told_before_the_run() {
        for (text, said) in [
            ("chat.p99", "> >= < <="),
            ("chat.p99>2m", "not a unit"),
            ("chat.>2ms", "wants p50"),
            (">2ms", "figure or a number"),
            ("chat.p99>2ms or", "too much"),
            ("chat.p99>max(1ms", "a )"),
            ("chat.p99>1.2.3ms", "not a number"),
        ] {
            let error = text.parse::<Limit>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_figure_that_is_not_there_and_a_missing_unit_are_errors() {
        let error = |text: &str| text.parse::<Limit>().unwrap().check(&Run).err().unwrap();
        assert!(error("caht.p99>2ms").ends_with("no figure caht.p99; it has: chat, failed"));
        assert!(error("lost>0").contains("no figure lost"));
        assert!(error("chat.p99>2").contains("unit"));
        assert!(error("failed>2ms").contains("unit"));
    }
}
