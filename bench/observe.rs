//! What measuring costs: a record, a message's share of it, a turn's, and a page of `GET /metrics` at two shards.

use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use nitro::observe::{
    Gauges, Histograms, LoopLag, Observer, Recorder, Stage, Stamp, Stamps, begin_recording,
    exchange, record,
};
use nitro::shard::figures::{Pages, Sources};
use nitro::store::sql;

fn pieces(c: &mut Criterion) {
    begin_recording();
    c.bench_function("record, the same value", |b| {
        b.iter(|| record(Stage::Message, std::hint::black_box(120)));
    });
    let mut us = 0;
    c.bench_function("record, another value each time", |b| {
        b.iter(|| {
            us = (us + 7919) % 1_000_000;
            record(Stage::Message, us);
        });
    });
    // what a message pays: its time stamp, and its end, shared with the others of its turn
    for batch in [1, 8, 64] {
        let mut stamps = Stamps::default();
        let mut now = 1000;
        c.bench_function(&format!("a turn with {batch} messages"), |b| {
            b.iter(|| {
                now += 50;
                for _ in 0..batch {
                    stamps.push(std::hint::black_box(Stamp::at(now)));
                }
                stamps.record(Stage::Message, now + 30);
            });
        });
    }
    let mut lag = LoopLag::new(0);
    let mut now = 0;
    c.bench_function("loop lag, a turn of 20 us", |b| {
        b.iter(|| {
            now += 20;
            lag.looked(std::hint::black_box(now));
        });
    });
    let started = std::time::Instant::now();
    c.bench_function("the clock", |b| {
        b.iter(|| started.elapsed().as_micros() as u64);
    });
    c.bench_function("handing over", |b| {
        b.iter_batched(Histograms::new, exchange, BatchSize::SmallInput);
    });
}

fn page(c: &mut Criterion) {
    let recorders = [Some(0), Some(1), None].map(|shard| Recorder {
        shard,
        ask: Box::new(|n, mut histograms, reply| {
            for stage in Stage::ALL {
                for n in 0..200u64 {
                    histograms.record(stage, n * n * 10, 1);
                }
            }
            reply.send((n, histograms)).is_ok()
        }),
    });
    let (observer, _) = Observer::start(recorders.into(), Vec::new(), || {}).expect("a thread");
    let pages = Pages {
        sources: Arc::new(Sources {
            gauges: Arc::new(Gauges::new(2)),
            sql: Arc::<sql::Counters>::default(),
            redis: None,
            started_us: 0,
        }),
        observer,
    };
    c.bench_function("a page of two shards with all stages", |b| {
        b.iter(|| {
            let (tell, told) = std::sync::mpsc::channel();
            assert!(
                pages.page(nitro::observe::Format::OpenMetrics, move |page| {
                    let _ = tell.send(page.len());
                })
            );
            told.recv_timeout(Duration::from_secs(10)).expect("a page")
        });
    });
}

criterion_group!(benches, pieces, page);
criterion_main!(benches);
