//! Entity time (XEP-0202): what time the server has. And the one place that writes a time stamp (XEP-0082).

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
    fn each_day_of_eight_centuries_follows_the_day_before() {
        let leap =
            |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for count in 0..292_194 {
            assert_eq!(civil(count), (year, month, day));
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
