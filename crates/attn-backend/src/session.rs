//! A session: one cache, its workspace and its backend.

use crate::normal_decode::normal_decode;
use crate::validate::{self, Facts, Scratch};
use crate::{
    Backend, BackendId, Descriptor, DeviceSlice, Error, Executor, Input, Memory, NormalDecode, Output,
    Refusal, Selection, Stream,
};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan, SplitPolicy};
use attn_tune::Level;
use kv_quant::{CacheLayout, FloatSlice, FloatSliceMut, PageCopy};

/// How a session is opened.
#[derive(Debug, Default)]
pub struct SessionOptions<'a> {
    /// Where the cache lies.
    pub memory: Memory<'a>,
    /// The caller's queue; the backend makes its own otherwise.
    pub stream: Option<Stream>,
    /// How steps are cut, whatever their lengths: what a captured graph needs, whose grid is fixed. Otherwise the backend
    /// chooses step by step, under the descriptor's policy.
    pub split: Option<SplitConfig>,
    /// Where such choices come from; otherwise what [`TUNE_VARIABLE`](attn_tune::TUNE_VARIABLE) says.
    pub tune: Option<Level>,
    /// Sizes to make room for.
    pub expect: Option<Expect>,
    /// The caller's word that between one decode and the next nothing writes the cache but appends through this session of
    /// at most `q_len` tokens a request, and at least one kernel begins only when all before it have ended, as an append does:
    /// a decode then fetches all but the newest tokens while the work queued before it still runs. On a GPU that is 0.3 to
    /// 3 us of every step.
    pub history_ready: bool,
}

/// The largest step that will come. Room is made for it at opening; a larger one allocates once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expect {
    /// Requests of a step.
    pub batch: usize,
    /// Tokens of a request.
    pub kv_len: u32,
    /// Tokens of one append.
    pub append_tokens: usize,
}

/// A kind of step that the session runs.
#[derive(Clone, Debug)]
struct Step {
    /// With the `q_len` of the latest plan.
    spec: DecodeSpec,
    /// The descriptor's.
    max_q_len: u32,
}

/// The latest plan and what it was made from.
#[derive(Debug, Default)]
struct Planned {
    /// Index of the step; `None` before the first plan and after a failed one.
    step: Option<usize>,
    plan: SplitPlan,
    kv_lens: Vec<u32>,
    /// Page indices of all requests end to end.
    pages: Vec<i32>,
    row_starts: Vec<u64>,
}

impl Planned {
    fn request<'a>(&'a self, spec: &'a DecodeSpec) -> DecodeRequest<'a> {
        let page_table = PageTable { pages: &self.pages, rows: PageRows::Starts(&self.row_starts) };
        DecodeRequest { spec, kv_lens: &self.kv_lens, page_table }
    }
}

/// Owns cache, workspace and backend. Reuses its buffers: after warm-up `append`, `plan` and `decode` do not allocate.
///
/// ```
/// use attn_backend::{Descriptor, Registry, SelectOptions, Session, SessionOptions, select};
/// use attn_plan::{DecodeSpec, PageTable};
/// use kv_quant::{CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, ScaleType};
/// let format = CacheFormat::new(1, 64, 32, 32, ScaleType::F16)?;
/// let spec = DecodeSpec { q_type: FloatType::F32, out_type: FloatType::F32, ..DecodeSpec::new(2, 1, 64) };
/// let descriptor = Descriptor::new(CacheLayout::native(format, 4, 16)?, spec);
/// let selection = select(&Registry::builtin(), &descriptor, &SelectOptions::default())?;
/// let mut session = Session::open(&selection, SessionOptions::default())?;
///
/// // One request of two tokens, in the first two slots of page 3. Both have the same value.
/// session.append(FloatSlice::F32(&[0.5; 128]), FloatSlice::F32(&[2.0; 128]), &[48, 49])?;
/// session.plan(&[2], PageTable::padded(&[3], 1))?;
/// let mut out = [0.0; 128];
/// session.decode(FloatSlice::F32(&[1.0; 128]), FloatSliceMut::F32(&mut out), None)?;
/// assert!(out.iter().all(|x| (x - 2.0).abs() < 0.01));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Session<'a> {
    facts: Facts,
    steps: Vec<Step>,
    split: SplitConfig,
    /// Whether the caller has set `split`; the backend may choose another for each step otherwise.
    is_split_fixed: bool,
    planned: Planned,
    scratch: Scratch,
    executor: Box<dyn Executor + 'a>,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { facts, steps, split, .. } = self;
        f.debug_struct("Session")
            .field("facts", facts)
            .field("steps", steps)
            .field("split", split)
            .finish_non_exhaustive()
    }
}

impl<'a> Session<'a> {
    /// Opens the selected backend.
    ///
    /// # Errors
    /// Memory that the backend cannot use or that is too short, a split that no plan can follow or that the backend
    /// does not offer, out of memory, a device that failed.
    pub fn open(selection: &Selection, options: SessionOptions<'a>) -> Result<Self, Error> {
        Self::on(selection.chosen().as_ref(), selection.descriptor(), options)
    }

    /// Opens a backend that nobody has tried yet.
    pub(crate) fn on(
        backend: &dyn Backend,
        descriptor: &Descriptor,
        options: SessionOptions<'a>,
    ) -> Result<Self, Error> {
        descriptor.check()?;
        let SessionOptions { memory, stream, split, tune, expect, history_ready } = options;
        let capability = backend.capability();
        validate::memory(&descriptor.layout, &memory, &backend.id(), &capability)?;
        let is_split_fixed = split.is_some();
        let level = tune.map_or_else(Level::from_env, Ok)?;
        let split = split.unwrap_or_else(|| backend.split_config(descriptor));
        split.check()?;
        if let SplitPolicy::BatchInvariant { .. } = split.policy
            && !capability.batch_invariant
        {
            let missing = vec![crate::Missing::new("split policy", split.policy, "throughput")];
            return Err(Error::Refused { backend: backend.id(), refusal: Refusal::Unsupported { missing } });
        }
        let facts = Facts {
            backend: backend.id(),
            layout: descriptor.layout.clone(),
            device_arrays: capability.device_arrays,
            is_read_only: matches!(memory, Memory::HostReadOnly(_)),
            device_cache: match &memory {
                Memory::Device(buffers) => buffers.clone(),
                _ => Vec::new(),
            },
        };
        let mut executor = backend.open(descriptor, memory, stream)?;
        if history_ready {
            executor.promise_history();
        }
        if !is_split_fixed {
            executor.tune(level, expect.as_ref())?;
        }
        let step = |spec: &DecodeSpec| Step { spec: spec.clone(), max_q_len: spec.q_len };
        let steps = descriptor.specs().map(step).collect();
        let mut session = Self {
            facts,
            steps,
            split,
            is_split_fixed,
            planned: Planned::default(),
            scratch: Scratch::default(),
            executor,
        };
        if let Some(expect) = expect {
            session.reserve(&expect)?;
        }
        Ok(session)
    }

    fn reserve(&mut self, expect: &Expect) -> Result<(), Error> {
        let Self { facts, steps, split, planned, scratch, executor, .. } = self;
        let num_pages =
            (expect.kv_len.div_ceil(facts.layout.page_len()) as usize).saturating_mul(expect.batch);
        try_reserve(&mut planned.kv_lens, expect.batch, "lengths")?;
        try_reserve(&mut planned.row_starts, expect.batch, "row starts")?;
        try_reserve(&mut planned.pages, num_pages, "page indices")?;
        try_reserve(&mut scratch.slots, expect.append_tokens, "slots")?;
        planned.kv_lens.resize(expect.batch, expect.kv_len);
        for Step { spec, .. } in steps {
            planned.plan.update(spec, &planned.kv_lens, split)?;
            executor.reserve(spec, expect)?;
        }
        planned.kv_lens.clear();
        Ok(())
    }

    /// The backend's name.
    pub fn backend(&self) -> &BackendId {
        &self.facts.backend
    }

    /// The cache's layout.
    pub fn layout(&self) -> &CacheLayout {
        &self.facts.layout
    }

    /// How steps are cut: the latest one, where the backend chooses step by step.
    pub fn split(&self) -> &SplitConfig {
        &self.split
    }

    /// Why the planned step is cut as it is, in words: which measured step or which expectation of the cost model decided.
    /// `None` without a plan, with a split that the caller has set, and where the backend knows one way only. Allocates.
    pub fn explain_split(&mut self) -> Option<String> {
        let Self { steps, is_split_fixed, planned, executor, .. } = self;
        let Step { spec, .. } = planned.step.and_then(|step| steps.get(step))?;
        if *is_split_fixed { None } else { executor.explain_split(spec, &planned.kv_lens) }
    }

    /// Cuts further steps like this, whatever their lengths. A plan made before is dropped.
    ///
    /// # Errors
    /// Numbers that no plan can follow; the old ones stay.
    pub fn set_split(&mut self, split: SplitConfig) -> Result<(), Error> {
        split.check()?;
        self.planned.step = None;
        self.split = split;
        self.is_split_fixed = true;
        Ok(())
    }

    /// The latest plan.
    pub fn split_plan(&self) -> &SplitPlan {
        &self.planned.plan
    }

    /// Quantizes `k` and `v`, `[slots.len(), num_kv_heads, head_dim]`, into the slots; -1 skips a token.
    ///
    /// # Errors
    /// Wrong lengths or types, slots out of range or named twice: nothing is written. Non-finite input, a scale beyond
    /// its type: the CPU writes nothing, a device writes the other rows.
    pub fn append(&mut self, k: FloatSlice<'_>, v: FloatSlice<'_>, slots: &[i64]) -> Result<(), Error> {
        self.append_from(Input::Host(k), Input::Host(v), slots)
    }

    /// As [`Self::append`] from device memory; queues the work and does not wait.
    ///
    /// # Errors
    /// As [`Self::append`], and addresses that overlap the cache or are misaligned. Non-finite input is reported by a
    /// later call that waits.
    pub fn append_on_device(&mut self, k: DeviceSlice, v: DeviceSlice, slots: &[i64]) -> Result<(), Error> {
        self.append_from(Input::Device(k), Input::Device(v), slots)
    }

    fn append_from(&mut self, k: Input<'_>, v: Input<'_>, slots: &[i64]) -> Result<(), Error> {
        self.facts.append(&k, &v, slots, &mut self.scratch)?;
        self.executor.append(k, v, slots)
    }

    /// Plans the next step with the descriptor's spec. `kv_lens` count the new tokens, which are appended already.
    ///
    /// # Errors
    /// Lengths, rows and page indices that do not fit. There is no plan afterwards.
    pub fn plan(&mut self, kv_lens: &[u32], page_table: PageTable<'_>) -> Result<(), Error> {
        let q_len = self.steps.first().map_or(1, |step| step.max_q_len);
        self.plan_step(0, q_len, kv_lens, page_table)
    }

    /// Plans the next step with any spec of the descriptor. `q_len` may be smaller than there (the last chunk of a
    /// prefill); everything else is equal.
    ///
    /// # Errors
    /// As [`Self::plan`]; [`Error::SpecNotSelected`].
    pub fn plan_for(
        &mut self,
        spec: &DecodeSpec,
        kv_lens: &[u32],
        page_table: PageTable<'_>,
    ) -> Result<(), Error> {
        self.planned.step = None;
        validate::spec(&self.facts.layout, spec)?;
        let step = self.steps.iter().position(|step| step.covers(spec));
        let step = step.ok_or_else(|| Error::SpecNotSelected {
            asked: spec.to_string(),
            opened: self.steps.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        })?;
        self.plan_step(step, spec.q_len, kv_lens, page_table)
    }

    fn plan_step(
        &mut self,
        step: usize,
        q_len: u32,
        kv_lens: &[u32],
        page_table: PageTable<'_>,
    ) -> Result<(), Error> {
        let Self { facts, steps, split, is_split_fixed, planned, executor, .. } = self;
        planned.step = None;
        let Some(Step { spec, .. }) = steps.get_mut(step) else { return Err(Error::NoPlan) };
        spec.q_len = q_len;
        facts.plan(&DecodeRequest { spec, kv_lens, page_table })?;
        planned.kv_lens.clear();
        planned.kv_lens.extend_from_slice(kv_lens);
        planned.pages.clear();
        planned.row_starts.clear();
        for (request, &kv_len) in kv_lens.iter().enumerate() {
            planned.row_starts.push(planned.pages.len() as u64);
            let num_pages = kv_len.div_ceil(facts.layout.page_len()) as usize;
            planned.pages.extend_from_slice(page_table.row(request, num_pages).unwrap_or(&[]));
        }
        if !*is_split_fixed && let Some(better) = executor.split_config(spec, kv_lens) {
            *split = better;
        }
        planned.plan.update(spec, kv_lens, split)?;
        executor.plan(&planned.request(spec), &planned.plan)?;
        planned.step = Some(step);
        Ok(())
    }

    /// Runs the planned step: q and out `[batch, q_len, num_q_heads, head_dim]`, lse `[batch, q_len, num_q_heads]`.
    ///
    /// # Errors
    /// No plan, wrong lengths or types, lse given without being wanted or the reverse.
    pub fn decode(
        &mut self,
        q: FloatSlice<'_>,
        out: FloatSliceMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let lse = lse.map(|lse| Output::Host(FloatSliceMut::F32(lse)));
        self.decode_into(Input::Host(q), Output::Host(out), lse)
    }

    /// As [`Self::decode`] on device memory; queues the work and does not wait.
    ///
    /// # Errors
    /// As [`Self::decode`], and overlapping or misaligned addresses.
    pub fn decode_on_device(
        &mut self,
        q: DeviceSlice,
        out: DeviceSlice,
        lse: Option<DeviceSlice>,
    ) -> Result<(), Error> {
        self.decode_into(Input::Device(q), Output::Device(out), lse.map(Output::Device))
    }

    fn decode_into(&mut self, q: Input<'_>, out: Output<'_>, lse: Option<Output<'_>>) -> Result<(), Error> {
        let Self { facts, steps, planned, executor, .. } = self;
        let Step { spec, .. } = planned.step.and_then(|step| steps.get(step)).ok_or(Error::NoPlan)?;
        facts.decode(spec, planned.kv_lens.len(), &q, &out, lse.as_ref())?;
        let step = NormalDecode { request: planned.request(spec), plan: &planned.plan, q, out, lse };
        normal_decode(executor.as_mut(), step)
    }

    /// Copies whole pages: what a fork does before it writes to a shared page.
    ///
    /// # Errors
    /// A page out of range; a page that one copy writes and another touches.
    pub fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        self.facts.copies(copies, &mut self.scratch)?;
        self.executor.copy_pages(copies)
    }

    /// Reads raw bytes of a cache buffer; waits for queued work.
    ///
    /// # Errors
    /// [`Error::ByteRange`].
    pub fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.facts.byte_range(buffer_idx, offset, bytes.len())?;
        self.executor.read_bytes(buffer_idx, offset, bytes)
    }

    /// Overwrites raw bytes of a cache buffer, e.g. with poison, or with a page that was stored elsewhere.
    ///
    /// # Errors
    /// [`Error::ByteRange`], [`Error::ReadOnly`].
    pub fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.facts.writable()?;
        self.facts.byte_range(buffer_idx, offset, bytes.len())?;
        self.executor.write_bytes(buffer_idx, offset, bytes)
    }

    /// Waits for queued work.
    ///
    /// # Errors
    /// Errors of that work, non-finite input of an append on a device among them.
    pub fn synchronize(&mut self) -> Result<(), Error> {
        self.executor.synchronize()
    }
}

impl Step {
    /// Whether the session was opened for `asked`, or for the same with a larger `q_len`.
    fn covers(&self, asked: &DecodeSpec) -> bool {
        let Self { spec: opened, max_q_len } = self;
        // Spelled out, so that a new field cannot be forgotten here; nothing is cloned.
        let DecodeSpec {
            num_q_heads,
            num_kv_heads,
            head_dim,
            q_len,
            softmax_scale,
            window,
            soft_cap,
            alibi_slopes,
            sinks,
            q_type,
            out_type,
            want_lse,
        } = asked;
        q_len <= max_q_len
            && (*num_q_heads, *num_kv_heads, *head_dim)
                == (opened.num_q_heads, opened.num_kv_heads, opened.head_dim)
            && (*softmax_scale, *window, *soft_cap) == (opened.softmax_scale, opened.window, opened.soft_cap)
            && (alibi_slopes, sinks) == (&opened.alibi_slopes, &opened.sinks)
            && (*q_type, *out_type, *want_lse) == (opened.q_type, opened.out_type, opened.want_lse)
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        DecodeSpec { q_len: self.max_q_len, ..self.spec.clone() }.fmt(f)
    }
}

fn try_reserve<T>(items: &mut Vec<T>, count: usize, what: &'static str) -> Result<(), Error> {
    let bytes = (count as u64).saturating_mul(size_of::<T>() as u64);
    items.try_reserve(count).map_err(|_| Error::OutOfMemory { what, bytes })
}
