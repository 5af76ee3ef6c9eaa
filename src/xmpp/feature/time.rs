//! Entity time (XEP-0202): what time the server has. And the one place that writes and reads time stamps (XEP-0082).

use super::{Feature, Iq, IqRoute, NONE, Target};
use crate::xml::dom::Element;
use crate::xmpp::error::StanzaError;
use crate::xmpp::slice::Slice;

pub const NS: &str = "urn:xmpp:time";

pub static FEATURE: Feature = Feature {
    name: "Entity time",
    spec: "XEP-0202",
    version: "2.0",
    server: &[NS],
    iq: &[IqRoute {
        name: "time",
        ns: NS,
        target: Target::Server,
        handle: answer,
    }],
    ..NONE
};

fn answer(slice: &mut Slice, iq: Iq) {
    if iq.set {
        return slice.iq_error(&iq, &StanzaError::BAD_REQUEST);
    }
    // one time zone for all blades: where a blade stands is nobody's business
    let time = Element::new("time", NS)
        .child(Element::new("tzo", NS).text("+00:00"))
        .child(Element::new("utc", NS).text(stamp(slice.now.unix)));
    slice.iq_result(&iq, Some(time));
}

/// XEP-0082 DateTime in UTC, whole seconds: `YYYY-MM-DDThh:mm:ssZ`.
pub fn stamp(unix: u64) -> String {
    let (days, second) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The same with milliseconds: `YYYY-MM-DDThh:mm:ss.sssZ`.
pub fn stamp_ms(unix_ms: u64) -> String {
    let mut stamp = stamp(unix_ms / 1000);
    stamp.truncate(stamp.len() - 1);
    format!("{stamp}.{:03}Z", unix_ms % 1000)
}

/// Reads an XEP-0082 DateTime, `YYYY-MM-DDThh:mm:ss[.s…](Z|±hh:mm)`: milliseconds since 1970, rounded down, and whether that
/// is all that the text says. `None`: it is no such text, or no such time.
pub fn parse(text: &str) -> Option<(i64, bool)> {
    let (fixed, rest) = text.as_bytes().split_at_checked(19)?;
    let marks = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if marks.iter().any(|(at, mark)| fixed[*at] != *mark) {
        return None;
    }
    let (year, month, day) = (
        number(&fixed[..4])?,
        number(&fixed[5..7])?,
        number(&fixed[8..10])?,
    );
    let (hour, minute, second) = (
        number(&fixed[11..13])?,
        number(&fixed[14..16])?,
        number(&fixed[17..])?,
    );
    let in_range = (1..=12).contains(&month) && hour < 24 && minute < 60 && second < 60;
    if !in_range || !(1..=month_days(year, month)).contains(&day) {
        return None;
    }
    let (fraction, zone) = match rest.strip_prefix(b".") {
        Some(rest) => rest.split_at(rest.iter().take_while(|b| b.is_ascii_digit()).count()),
        None => (&b"0"[..], rest),
    };
    if fraction.is_empty() {
        return None;
    }
    let ms = (0..3).fold(0, |ms, at| {
        10 * ms + i64::from(fraction.get(at).map_or(0, |digit| digit - b'0'))
    });
    let exact = fraction.iter().skip(3).all(|digit| *digit == b'0');
    let ahead = match zone {
        b"Z" => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
            if hours > 14 || minutes > 59 {
                return None;
            }
            let minutes = 60 * hours + minutes;
            if *sign == b'+' { minutes } else { -minutes }
        }
        _ => return None,
    };
    let minutes = (24 * days(year, month, day) + hour) * 60 + minute - ahead;
    Some(((60 * minutes + second) * 1000 + ms, exact))
}

/// Digits and nothing else.
fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |n, digit| {
        digit
            .is_ascii_digit()
            .then(|| 10 * n + i64::from(digit - b'0'))
    })
}

fn month_days(year: i64, month: i64) -> i64 {
    let (next_year, next) = if month == 12 {
        (year + 1, 1)
    } else {
        (year, month + 1)
    };
    days(next_year, next, 1) - days(year, month, 1)
}

/// The inverse of [`civil`], for any year.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_era =
        365 * year_of_era + year_of_era / 4 - year_of_era / 100 + (153 * month + 2) / 5 + (day - 1);
    era * 146_097 + day_of_era - 719_468
}

/// Year, month and day of a count of days since 1970-01-01 (proleptic Gregorian calendar).
fn civil(days: u64) -> (u64, u64, u64) {
    // Years that begin in March put the leap day last; 400 of them are an era of 146,097 days, whatever the era. Day 0
    // of this count is 0000-03-01.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // March to July and August to December have the same lengths: 153 days in five months
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year_of_era + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_tells_its_time() {
        let mut w = crate::xmpp::testing::World::new(1);
        w.add("alice");
        let a = w.login("alice", "a");
        w.send(
            a,
            "<iq type='get' id='t' to='localhost'><time xmlns='urn:xmpp:time'/></iq>",
        );
        w.expect(a, &["<iq type='result' id='t' from='localhost' to='alice@localhost/a'><time xmlns='urn:xmpp:time'>\
            <tzo>+00:00</tzo><utc>2026-09-21T14:13:20Z</utc></time></iq>"]);
    }

    #[test]
    fn stamps_are_those_of_the_calendar() {
        assert_eq!(stamp(0), "1970-01-01T00:00:00Z");
        assert_eq!(stamp(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(stamp(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(stamp(1_166_551_115), "2006-12-19T17:58:35Z");
        assert_eq!(stamp(4_107_542_400), "2100-03-01T00:00:00Z");
        assert_eq!(stamp(4_107_542_399), "2100-02-28T23:59:59Z");
    }

    #[test]
    fn what_was_written_is_read_and_so_are_zones_and_fractions() {
        for ms in [0, 951_782_399_999, 951_782_400_000, 1_790_000_000_123] {
            assert_eq!(parse(&stamp_ms(ms)), Some((ms as i64, true)));
            assert_eq!(
                parse(&stamp(ms / 1000)),
                Some((ms as i64 / 1000 * 1000, true))
            );
        }
        let same = [
            "1969-07-21T02:56:15Z",
            "1969-07-20T21:56:15-05:00",
            "1969-07-21T16:56:15.000000+14:00",
        ];
        for text in same {
            assert_eq!(parse(text), Some((-14_159_025_000, true)), "{text}");
        }
        assert_eq!(parse("1970-01-01T00:00:00.1239Z"), Some((123, false)));
        assert_eq!(parse("1970-01-01T00:00:00.5Z"), Some((500, true)));
    }

    #[test]
    fn what_is_no_time_is_not_read() {
        for text in [
            "",
            "yesterday",
            "2010-06-07",
            "2010-06-07T00:00:00",
            "2010-06-07 00:00:00Z",
            "2010-06-07t00:00:00Z",
            "2010-06-07T00:00:00z",
            "2010-06-07T00:00:00.Z",
            "2010-06-07T00:00:00ZZ",
            "2010-06-07T00:00:00+0100",
            "2010-06-07T00:00:00+15:00",
            "2010-06-07T24:00:00Z",
            "2010-06-07T00:60:00Z",
            "2010-06-07T00:00:60Z",
            "2010-02-29T00:00:00Z",
            "2010-13-01T00:00:00Z",
            "2010-00-01T00:00:00Z",
            "2010-06-00T00:00:00Z",
            "+010-06-07T00:00:00Z",
            " 2010-06-07T00:00:00Z",
            "2010-06-07T00:00:0é",
            "2010-06-07T00:00:0éZ",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn each_day_of_eight_centuries_follows_the_day_before() {
        let leap =
            |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for count in 0..292_194 {
            assert_eq!(civil(count), (year, month, day));
            let (y, m, d) = (year as i64, month as i64, day as i64);
            assert_eq!(days(y, m, d), count as i64);
            let last = match month {
                2 => 28 + u64::from(leap(year)),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > last {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
    }
}
