//! The valid call that rows break, and what came of it.

use super::counting::CountingBackend;
use attn_backend::{
    Descriptor, FormatKey, Operation, OperationKey, Registry, SelectError, SelectOptions, Selection, Session,
    SessionOptions, TrialMode,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan, WorkspaceSize};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, ScaleType};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What came of a call.
#[derive(Debug)]
pub enum Seen {
    /// The call was accepted.
    Accepted,
    /// An error of the format crate.
    Quant(kv_quant::Error),
    /// An error of the plan crate.
    Plan(attn_plan::Error),
    /// An error of the CPU crate.
    Host(cpu_reference::Error),
    /// An error of a session that is its own; those of the format and plan crates are unwrapped.
    Session(attn_backend::Error),
    /// An error of selection.
    Select(attn_backend::SelectError),
    /// An error of a pool.
    Pool(kv_quant::PoolError),
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Seen::Accepted => f.write_str("accepted without an error"),
            Seen::Quant(error) => error.fmt(f),
            Seen::Plan(error) => error.fmt(f),
            Seen::Host(error) => error.fmt(f),
            Seen::Session(error) => error.fmt(f),
            Seen::Select(error) => error.fmt(f),
            Seen::Pool(error) => error.fmt(f),
        }
    }
}

impl<T> From<Result<T, kv_quant::Error>> for Seen {
    fn from(result: Result<T, kv_quant::Error>) -> Self {
        result.map_or_else(Seen::Quant, |_| Seen::Accepted)
    }
}

impl<T> From<Result<T, attn_plan::Error>> for Seen {
    fn from(result: Result<T, attn_plan::Error>) -> Self {
        result.map_or_else(Seen::Plan, |_| Seen::Accepted)
    }
}

impl<T> From<Result<T, cpu_reference::Error>> for Seen {
    fn from(result: Result<T, cpu_reference::Error>) -> Self {
        result.map_or_else(Seen::Host, |_| Seen::Accepted)
    }
}

impl<T> From<Result<T, attn_backend::Error>> for Seen {
    fn from(result: Result<T, attn_backend::Error>) -> Self {
        match result {
            Ok(_) => Seen::Accepted,
            Err(attn_backend::Error::Cache(error)) => Seen::Quant(error),
            Err(attn_backend::Error::Plan(error)) => Seen::Plan(error),
            Err(error) => Seen::Session(error),
        }
    }
}

impl<T> From<Result<T, attn_backend::SelectError>> for Seen {
    fn from(result: Result<T, attn_backend::SelectError>) -> Self {
        result.map_or_else(Seen::Select, |_| Seen::Accepted)
    }
}

impl<T> From<Result<T, kv_quant::PoolError>> for Seen {
    fn from(result: Result<T, kv_quant::PoolError>) -> Self {
        match result {
            Ok(_) => Seen::Accepted,
            Err(kv_quant::PoolError::Cache(error)) => Seen::Quant(error),
            Err(error) => Seen::Pool(error),
        }
    }
}

/// Everything of one valid append and one valid decode: 3 requests over a paged cache of 8 pages of 4 slots.
#[derive(Clone, Debug)]
pub struct Bench {
    /// 2 kv heads of 32 channels in groups of 8, HND.
    pub layout: CacheLayout,
    /// Patterned bytes, so that any write shows.
    pub cache: CacheBuffers,
    /// `[3, 2, 32]`, the tokens of an append.
    pub k: Vec<f32>,
    /// As `k`.
    pub v: Vec<f32>,
    /// `[3]`, one of them skipped.
    pub slots: Vec<i64>,
    /// 4 query heads over 2 kv heads.
    pub spec: DecodeSpec,
    /// Tokens of each request.
    pub kv_lens: Vec<u32>,
    /// Padded page table `[3, page_stride]`.
    pub pages: Vec<i32>,
    /// Entries of a row of the page table.
    pub page_stride: u64,
    /// Row starts, instead of the stride.
    pub page_starts: Option<Vec<u64>>,
    /// How the batch is cut.
    pub config: SplitConfig,
    /// `[3, 1, 4, 32]`.
    pub q: Vec<f32>,
    /// The backend of sessions.
    pub backend: CountingBackend,
    /// Whether the cache of a session changed.
    pub is_changed: bool,
    /// As `q`, a sentinel in every element.
    pub out: Vec<f32>,
    /// `[3, 1, 4]`, a sentinel in every element.
    pub lse: Vec<f32>,
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

impl Bench {
    /// The valid call.
    pub fn new() -> Self {
        let format = CacheFormat::new(2, 32, 8, 8, ScaleType::F16).expect("a valid format");
        let layout = CacheLayout::hnd(format, 8, 4).expect("a valid layout");
        let mut cache = CacheBuffers::zeroed(&layout).expect("a small cache");
        for (buffer_idx, buffer) in cache.as_mut_vecs().iter_mut().enumerate() {
            // 0x2e as the high byte of every f16 scale: finite and small.
            buffer.iter_mut().enumerate().for_each(|(i, x)| {
                *x = if buffer_idx >= 2 && i % 2 == 1 { 0x2e } else { (i * 37 + buffer_idx) as u8 };
            });
        }
        let values = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + seed) * 7919) % 401) as f32 / 100.0 - 2.0).collect()
        };
        let mut spec = DecodeSpec::new(4, 2, 32);
        spec.q_type = kv_quant::FloatType::F32;
        spec.out_type = kv_quant::FloatType::F32;
        spec.want_lse = true;
        Self {
            layout,
            cache,
            k: values(3 * 2 * 32, 1),
            v: values(3 * 2 * 32, 2),
            slots: vec![30, -1, 28],
            spec,
            kv_lens: vec![9, 0, 5],
            pages: vec![0, 1, 2, -1, -1, -1, 3, 4, -1],
            page_stride: 3,
            page_starts: None,
            config: SplitConfig { tile_len: 4, ..SplitConfig::throughput(3) },
            q: values(3 * 4 * 32, 3),
            backend: CountingBackend::default(),
            is_changed: false,
            out: vec![SENTINEL; 3 * 4 * 32],
            lse: vec![SENTINEL; 3 * 4],
        }
    }

    /// Everything that a refused call must leave alone.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.is_changed)];
        let mut cache = self.cache.clone();
        cache.as_mut_vecs().iter().for_each(|buffer| bytes.extend(buffer.iter()));
        for values in [&self.out, &self.lse] {
            bytes.extend(values.iter().flat_map(|x| x.to_bits().to_le_bytes()));
        }
        bytes
    }

    /// How often anything was run.
    pub fn launches(&self) -> u64 {
        self.backend.launches.load(Ordering::Relaxed)
    }

    /// What sessions are opened for.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(self.layout.clone(), self.spec.clone()).with_split(self.config.policy)
    }

    /// A registry of the counting backend alone.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::empty();
        let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
        registry.register(key, Arc::new(self.backend.clone()));
        registry
    }

    /// Selects the counting backend, untried.
    pub fn select(&self, descriptor: &Descriptor) -> Result<Selection, SelectError> {
        let options = SelectOptions { read_environment: false, trial: TrialMode::Skip, ..Default::default() };
        attn_backend::select(&self.registry(), descriptor, &options)
    }

    /// Opens a session over the valid cache, plans the valid step, and then makes the call; what it launches counts.
    pub fn in_session(&mut self, call: impl FnOnce(&mut Session<'static>, &mut Self) -> Seen) -> Seen {
        let selection = self.select(&self.descriptor()).expect("the unbroken descriptor");
        let mut session = Session::open(&selection, SessionOptions::default()).expect("an owned cache");
        let valid = Self::new();
        let buffers = crate::subject::buffers(&valid.layout, &valid.cache);
        for (buffer_idx, bytes) in buffers.iter().enumerate() {
            session.write_bytes(buffer_idx, 0, bytes).expect("the cache's own size");
        }
        session.plan(&valid.kv_lens, valid.request().page_table).expect("the unbroken step");
        self.backend.launches.store(0, Ordering::Relaxed);
        let seen = call(&mut session, self);
        for (buffer_idx, bytes) in buffers.iter().enumerate() {
            let mut now = vec![0; bytes.len()];
            session.read_bytes(buffer_idx, 0, &mut now).expect("the cache's own size");
            self.is_changed |= now != *bytes;
        }
        seen
    }

    /// Decodes in a session, with the arrays as they stand.
    pub fn decode_in_session(&mut self) -> Seen {
        self.in_session(|session, bench| {
            let (q, out) = (FloatSlice::F32(&bench.q), FloatSliceMut::F32(&mut bench.out));
            session.decode(q, out, Some(&mut bench.lse)).into()
        })
    }

    /// Appends in a session, with the arrays as they stand.
    pub fn append_in_session(&mut self) -> Seen {
        self.in_session(|session, bench| {
            session.append(FloatSlice::F32(&bench.k), FloatSlice::F32(&bench.v), &bench.slots).into()
        })
    }

    /// Plans in a session, with the step as it stands.
    pub fn plan_in_session(&mut self) -> Seen {
        self.in_session(|session, bench| session.plan(&bench.kv_lens, bench.request().page_table).into())
    }

    /// The request as it stands.
    pub fn request(&self) -> DecodeRequest<'_> {
        let rows = match &self.page_starts {
            Some(starts) => PageRows::Starts(starts),
            None => PageRows::Stride(self.page_stride),
        };
        DecodeRequest {
            spec: &self.spec,
            kv_lens: &self.kv_lens,
            page_table: PageTable { pages: &self.pages, rows },
        }
    }

    /// Appends as it stands.
    pub fn append(&mut self) -> Seen {
        let (k, v) = (FloatSlice::F32(&self.k), FloatSlice::F32(&self.v));
        kv_quant::append(&self.layout, &mut self.cache.view_mut(), k, v, &self.slots).into()
    }

    /// Decodes as it stands.
    pub fn decode(&mut self) -> Seen {
        self.request().check(&self.layout).into()
    }

    /// Plans as it stands.
    pub fn plan(&mut self) -> Seen {
        SplitPlan::new(&self.spec, &self.kv_lens, &self.config).into()
    }

    /// Sizes a workspace for `num_partials`.
    pub fn workspace(&mut self, num_partials: u64) -> Seen {
        WorkspaceSize::for_partials(&self.spec, num_partials).into()
    }
}

/// What outputs hold before a call: no result is ever this NaN.
const SENTINEL: f32 = f32::from_bits(0x7fc0_dead);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unbroken_call_is_accepted() {
        assert!(matches!(Bench::new().append(), Seen::Accepted));
        assert!(matches!(Bench::new().decode(), Seen::Accepted));
        assert!(matches!(Bench::new().plan(), Seen::Accepted));
        assert!(matches!(Bench::new().plan_in_session(), Seen::Accepted));
        let mut bench = Bench::new();
        assert!(matches!(bench.decode_in_session(), Seen::Accepted));
        assert!(bench.launches() == 1 && bench.out.iter().all(|x| x.is_finite()));
        assert!(matches!(bench.append_in_session(), Seen::Accepted));
        assert!(bench.launches() == 1 && bench.is_changed);
    }
}
