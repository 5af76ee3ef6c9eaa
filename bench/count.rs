//! What a login and a message cost in instructions, through the parts without sockets and clock: `bench/count` runs this under
//! valgrind, compares with `bench/count.txt` and says what to do. By itself it only shows that it works.
//!
//! In: the name of a case. Out: what [`nitro_counted`] runs, [`TIMES`] times, is what is counted; the clients' side is not. Equal
//! counts want equal work: nothing here looks at a clock, and what random numbers there are (nonces, ids) have
//! one length. Maps with keys of this process's own making (std's) are the rest that differs, far below a hundredth.

use std::hint::black_box;

#[path = "house.rs"]
mod house;
use house::{CHAT, FLEETING, House};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Of each case; as many go before, uncounted, so that buffers have their size.
const TIMES: u64 = 50;

type Case = (&'static str, fn(&mut House));

/// Name and one round.
const CASES: [Case; 5] = [
    ("login", |house| house.log_in("carol")),
    ("login-contacts", |house| house.log_in("alice")),
    ("login-token", |house| house.log_in_by_token("dave")),
    ("message-archived", |house| house.chat(CHAT)),
    ("message-fleeting", |house| house.chat(FLEETING)),
];

fn main() {
    let name = std::env::args().skip(1).find(|one| !one.starts_with("--"));
    for (case, round) in CASES {
        if name.as_deref().is_none_or(|name| name == case) {
            let mut house = House::new();
            (0..TIMES).for_each(|_| round(&mut house));
            house.around = nitro_counted;
            (0..TIMES).for_each(|_| round(&mut house));
            println!("{case}: {TIMES} rounds");
        }
    }
}

/// Valgrind counts from here to its end.
#[inline(never)]
#[unsafe(no_mangle)]
fn nitro_counted(work: &mut dyn FnMut()) {
    work();
    black_box(());
}
