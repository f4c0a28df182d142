//! The pool against a plain model: a state machine of random operations over all layouts.
//!
//! The model keeps each sequence as a vector of rows and each page as an `Rc`, whose strong count is the page's
//! reference count. After every operation all books and all bytes of all live sequences are compared.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure is the point")]

mod strategies;

use kv_quant::{
    CacheFormat, CacheLayout, CachePool, Error, FloatSlice, PlaneId, PoolError, ScaleType, SequenceId, Side,
    quantize_group, read_codes,
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use strategies::layout;

/// One token: K and V as they were given, and as they must lie in the cache.
struct Row {
    k: Vec<f32>,
    v: Vec<f32>,
    /// For K and V: codes and scale bytes of all heads.
    stored: [(Vec<i8>, Vec<u8>); 2],
}

impl Row {
    fn new(format: &CacheFormat, rng: &mut StdRng) -> Rc<Self> {
        let mut x = || (0..format.row_elements()).map(|_| rng.random_range(-3f32..3.0)).collect::<Vec<_>>();
        let (k, v) = (x(), x());
        let stored = [(Side::K, &k), (Side::V, &v)].map(|(side, x)| {
            let mut codes = vec![0; x.len()];
            let mut scales = Vec::new();
            let group_len = format.group_len(side) as usize;
            for (values, codes) in x.chunks(group_len).zip(codes.chunks_mut(group_len)) {
                let scale = quantize_group(values, format.scale_type(), codes).unwrap();
                scales.extend_from_slice(&scale.bits.to_le_bytes()[..format.scale_type().bytes()]);
            }
            (codes, scales)
        });
        Rc::new(Self { k, v, stored })
    }
}

struct ModelSequence {
    id: SequenceId,
    rows: Vec<Rc<Row>>,
    pages: Vec<Rc<u8>>,
}

struct Model {
    page_len: usize,
    num_pages: usize,
    live: Vec<ModelSequence>,
    freed: Vec<SequenceId>,
}

impl Model {
    fn num_free(&self) -> usize {
        let used: HashSet<_> = self.live.iter().flat_map(|s| &s.pages).map(Rc::as_ptr).collect();
        self.num_pages - used.len()
    }

    fn copies_last_page(
        &self,
        sequence: usize,
        num_tokens: usize,
        given_up: &HashMap<*const u8, usize>,
    ) -> bool {
        let s = &self.live[sequence];
        let others =
            |page| Rc::strong_count(page) - given_up.get(&Rc::as_ptr(page)).copied().unwrap_or(0) > 1;
        num_tokens > 0 && !s.rows.len().is_multiple_of(self.page_len) && s.pages.last().is_some_and(others)
    }

    /// Pages that a batch of (sequence, tokens) needs, copies counted.
    fn pages_needed(&self, batch: &[(usize, usize)]) -> usize {
        let mut given_up = HashMap::new();
        let mut needed = 0;
        for &(sequence, num_tokens) in batch {
            let s = &self.live[sequence];
            if self.copies_last_page(sequence, num_tokens, &given_up) {
                *given_up.entry(Rc::as_ptr(s.pages.last().unwrap())).or_default() += 1;
                needed += 1;
            }
            needed += (s.rows.len() + num_tokens).div_ceil(self.page_len) - s.pages.len();
        }
        needed
    }

    fn append(&mut self, sequence: usize, rows: &[Rc<Row>]) {
        if self.copies_last_page(sequence, rows.len(), &HashMap::new()) {
            *self.live[sequence].pages.last_mut().unwrap() = Rc::new(0);
        }
        let s = &mut self.live[sequence];
        s.rows.extend_from_slice(rows);
        s.pages.resize_with(s.rows.len().div_ceil(self.page_len), || Rc::new(0));
    }
}

/// Whole numbers are picks, taken modulo what there is to pick from.
#[derive(Clone, Debug)]
enum Op {
    Allocate,
    Append { pick: usize, num_tokens: usize },
    AppendBatch { parts: Vec<(usize, usize)> },
    AppendBad { pick: usize, num_tokens: usize, at: usize, value: f32 },
    Fork { pick: usize, prefix: usize },
    ForkAll { pick: usize },
    Truncate { pick: usize, len: usize },
    Free { pick: usize },
    Stale { pick: usize },
    Twice { pick: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let pick = || 0usize..1000;
    let bad = prop::sample::select(vec![f32::NAN, f32::INFINITY, 1e30]);
    prop_oneof![
        2 => Just(Op::Allocate),
        6 => (pick(), 0usize..9).prop_map(|(pick, num_tokens)| Op::Append { pick, num_tokens }),
        3 => prop::collection::vec((pick(), 0usize..5), 0..6).prop_map(|parts| Op::AppendBatch { parts }),
        1 => (pick(), 1usize..5, pick(), bad)
            .prop_map(|(pick, num_tokens, at, value)| Op::AppendBad { pick, num_tokens, at, value }),
        3 => (pick(), pick()).prop_map(|(pick, prefix)| Op::Fork { pick, prefix }),
        2 => pick().prop_map(|pick| Op::ForkAll { pick }),
        2 => (pick(), pick()).prop_map(|(pick, len)| Op::Truncate { pick, len }),
        2 => pick().prop_map(|pick| Op::Free { pick }),
        1 => pick().prop_map(|pick| Op::Stale { pick }),
        1 => pick().prop_map(|pick| Op::Twice { pick }),
    ]
}

struct Machine {
    pool: CachePool,
    model: Model,
    rng: StdRng,
}

impl Machine {
    fn new(layout: CacheLayout, seed: u64) -> Self {
        let model = Model {
            page_len: layout.page_len() as usize,
            num_pages: layout.num_pages() as usize,
            live: Vec::new(),
            freed: Vec::new(),
        };
        let mut pool = CachePool::new(layout).unwrap();
        pool.buffers_mut().as_mut_vecs().iter_mut().for_each(|buffer| buffer.fill(0x80));
        Self { pool, model, rng: StdRng::seed_from_u64(seed) }
    }

    fn pick(&self, pick: usize) -> Option<usize> {
        pick.checked_rem(self.model.live.len())
    }

    /// Everything that a failed call must leave alone.
    fn snapshot(&self) -> impl PartialEq + use<> {
        let pages = self.pool.pages();
        let row = |s: &ModelSequence| (pages.len(s.id).unwrap(), pages.page_row(s.id).unwrap().to_vec());
        let rows: Vec<_> = self.model.live.iter().map(row).collect();
        let counts: Vec<_> = (0..pages.num_pages()).map(|page| pages.ref_count(page)).collect();
        let buffers: Vec<_> = (0..4).map(|i| self.pool.view().buffer(i).to_vec()).collect();
        (rows, counts, pages.num_free_pages(), pages.num_sequences(), buffers)
    }

    fn refused(&mut self, batch: &[(SequenceId, u32)], k: &[f32], v: &[f32]) -> PoolError {
        let before = self.snapshot();
        let error = self.pool.append_batch(batch, FloatSlice::F32(k), FloatSlice::F32(v)).unwrap_err();
        assert!(before == self.snapshot(), "{error} changed something");
        error
    }

    fn append(&mut self, parts: &[(usize, usize)]) {
        let format = *self.pool.layout().format();
        let mut new_rows = |n| (0..n).map(|_| Row::new(&format, &mut self.rng)).collect::<Vec<_>>();
        let rows: Vec<Vec<Rc<Row>>> = parts.iter().map(|&(_, n)| new_rows(n)).collect();
        let batch: Vec<_> = parts.iter().map(|&(s, n)| (self.model.live[s].id, n as u32)).collect();
        let k: Vec<f32> = rows.iter().flatten().flat_map(|row| row.k.iter().copied()).collect();
        let v: Vec<f32> = rows.iter().flatten().flat_map(|row| row.v.iter().copied()).collect();
        let (needed, free) = (self.model.pages_needed(parts), self.model.num_free());
        if needed > free {
            let want = PoolError::OutOfPages { needed: needed as u64, free: free as u64 };
            assert_eq!(self.refused(&batch, &k, &v), want);
            return;
        }
        if let [(sequence, num_tokens)] = batch[..] {
            assert_eq!(self.pool.pages().pages_needed(sequence, num_tokens), Ok(needed as u64));
            self.pool.append(sequence, FloatSlice::F32(&k), FloatSlice::F32(&v)).unwrap();
        } else {
            let slots = self.pool.append_batch(&batch, FloatSlice::F32(&k), FloatSlice::F32(&v)).unwrap();
            assert_eq!(slots.len(), rows.iter().map(Vec::len).sum::<usize>());
        }
        for (&(sequence, _), rows) in parts.iter().zip(&rows) {
            self.model.append(sequence, rows);
        }
    }

    fn append_bad(&mut self, sequence: usize, num_tokens: usize, at: usize, value: f32) {
        let format = *self.pool.layout().format();
        if value.is_finite() && format.scale_type() != ScaleType::F16 {
            return; // f16 alone overflows
        }
        let good = vec![1f32; num_tokens * format.row_elements()];
        let at = at % good.len();
        let mut bad = good.clone();
        bad[at] = value;
        let is_full = self.model.pages_needed(&[(sequence, num_tokens)]) > self.model.num_free();
        let batch = [(self.model.live[sequence].id, num_tokens as u32)];
        let dim = format.head_dim() as usize;
        let want = (at / format.row_elements(), (at % format.row_elements() / dim) as u32);
        match self.refused(&batch, &good, &bad) {
            PoolError::OutOfPages { .. } => assert!(is_full),
            PoolError::Cache(Error::NonFinite { side: Side::V, token, head, channel }) => {
                assert_eq!((token, head, channel as usize), (want.0, want.1, at % dim));
                assert!(!value.is_finite());
            }
            PoolError::Cache(Error::ScaleOverflow { side: Side::V, token, head, channel, .. }) => {
                let group_len = format.group_len(Side::V) as usize;
                assert_eq!(
                    (token, head, channel as usize),
                    (want.0, want.1, at % dim / group_len * group_len)
                );
                assert!(value.is_finite());
            }
            error => panic!("{error}"),
        }
    }

    fn fork(&mut self, parent: usize, prefix: usize) {
        let s = &self.model.live[parent];
        let id = self.pool.fork(s.id, prefix as u32).unwrap();
        let pages = s.pages[..prefix.div_ceil(self.model.page_len)].to_vec();
        let rows = s.rows[..prefix].to_vec();
        self.model.live.push(ModelSequence { id, rows, pages });
    }

    fn truncate(&mut self, sequence: usize, len: usize) {
        let s = &mut self.model.live[sequence];
        let old = s.rows.len() as u32;
        let beyond = PoolError::BeyondLen { sequence: s.id, len: old, asked: old + 1 };
        assert_eq!(self.pool.truncate(s.id, old + 1), Err(beyond.clone()));
        assert_eq!(self.pool.fork(s.id, old + 1), Err(beyond));
        s.rows.truncate(len);
        s.pages.truncate(len.div_ceil(self.model.page_len));
        self.pool.truncate(s.id, len as u32).unwrap();
    }

    fn stale(&mut self, id: SequenceId) {
        let unknown = PoolError::UnknownSequence(id);
        assert_eq!(self.refused(&[(id, 0)], &[], &[]), unknown);
        assert_eq!(self.pool.free(id), Err(unknown.clone()));
        assert_eq!(self.pool.truncate(id, 0), Err(unknown.clone()));
        assert_eq!(self.pool.fork(id, 0), Err(unknown.clone()));
        assert_eq!(self.pool.len(id), Err(unknown));
    }

    fn run(&mut self, op: &Op) {
        let picked = match *op {
            Op::Allocate | Op::AppendBatch { .. } => None,
            Op::Stale { pick } => {
                if let Some(i) = pick.checked_rem(self.model.freed.len()) {
                    self.stale(self.model.freed[i]);
                }
                return;
            }
            Op::Append { pick, .. }
            | Op::AppendBad { pick, .. }
            | Op::Fork { pick, .. }
            | Op::ForkAll { pick }
            | Op::Truncate { pick, .. }
            | Op::Free { pick }
            | Op::Twice { pick } => self.pick(pick),
        };
        let len = picked.map_or(0, |sequence| self.model.live[sequence].rows.len());
        match (op, picked) {
            (Op::Allocate, _) => {
                let id = self.pool.allocate();
                self.model.live.push(ModelSequence { id, rows: Vec::new(), pages: Vec::new() });
            }
            (Op::AppendBatch { parts }, _) => {
                let mut batch: Vec<(usize, usize)> = Vec::new();
                for &(pick, num_tokens) in parts {
                    if let Some(s) = self.pick(pick).filter(|s| batch.iter().all(|(other, _)| other != s)) {
                        batch.push((s, num_tokens));
                    }
                }
                self.append(&batch);
            }
            (Op::Append { num_tokens, .. }, Some(sequence)) => self.append(&[(sequence, *num_tokens)]),
            (Op::AppendBad { num_tokens, at, value, .. }, Some(sequence)) => {
                self.append_bad(sequence, *num_tokens, *at, *value);
            }
            (Op::Fork { prefix, .. }, Some(parent)) => self.fork(parent, prefix % (len + 1)),
            (Op::ForkAll { .. }, Some(parent)) => self.fork(parent, len),
            (Op::Truncate { len: new_len, .. }, Some(sequence)) => {
                self.truncate(sequence, new_len % (len + 1))
            }
            (Op::Free { .. }, Some(sequence)) => {
                let s = self.model.live.swap_remove(sequence);
                self.pool.free(s.id).unwrap();
                self.model.freed.push(s.id);
            }
            (Op::Twice { .. }, Some(sequence)) => {
                let id = self.model.live[sequence].id;
                let rows = vec![1f32; 2 * self.pool.layout().format().row_elements()];
                assert_eq!(self.refused(&[(id, 1), (id, 1)], &rows, &rows), PoolError::SequenceTwice(id));
            }
            _ => {}
        }
    }

    fn check(&self) {
        let (pages, layout) = (self.pool.pages(), self.pool.layout());
        assert_eq!(pages.num_sequences(), self.model.live.len());
        let mut page_of = HashMap::new();
        let mut is_used = vec![false; self.model.num_pages];
        for s in &self.model.live {
            assert_eq!(pages.len(s.id), Ok(s.rows.len() as u32));
            let row = pages.page_row(s.id).unwrap();
            assert_eq!(row.len(), s.pages.len());
            for (&page, model_page) in row.iter().zip(&s.pages) {
                assert_eq!(pages.ref_count(page as u64), Some(Rc::strong_count(model_page) as u32));
                let first = *page_of.entry(Rc::as_ptr(model_page)).or_insert(page);
                assert_eq!(first, page, "one page of the model lies in two of the pool");
                is_used[page as usize] = true;
            }
            for (token, want) in s.rows.iter().enumerate() {
                self.check_row(pages.slot(s.id, token as u32).unwrap().unwrap(), want);
            }
            assert_eq!(pages.slot(s.id, s.rows.len() as u32), Ok(None));
        }
        // Distinct pages of the model are distinct in the pool, and no other page is held: nothing leaks.
        let num_used = is_used.iter().filter(|used| **used).count();
        assert_eq!(page_of.len(), num_used);
        for (page, used) in is_used.iter().enumerate() {
            assert_eq!(pages.ref_count(page as u64) == Some(0), !used, "page {page}");
        }
        assert_eq!(pages.num_free_pages(), (self.model.num_pages - num_used) as u64);
        assert_eq!(pages.bytes_used(), num_used as u64 * layout.bytes_per_page());
    }

    fn check_row(&self, slot: u64, want: &Row) {
        let (layout, view) = (self.pool.layout(), self.pool.view());
        for head in 0..layout.format().num_kv_heads() {
            for (side, (codes, scales)) in [Side::K, Side::V].into_iter().zip(&want.stored) {
                let got = read_codes(layout, &view, side, slot, head).unwrap();
                assert_eq!(got, &codes[head as usize * got.len()..][..got.len()], "{side} of slot {slot}");
                let (buffer, range) = layout.row_bytes(PlaneId::Scales(side), slot, head);
                let got = view.bytes(buffer, range);
                assert_eq!(got, &scales[head as usize * got.len()..][..got.len()], "{side} of slot {slot}");
            }
        }
    }
}

proptest! {
    #[test]
    fn the_pool_is_its_model(layout in layout(14, 7), seed in any::<u64>(), ops in prop::collection::vec(op(), 1..50)) {
        let mut machine = Machine::new(layout, seed);
        for op in &ops {
            machine.run(op);
            machine.check();
        }
        for s in std::mem::take(&mut machine.model.live) {
            machine.pool.free(s.id).unwrap();
        }
        prop_assert_eq!(machine.pool.pages().num_free_pages(), machine.model.num_pages as u64);
    }
}
