//! Random bytes at hand. In: nothing. Out: bytes that nobody can guess, for nonces, ids and salts. Promise: each byte is given
//! out once, and none of those that were given out stays here.
//!
//! They come from aws-lc's generator, which costs a microsecond for each request however short, half of it for reseeding from
//! the processor. So a thread asks for many at once.

use aws_lc_rs::rand::fill;
use std::cell::RefCell;

/// What a thread asks for at once.
const BYTES: usize = 512;

struct Stock {
    bytes: [u8; BYTES],
    /// The first so many have not been given out.
    left: usize,
}

thread_local! {
    static STOCK: RefCell<Stock> = const { RefCell::new(Stock { bytes: [0; BYTES], left: 0 }) };
}

/// Fills `out`. Panics where the system has no random bytes: nothing could be kept secret then.
pub fn random(out: &mut [u8]) {
    if out.len() > BYTES {
        return fill(out).expect(SYSTEM);
    }
    STOCK.with_borrow_mut(|stock| {
        if stock.left < out.len() {
            fill(&mut stock.bytes).expect(SYSTEM);
            stock.left = BYTES;
        }
        let rest = stock.left - out.len();
        let given = &mut stock.bytes[rest..stock.left];
        out.copy_from_slice(given);
        given.fill(0);
        stock.left = rest;
    });
}

const SYSTEM: &str = "the system gives random bytes";

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_byte_is_given_out_twice_and_none_that_was_stays() {
        let mut seen = HashSet::new();
        for length in (16..=48).cycle().take(500) {
            let mut out = vec![0; length];
            random(&mut out);
            // 16 bytes are alike by chance once in 2^128
            for part in out.chunks_exact(16) {
                assert!(seen.insert(part.to_vec()), "given out twice");
            }
            STOCK.with_borrow(|stock| {
                assert!(stock.bytes[stock.left..].iter().all(|byte| *byte == 0));
            });
        }
    }

    #[test]
    fn more_than_the_stock_is_filled_too() {
        let mut out = [0; 3 * BYTES];
        random(&mut out);
        for part in out.chunks_exact(16) {
            assert_ne!(part, [0; 16]);
        }
    }
}
