//! A session: one cache, its workspace and its backend.

use crate::{BackendId, DeviceSlice, Error, Executor, Input, Memory, Output, Selection, Stream};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitConfig, SplitPlan};
use kv_quant::{CacheLayout, FloatSlice, FloatSliceMut, PageCopy};

/// How a session is opened.
#[derive(Debug, Default)]
pub struct SessionOptions<'a> {
    /// Where the cache lies.
    pub memory: Memory<'a>,
    /// The caller's queue; the backend makes its own otherwise.
    pub stream: Option<Stream>,
    /// How steps are cut; otherwise the backend's choice under the descriptor's policy.
    pub split: Option<SplitConfig>,
    /// Sizes to warm up for.
    pub expect: Option<Expect>,
}

/// The largest step that will come. Buffers are made for it at opening, so that nothing is allocated afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expect {
    /// Requests of a step.
    pub batch: usize,
    /// Tokens of a request.
    pub kv_len: u32,
    /// Tokens of one append.
    pub append_tokens: usize,
}

/// Owns cache, workspace and backend. Reuses its buffers: after warm-up `append`, `plan` and `decode` do not allocate.
pub struct Session<'a> {
    backend: BackendId,
    layout: CacheLayout,
    specs: Vec<DecodeSpec>,
    current: usize,
    split: SplitConfig,
    plan: SplitPlan,
    kv_lens: Vec<u32>,
    pages: Vec<i32>,
    row_starts: Vec<u64>,
    is_planned: bool,
    executor: Box<dyn Executor + 'a>,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("backend", &self.backend)
            .field("layout", &self.layout)
            .field("specs", &self.specs)
            .field("split", &self.split)
            .finish_non_exhaustive()
    }
}

impl<'a> Session<'a> {
    /// Opens the selected backend.
    ///
    /// # Errors
    /// Memory that the backend cannot use or that is too short, a wrong split, out of memory, a device that failed.
    pub fn open(selection: &Selection, options: SessionOptions<'a>) -> Result<Self, Error> {
        let descriptor = selection.descriptor();
        let split = options.split.unwrap_or_else(|| selection.chosen().split_config(descriptor));
        split.check()?;
        let executor = selection.chosen().open(descriptor, options.memory, options.stream)?;
        Ok(Self {
            backend: selection.backend.clone(),
            layout: descriptor.layout.clone(),
            specs: descriptor.specs().cloned().collect(),
            current: 0,
            split,
            plan: SplitPlan::default(),
            kv_lens: Vec::new(),
            pages: Vec::new(),
            row_starts: Vec::new(),
            is_planned: false,
            executor,
        })
    }

    /// The backend's name.
    pub fn backend(&self) -> &BackendId {
        &self.backend
    }

    /// The cache's layout.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// The latest plan.
    pub fn split_plan(&self) -> &SplitPlan {
        &self.plan
    }

    /// Quantizes `k` and `v`, `[slots.len(), num_kv_heads, head_dim]`, into the slots; -1 skips a token.
    ///
    /// # Errors
    /// Wrong lengths or types, slots out of range or named twice, non-finite input, a scale beyond its type: nothing is
    /// written.
    pub fn append(&mut self, k: FloatSlice<'_>, v: FloatSlice<'_>, slots: &[i64]) -> Result<(), Error> {
        self.executor.append(Input::Host(k), Input::Host(v), slots)
    }

    /// As [`Self::append`] from device memory; queues the work and does not wait.
    ///
    /// # Errors
    /// As [`Self::append`]; non-finite input is reported by a later call that waits.
    pub fn append_on_device(&mut self, k: DeviceSlice, v: DeviceSlice, slots: &[i64]) -> Result<(), Error> {
        self.executor.append(Input::Device(k), Input::Device(v), slots)
    }

    /// Plans the next step with the descriptor's spec. `kv_lens` count the new tokens, which are appended already.
    ///
    /// # Errors
    /// Lengths, rows and page indices that do not fit.
    pub fn plan(&mut self, kv_lens: &[u32], page_table: PageTable<'_>) -> Result<(), Error> {
        self.plan_nth(0, kv_lens, page_table)
    }

    /// Plans the next step with another spec of the descriptor ([`crate::Descriptor::also`]). `q_len` may be smaller
    /// than there (the last chunk of a prefill); everything else is equal.
    ///
    /// # Errors
    /// As [`Self::plan`]; [`Error::SpecNotSelected`].
    pub fn plan_for(
        &mut self,
        spec: &DecodeSpec,
        kv_lens: &[u32],
        page_table: PageTable<'_>,
    ) -> Result<(), Error> {
        let current = self.specs.iter().position(|opened| opened == spec);
        let current = current.ok_or_else(|| Error::SpecNotSelected {
            asked: spec.to_string(),
            opened: self.specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        })?;
        self.plan_nth(current, kv_lens, page_table)
    }

    fn plan_nth(&mut self, current: usize, kv_lens: &[u32], page_table: PageTable<'_>) -> Result<(), Error> {
        self.is_planned = false;
        let Some(spec) = self.specs.get(current) else { return Err(Error::NoPlan) };
        DecodeRequest { spec, kv_lens, page_table }.check(&self.layout)?;
        self.kv_lens.clear();
        self.kv_lens.extend_from_slice(kv_lens);
        self.pages.clear();
        self.row_starts.clear();
        for (request, &kv_len) in kv_lens.iter().enumerate() {
            self.row_starts.push(self.pages.len() as u64);
            let num_pages = kv_len.div_ceil(self.layout.page_len()) as usize;
            self.pages.extend_from_slice(page_table.row(request, num_pages).unwrap_or(&[]));
        }
        self.plan.update(spec, kv_lens, &self.split)?;
        let page_table = PageTable { pages: &self.pages, rows: PageRows::Starts(&self.row_starts) };
        let request = DecodeRequest { spec, kv_lens: &self.kv_lens, page_table };
        self.executor.plan(&request, &self.plan)?;
        self.current = current;
        self.is_planned = true;
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
        self.run(Input::Host(q), Output::Host(out), lse.map(|lse| Output::Host(FloatSliceMut::F32(lse))))
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
        self.run(Input::Device(q), Output::Device(out), lse.map(Output::Device))
    }

    fn run(&mut self, q: Input<'_>, out: Output<'_>, lse: Option<Output<'_>>) -> Result<(), Error> {
        let Some(spec) = self.specs.get(self.current).filter(|_| self.is_planned) else {
            return Err(Error::NoPlan);
        };
        let page_table = PageTable { pages: &self.pages, rows: PageRows::Starts(&self.row_starts) };
        let request = DecodeRequest { spec, kv_lens: &self.kv_lens, page_table };
        let step = crate::NormalDecode { request, plan: &self.plan, q, out, lse };
        crate::normal_decode::normal_decode(self.executor.as_mut(), step)
    }

    /// Copies whole pages: what a fork does before it writes to a shared page.
    ///
    /// # Errors
    /// A page out of range, a page written by one copy and touched by another.
    pub fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), Error> {
        self.executor.copy_pages(copies)
    }

    /// Reads raw bytes of a cache buffer; waits for queued work.
    ///
    /// # Errors
    /// [`Error::ByteRange`].
    pub fn read_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.executor.read_bytes(buffer_idx, offset, bytes)
    }

    /// Overwrites raw bytes of a cache buffer, e.g. with poison, or with a page that was stored elsewhere.
    ///
    /// # Errors
    /// [`Error::ByteRange`].
    pub fn write_bytes(&mut self, buffer_idx: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
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
