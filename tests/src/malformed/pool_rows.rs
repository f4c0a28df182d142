//! Pool operations that must leave the pool as it was.

use super::bench::{Bench, Seen};
use super::rows;
use kv_quant::{AppendSlots, CachePool, Error, FloatSlice, PagePool, PoolError, SequenceId, Side};

/// Runs a call on a pool of 8 pages of 4 slots in which one sequence has 9 tokens and a fork shares 6 of them.
fn on_pages(call: impl FnOnce(&mut PagePool, SequenceId, SequenceId) -> Seen) -> Seen {
    let mut pool = PagePool::new(8, 4, 100);
    let mut slots = AppendSlots::default();
    let first = pool.allocate();
    pool.append(first, 9, &mut slots).expect("room");
    let fork = pool.fork(first, 6).expect("long enough");
    let before = books(&pool, first, fork);
    let seen = call(&mut pool, first, fork);
    assert_eq!(before, books(&pool, first, fork), "a refused call changed the books");
    seen
}

fn books(
    pool: &PagePool,
    first: SequenceId,
    fork: SequenceId,
) -> (u64, usize, Vec<Option<u32>>, Vec<Vec<i32>>) {
    let rows = [first, fork].map(|id| pool.page_row(id).map(<[i32]>::to_vec).unwrap_or_default());
    let counts = (0..pool.num_pages()).map(|page| pool.ref_count(page)).collect();
    (pool.num_free_pages(), pool.num_sequences(), counts, rows.to_vec())
}

/// Runs a call on a cache pool with one sequence of 3 tokens; neither books nor bytes may change.
fn on_cache(bench: &Bench, call: impl FnOnce(&mut CachePool, SequenceId, &Bench) -> Seen) -> Seen {
    let mut pool = CachePool::new(bench.layout.clone()).expect("small");
    let id = pool.allocate();
    pool.append(id, FloatSlice::F32(&bench.k), FloatSlice::F32(&bench.v)).expect("three tokens");
    let bytes =
        |pool: &CachePool| -> Vec<Vec<u8>> { (0..4).map(|i| pool.view().buffer(i).to_vec()).collect() };
    let before = (bytes(&pool), pool.len(id), pool.pages().num_free_pages());
    let seen = call(&mut pool, id, bench);
    assert_eq!(
        before,
        (bytes(&pool), pool.len(id), pool.pages().num_free_pages()),
        "a refused call changed the pool"
    );
    seen
}

fn append(pool: &mut PagePool, batch: &[(SequenceId, u32)]) -> Seen {
    pool.append_batch(batch, &mut AppendSlots::default()).into()
}

/// A handle of a sequence that is gone.
fn freed(pool: &mut PagePool) -> SequenceId {
    let id = pool.allocate();
    pool.free(id).expect("just allocated");
    id
}

rows! {
    "pool: more tokens than pages" => Seen::Pool(PoolError::OutOfPages { .. }),
        |_| on_pages(|pool, first, _| append(pool, &[(first, 100)]));
    "pool: the copy of a shared page has no room" => Seen::Pool(PoolError::OutOfPages { needed: 6, free: 5 }),
        |_| on_pages(|pool, _, fork| append(pool, &[(fork, 19)]));
    "pool: a batch that fits only in part" => Seen::Pool(PoolError::OutOfPages { .. }),
        |_| on_pages(|pool, first, fork| append(pool, &[(first, 12), (fork, 16)]));
    "pool: length beyond u32" => Seen::Pool(PoolError::TooLong { len: 9, num_tokens: u32::MAX, .. }),
        |_| on_pages(|pool, first, _| append(pool, &[(first, u32::MAX)]));
    "pool: a sequence twice in a batch" => Seen::Pool(PoolError::SequenceTwice(_)),
        |_| on_pages(|pool, first, fork| append(pool, &[(first, 1), (fork, 1), (first, 1)]));
    "pool: append to a freed sequence" => Seen::Pool(PoolError::UnknownSequence(_)), |_| on_pages(|pool, first, _| {
        let gone = freed(pool);
        append(pool, &[(first, 1), (gone, 1)])
    });
    "pool: free twice" => Seen::Pool(PoolError::UnknownSequence(_)), |_| on_pages(|pool, _, _| {
        let gone = freed(pool);
        pool.free(gone).into()
    });
    "pool: a handle whose place was taken again" => Seen::Pool(PoolError::UnknownSequence(_)),
        |_| on_pages(|pool, _, _| {
            let gone = freed(pool);
            let taken = pool.allocate();
            let seen = pool.truncate(gone, 0).into();
            pool.free(taken).expect("live");
            seen
        });
    "pool: a handle of another pool" => Seen::Pool(PoolError::UnknownSequence(_)), |_| on_pages(|pool, _, _| {
        let foreign = PagePool::new(8, 4, 100).allocate();
        pool.page_row(foreign).into()
    });
    "pool: fork of a freed sequence" => Seen::Pool(PoolError::UnknownSequence(_)), |_| on_pages(|pool, _, _| {
        let gone = freed(pool);
        pool.fork(gone, 0).into()
    });
    "pool: fork beyond the length" => Seen::Pool(PoolError::BeyondLen { len: 9, asked: 10, .. }),
        |_| on_pages(|pool, first, _| pool.fork(first, 10).into());
    "pool: truncate to more tokens" => Seen::Pool(PoolError::BeyondLen { len: 6, asked: 7, .. }),
        |_| on_pages(|pool, _, fork| pool.truncate(fork, 7).into());
    "pool: truncate to u32::MAX" => Seen::Pool(PoolError::BeyondLen { asked: u32::MAX, .. }),
        |_| on_pages(|pool, first, _| pool.truncate(first, u32::MAX).into());
    "pool: lengths of a freed sequence" => Seen::Pool(PoolError::UnknownSequence(_)), |_| on_pages(|pool, first, _| {
        let gone = freed(pool);
        pool.fill_lens(&[first, gone], &mut Vec::new()).into()
    });
    "pool: page table of a freed sequence" => Seen::Pool(PoolError::UnknownSequence(_)),
        |_| on_pages(|pool, first, _| {
            let gone = freed(pool);
            pool.fill_page_table(&[gone, first], &mut Vec::new(), &mut Vec::new()).into()
        });
    "pool: undo an append that others followed" => Seen::Pool(PoolError::StaleAppend), |_| {
        let mut pool = PagePool::new(8, 4, 100);
        let (mut slots, id) = (AppendSlots::default(), pool.allocate());
        pool.append(id, 3, &mut slots).expect("room");
        pool.truncate(id, 1).expect("long enough");
        pool.undo_append(&mut slots).into()
    };
    "pool: undo twice" => Seen::Pool(PoolError::StaleAppend), |_| on_pages(|pool, first, _| {
        let mut slots = AppendSlots::default();
        pool.append(first, 3, &mut slots).expect("room");
        pool.undo_append(&mut slots).expect("the latest");
        pool.undo_append(&mut slots).into()
    });
    "cache pool: rows that are no whole tokens" => Seen::Quant(Error::Len { .. }), |b| on_cache(b, |pool, id, b| {
        pool.append(id, FloatSlice::F32(&b.k[..65]), FloatSlice::F32(&b.v[..65])).into()
    });
    "cache pool: v shorter than k" => Seen::Quant(Error::Len { what: "v", .. }), |b| on_cache(b, |pool, id, b| {
        pool.append(id, FloatSlice::F32(&b.k), FloatSlice::F32(&b.v[..128])).into()
    });
    "cache pool: NaN in the last row" => Seen::Quant(Error::NonFinite { side: Side::V, token: 2, .. }), |b| {
        let mut v = b.v.clone();
        v[191] = f32::NAN;
        on_cache(b, |pool, id, b| pool.append(id, FloatSlice::F32(&b.k), FloatSlice::F32(&v)).into())
    };
    "cache pool: scale overflow in a fork that shares a page" => Seen::Quant(Error::ScaleOverflow { .. }),
        |b| on_cache(b, |pool, id, b| {
            let fork = pool.fork(id, 2).expect("long enough");
            let mut k = b.k.clone();
            k[64] = 1e30;
            let seen = pool.append(fork, FloatSlice::F32(&k), FloatSlice::F32(&b.v)).into();
            pool.free(fork).expect("live");
            seen
        });
    "cache pool: batch of other rows" => Seen::Quant(Error::Len { .. }), |b| on_cache(b, |pool, id, b| {
        pool.append_batch(&[(id, 2)], FloatSlice::F32(&b.k), FloatSlice::F32(&b.v)).map(|_| ()).into()
    });
    "cache pool: a token past the end" => Seen::Pool(PoolError::BeyondLen { .. }), |b| on_cache(b, |pool, id, _| {
        pool.dequantize_row(id, Side::K, 3, 0, &mut [0.0; 32]).into()
    });
    "cache pool: a head past the end" => Seen::Quant(Error::HeadOutOfRange { head: 2, .. }),
        |b| on_cache(b, |pool, id, _| pool.dequantize_row(id, Side::K, 0, 2, &mut [0.0; 32]).into());
}
