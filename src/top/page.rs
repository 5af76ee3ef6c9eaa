//! The page of `nitro top`. In: a [`Report`] and what the keys have chosen. Out: cells of a terminal, at least 80 by 24.

use std::time::Duration;

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Clear, Paragraph, Row, Table, Widget};

use super::{Core, Quantiles, Report};
use crate::observe::Stage;

/// Lines around the two tables: title, tiers, keys.
const AROUND: u16 = 4;
/// The page for [`text`].
const WIDTH: u16 = 80;

const HELP: &str = "\
core     the shard: one core, one thread; all: together (cpu: their mean,
         queues: the highest)
sess     sessions                       wait   connections that are logging in
login/s  sessions begun or resumed      msg/s  messages from clients
cpu%     of the shard's thread          lag    p99 of how late the loop turns
p50, p99, p99.9   of the chosen stage, in the interval, on that core
inbx     answers and commits that waited
unrd     connections with more to read than one turn allows
mesh     batches kept for a full way
jrnl     acts that waited for a commit
         (queues: the most at once in the last minute)

What a stage is: config/metrics.md, nitro_NAME_seconds.
Red: more than 10 ms of lag or 90 % of a core, batches kept, a tier down.

s, down, right   next stage         S, up, left   the one before
PgDn, PgUp       more cores         h             this help
q                quit";

/// What the keys have chosen, and what is shown.
pub struct View {
    domain: String,
    pub interval: Duration,
    stage: usize,
    first_core: usize,
    pub help: bool,
    pub report: Option<Report>,
    /// Why there are no newer figures.
    pub trouble: Option<String>,
}

impl View {
    pub fn new(domain: &str, interval: Duration, stage: Stage) -> View {
        View {
            domain: domain.into(),
            interval,
            stage: stage as usize,
            first_core: 0,
            help: false,
            report: None,
            trouble: None,
        }
    }

    /// The stage so many further on.
    pub fn step(&mut self, by: isize) {
        self.stage = (self.stage as isize + by).rem_euclid(Stage::ALL.len() as isize) as usize;
    }

    /// So many pages of cores further on.
    pub fn scroll(&mut self, pages: isize) {
        let cores = self.report.as_ref().map_or(0, |r| r.shards.len());
        let to = self.first_core as isize + 8 * pages;
        self.first_core = to.clamp(0, cores.saturating_sub(1) as isize) as usize;
    }

    pub fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        frame.render_widget(self, area);
    }
}

/// The page as text, with all cores and stages.
pub fn text(report: &Report, stage: Stage) -> String {
    let height = AROUND + 3 + report.shards.len() as u16 + Stage::ALL.len() as u16;
    let area = Rect::new(0, 0, WIDTH, height);
    let mut buffer = Buffer::empty(area);
    let layout = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).split(area);
    Line::from(title(report, "", None)).render(layout[0], &mut buffer);
    body(
        report,
        Stage::ALL[stage as usize],
        0,
        layout[1],
        &mut buffer,
    );
    let mut out = String::new();
    for y in 0..height {
        let line: String = (0..WIDTH).map(|x| buffer[(x, y)].symbol()).collect();
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out.trim_end().to_owned() + "\n"
}

impl Widget for &View {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let [top, middle, keys] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(0),
            Constraint::Length(1),
        ])
        .areas(area);
        match &self.report {
            None => {
                Line::from(format!("nitro top: {}", self.domain)).render(top, buffer);
                let said = self
                    .trouble
                    .as_deref()
                    .unwrap_or("the first figures come in a moment");
                Paragraph::new(said)
                    .wrap(ratatui::widgets::Wrap { trim: true })
                    .render(middle, buffer);
            }
            Some(report) => {
                let title = title(report, &self.domain, Some(self.interval));
                Line::styled(title, Modifier::BOLD).render(top, buffer);
                let stage = Stage::ALL[self.stage];
                body(report, stage, self.first_core, middle, buffer);
            }
        }
        let line = match (&self.trouble, &self.report) {
            (Some(trouble), Some(_)) => Line::styled(trouble.as_str(), Color::Red),
            _ => Line::styled("q quit  h help  s/S stage  PgUp/PgDn cores", Modifier::DIM),
        };
        line.render(keys, buffer);
        if self.help {
            let height = (HELP.lines().count() as u16).min(area.height.saturating_sub(2));
            let place = Rect::new(0, 1.min(area.height), area.width, height);
            Clear.render(place, buffer);
            Paragraph::new(HELP).render(place, buffer);
        }
    }
}

fn title(report: &Report, domain: &str, interval: Option<Duration>) -> String {
    let mut title = format!("nitro {}", report.release);
    if !domain.is_empty() {
        title += &format!("  {domain}");
    }
    title += &format!(
        "  {} cores  up {}  {} sessions, {} to resume",
        report.shards.len(),
        span(report.up_seconds),
        count(report.all.sessions as f64),
        count(report.all.parked as f64),
    );
    match interval {
        Some(interval) => title + &format!("  every {} s", interval.as_secs_f64()),
        None => title + &format!("  in {:.1} s", report.seconds),
    }
}

/// Cores, stages, tiers.
fn body(report: &Report, stage: Stage, first_core: usize, area: Rect, buffer: &mut Buffer) {
    let stages = Stage::ALL.len() as u16 + 1;
    let cores = report.shards.len() as u16 + 2;
    let room = area.height.saturating_sub(2);
    // cores come first, but leave a third to the stages
    let cores = cores.min(room.saturating_sub(stages.min(room / 3)));
    let [top, middle, tiers] = Layout::vertical([
        Constraint::Length(cores),
        Constraint::Min(0),
        Constraint::Length(2),
    ])
    .areas(area);
    core_table(report, stage, first_core, top.height).render(top, buffer);
    stage_table(report, stage, middle.height).render(middle, buffer);
    Paragraph::new(tier_lines(report)).render(tiers, buffer);
}

const HEAD: Style = Style::new().add_modifier(Modifier::UNDERLINED);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

fn core_table(report: &Report, stage: Stage, first_core: usize, height: u16) -> Table<'static> {
    let head = [
        "core", "sess", "wait", "login/s", "msg/s", "cpu%", "lag", "p50", "p99", "p99.9", "inbx",
        "unrd", "mesh", "jrnl",
    ];
    let room = usize::from(height.saturating_sub(2));
    // as many as there is room for, the last page full
    let first = first_core.min(report.shards.len().saturating_sub(room));
    let shown = report.shards.iter().enumerate().skip(first).take(room);
    let mut rows: Vec<Row> = shown
        .map(|(n, core)| core_row(n.to_string(), core, stage))
        .collect();
    rows.push(core_row("all".into(), &report.all, stage).style(Modifier::BOLD));
    let widths = [4, 5, 5, 7, 5, 4, 5, 5, 5, 5, 4, 4, 4, 4].map(Constraint::Length);
    let head = head.map(|text| Cell::from(Text::from(text).right_aligned()));
    Table::new(rows, widths)
        .column_spacing(1)
        .header(Row::new(head).style(HEAD))
}

fn core_row(name: String, core: &Core, stage: Stage) -> Row<'static> {
    let none = Quantiles::default();
    let lag = core.stages.get(Stage::LoopLag.name()).unwrap_or(&none);
    let of = core.stages.get(stage.name()).unwrap_or(&none);
    let bad = |is_bad: bool| match is_bad {
        true => Style::new().fg(Color::Red),
        false => Style::new(),
    };
    let cells = [
        (name, Style::new()),
        (count(core.sessions as f64), Style::new()),
        (count(core.negotiating as f64), Style::new()),
        (count(core.logins_per_second), Style::new()),
        (count(core.messages_per_second), Style::new()),
        (
            format!("{:.0}", core.cpu_percent),
            bad(core.cpu_percent >= 90.0),
        ),
        (time(lag.count, lag.p99_us), bad(lag.p99_us > 10_000)),
        (time(of.count, of.p50_us), Style::new()),
        (time(of.count, of.p99_us), Style::new()),
        (time(of.count, of.p999_us), Style::new()),
        (
            few(core.queues.inbox_max),
            bad(core.queues.inbox_max > 2048),
        ),
        (few(core.queues.unread_max), Style::new()),
        (
            few(core.queues.mesh_kept_max),
            bad(core.queues.mesh_kept_max > 0),
        ),
        (few(core.queues.journal_waiting_max), Style::new()),
    ];
    Row::new(cells.map(|(text, style)| Cell::from(Text::from(text).right_aligned()).style(style)))
}

fn stage_table(report: &Report, chosen: Stage, height: u16) -> Table<'static> {
    let room = usize::from(height.saturating_sub(1));
    let first = (chosen as usize + 1).saturating_sub(room.max(1));
    let none = Quantiles::default();
    let rows = Stage::ALL.into_iter().skip(first).take(room).map(|stage| {
        let of = report.stages.get(stage.name()).unwrap_or(&none);
        let cells = [
            count(of.per_second),
            time(of.count, of.p50_us),
            time(of.count, of.p99_us),
            time(of.count, of.p999_us),
            time(of.count, of.max_us),
        ];
        let cells = cells.map(|text| Cell::from(Text::from(text).right_aligned()));
        let row = Row::new([Cell::from(stage.name())].into_iter().chain(cells));
        match stage == chosen {
            true => row.style(CHOSEN),
            false => row,
        }
    });
    let widths = [18, 8, 7, 7, 7, 7].map(Constraint::Length);
    let head = ["a second", "p50", "p99", "p99.9", "max"];
    let head = head.map(|text| Cell::from(Text::from(text).right_aligned()));
    let head = [Cell::from("stage, all cores")].into_iter().chain(head);
    Table::new(rows, widths)
        .column_spacing(1)
        .header(Row::new(head).style(HEAD))
}

fn tier_lines(report: &Report) -> Vec<Line<'static>> {
    let tiers = &report.tiers;
    let red = Style::new().fg(Color::Red);
    let sql = match tiers.sql_up {
        true => Span::raw("SQL up"),
        false => Span::styled("SQL DOWN", red),
    };
    let journal = match report.all.journal_status {
        0 => Span::raw("journal open"),
        1 => Span::styled("journal FULL", red),
        _ => Span::styled("DISK FULL", red),
    };
    let redis = match (tiers.redis, tiers.redis_out.is_empty()) {
        (0, _) => Span::raw("no Redis"),
        (all, true) => Span::raw(format!("Redis {all} of {all} in use")),
        (all, false) => Span::styled(
            format!(
                "Redis {} of {all}, out: {}",
                tiers.redis_in_use,
                tiers.redis_out.join(" ")
            ),
            red,
        ),
    };
    // a component that does not read is worth a look; without any there is nothing to say
    let all = &report.all;
    let components = match (all.components, all.component_queue_bytes) {
        (0, _) => Span::raw(""),
        (some, 0) => Span::raw(format!(
            "  components {some}, {}/s",
            count(all.component_stanzas_per_second)
        )),
        (some, waiting) => {
            Span::styled(format!("  components {some}, {} wait", bytes(waiting)), red)
        }
    };
    vec![
        Line::from(vec![
            sql,
            Span::raw(format!(
                ", {} statements/s, queue {}, retries {}  ",
                count(tiers.sql_statements_per_second),
                count(tiers.sql_queue as f64),
                count(tiers.sql_retries as f64),
            )),
            redis,
            components,
        ]),
        Line::from(vec![
            journal,
            Span::raw(format!(
                ", backlog {}  memory {}  disconnects/s {}  left out of log {}",
                bytes(report.all.journal_backlog_bytes),
                bytes(tiers.resident_bytes),
                count(report.all.disconnects_per_second),
                count(tiers.log_lines_left_out as f64),
            )),
        ]),
    ]
}

/// At most five characters.
fn time(n: u64, us: u64) -> String {
    let us = us as f64;
    match us {
        _ if n == 0 => "-".into(),
        _ if us < 999.5 => format!("{us:.0}us"),
        _ if us < 9950.0 => format!("{:.1}ms", us / 1e3),
        _ if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        _ if us < 99_950_000.0 => format!("{:.1}s", us / 1e6),
        _ => format!("{:.0}s", us / 1e6),
    }
}

/// At most five characters.
fn count(n: f64) -> String {
    match n {
        _ if n == 0.0 => "0".into(),
        _ if n < 9.95 => format!("{n:.1}").trim_end_matches(".0").to_owned(),
        _ if n < 9999.5 => format!("{n:.0}"),
        _ if n < 99_950.0 => format!("{:.1}k", n / 1e3),
        _ if n < 999_500.0 => format!("{:.0}k", n / 1e3),
        _ if n < 99_950_000.0 => format!("{:.1}M", n / 1e6),
        _ => format!("{:.0}M", n / 1e6),
    }
}

/// At most four characters.
fn few(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{}k", n / 1000),
        _ => format!("{}M", n / 1_000_000),
    }
}

fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n < 1024.0 => format!("{n:.0} B"),
        _ if n < 1024.0 * 1024.0 => format!("{:.0} KiB", n / 1024.0),
        _ if n < 1024.0 * 1024.0 * 1024.0 => format!("{:.1} MiB", n / 1024.0 / 1024.0),
        _ => format!("{:.1} GiB", n / 1024.0 / 1024.0 / 1024.0),
    }
}

fn span(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..=119 => format!("{s} s"),
        120..=7199 => format!("{} min", s / 60),
        7200..=172_799 => format!("{} h", s / 3600),
        _ => format!("{} d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::tests::report;
    use super::*;

    fn lines(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        (0..height)
            .map(|y| (0..width).map(|x| buffer[(x, y)].symbol()).collect())
            .collect()
    }

    fn view() -> View {
        let mut view = View::new("localhost", Duration::from_secs(2), Stage::Login);
        view.report = Some(report());
        view
    }

    #[test]
    fn everything_about_two_cores_stands_on_a_terminal_of_80_by_24() {
        let lines = lines(&view(), 80, 24);
        let all = lines.join("\n");
        assert!(
            lines[0].starts_with("nitro 0.1.0  localhost  2 cores"),
            "{all}"
        );
        assert!(
            lines[1].trim_end().ends_with("inbx unrd mesh jrnl"),
            "{all}"
        );
        let first: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(
            first,
            [
                "0", "100", "0", "5", "0", "25", "-", "1.0ms", "1.0ms", "1.0ms", "3", "0", "0", "0"
            ],
            "{all}"
        );
        assert!(lines[4].trim_start().starts_with("all"), "{all}");
        let shown = Stage::ALL.iter().filter(|stage| {
            let name = format!("{} ", stage.name());
            lines.iter().any(|line| line.starts_with(&name))
        });
        assert_eq!(shown.count(), Stage::ALL.len().min(15), "{all}");
        assert!(lines[21].starts_with("SQL up"), "{all}");
        assert!(lines[21].contains("Redis 1 of 2, out: b"), "{all}");
        assert!(lines[22].starts_with("journal FULL"), "{all}");
        assert!(lines[23].starts_with("q quit"), "{all}");
    }

    #[test]
    fn many_cores_are_turned_page_by_page_and_leave_room_for_the_chosen_stage() {
        let mut view = view();
        let report = view.report.as_mut().unwrap();
        report.shards = (0..64).map(|_| Core::default()).collect();
        view.step(-1);
        let cores = |lines: &[String]| -> Vec<usize> {
            lines
                .iter()
                .filter_map(|l| l.get(..4)?.trim().parse().ok())
                .collect()
        };
        let shown = lines(&view, 80, 24);
        assert_eq!(cores(&shown)[0], 0);
        assert!(shown.iter().any(|l| l.starts_with("login ")) || view.stage != 0);
        let last = Stage::ALL[Stage::ALL.len() - 1].name();
        view.stage = Stage::ALL.len() - 1;
        let shown = lines(&view, 80, 24);
        assert!(shown.iter().any(|l| l.starts_with(last)), "{shown:?}");
        for _ in 0..20 {
            view.scroll(1);
        }
        assert_eq!(cores(&lines(&view, 80, 24)).last(), Some(&63));
        view.scroll(-20);
        assert_eq!(cores(&lines(&view, 80, 24))[0], 0);
    }

    #[test]
    fn help_and_trouble_are_shown_and_a_tiny_terminal_is_no_end() {
        let mut view = view();
        view.help = true;
        let shown = lines(&view, 80, 24).join("\n");
        assert!(
            shown.contains("how late the loop turns") && shown.contains("q                quit")
        );
        assert!(HELP.lines().all(|line| line.chars().count() <= 80));
        view.help = false;
        view.trouble = Some("the running nitro did not answer".into());
        assert!(lines(&view, 80, 24)[23].contains("did not answer"));
        view.report = None;
        assert!(lines(&view, 80, 24).join("\n").contains("did not answer"));
        for (width, height) in [(1, 1), (20, 3), (80, 5), (300, 100)] {
            let _ = lines(&self::view(), width, height);
        }
    }

    #[test]
    fn numbers_stay_within_their_columns() {
        for n in 0..100_000_000u64 {
            if n < 20_000 || n.is_multiple_of(49_999) {
                assert!(count(n as f64).len() <= 5, "{n}: {}", count(n as f64));
                assert!(few(n).len() <= 4, "{n}: {}", few(n));
                assert!(time(1, n).len() <= 5, "{n}: {}", time(1, n));
            }
        }
        assert_eq!(count(0.5), "0.5");
        assert_eq!(count(12_345.0), "12.3k");
        assert_eq!(time(1, 999), "999us");
        assert_eq!(time(1, 1000), "1.0ms");
        assert_eq!(time(1, 60_000_000), "60.0s");
    }

    #[test]
    fn the_page_as_text_has_all_cores_and_stages() {
        let text = text(&report(), Stage::Login);
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
        assert!(
            text.lines()
                .any(|line| line.trim_start().starts_with("1  ")),
            "{text}"
        );
        assert!(text.contains("sql_batch"), "{text}");
        assert!(text.contains("Redis 1 of 2"), "{text}");
    }

    #[test]
    fn components_are_shown_when_there_are_any() {
        let shown = |change: fn(&mut Core)| {
            let mut view = view();
            change(&mut view.report.as_mut().unwrap().all);
            lines(&view, 120, 24).concat()
        };
        assert!(!shown(|_| {}).contains("components"));
        let two = shown(|all| (all.components, all.component_stanzas_per_second) = (2, 35.0));
        assert!(two.contains("components 2, 35/s"), "{two}");
        let slow = shown(|all| (all.components, all.component_queue_bytes) = (1, 3 << 20));
        assert!(slow.contains("components 1, 3"), "{slow}");
    }
}
