//! The backend under test, and the two ways to reach it: through a session, or through its executor alone.

use crate::case::Profile;
use crate::compare::Run;
use crate::count::Ledger;
use crate::problem::{Step, Tokens};
use crate::values::Guarded;
use attn_backend::{
    Backend, Capability, Descriptor, Executor, FormatKey, Input, NormalDecode, Operation, OperationKey,
    Output, Refusal, Registry, SelectOptions, Session, SessionOptions, TrialMode,
};
use attn_plan::{DecodeSpec, SplitConfig, SplitPlan};
use kv_quant::{CacheBuffers, CacheLayout, FloatSlice, FloatType, PageCopy};
use std::sync::{Arc, Mutex, OnceLock};

/// A backend under test.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name in the ledger.
    pub name: String,
    /// The backend.
    pub backend: Arc<dyn Backend>,
    /// Where executed cases are entered.
    pub ledger: Arc<Ledger>,
    /// Variants of its own that a long run of random cases must hit.
    pub variants: Vec<String>,
    kept: Kept,
}

/// A cache that stays open, so that a backend keeps what it shares between caches (a device's context and loaded code)
/// while others come and go.
#[derive(Clone, Default)]
struct Kept(Arc<OnceLock<Mutex<Option<Opened>>>>);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

/// How a backend is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// [`Session`]: validates, and hands the backend a page table of its own.
    Session,
    /// The executor as it is: it sees the caller's page table with all that lies past the end of its rows.
    Executor,
}

/// An opened cache on the backend.
pub struct Opened {
    layout: CacheLayout,
    spec: DecodeSpec,
    config: SplitConfig,
    inner: Inner,
}

enum Inner {
    Session(Box<Session<'static>>),
    Executor(Box<dyn Executor>),
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Subject {
    /// A subject of its own.
    pub fn new(backend: Arc<dyn Backend>, ledger: &Arc<Ledger>) -> Self {
        let (name, ledger) = (backend.id().to_string(), Arc::clone(ledger));
        Self { name, backend, ledger, variants: Vec::new(), kept: Kept::default() }
    }

    /// Whether it can run here.
    ///
    /// # Errors
    /// Why not.
    pub fn probe(&self) -> Result<(), Refusal> {
        self.backend.probe().map(|_| ())
    }

    /// Opens a small cache and keeps it, once.
    pub fn keep_open(&self) {
        self.kept.0.get_or_init(|| {
            let case = crate::case::Case::plain(self.tile_len(), 1);
            let config = SplitConfig { tile_len: self.tile_len(), ..SplitConfig::throughput(1) };
            // Where it cannot be opened, the suite's own attempt will say why.
            Mutex::new(self.open(&case.layout_of(1), &case.bare_spec(), config, Route::Executor).ok())
        });
    }

    /// What it offers.
    pub fn capability(&self) -> Capability {
        self.backend.capability()
    }

    /// Tokens of a tile of its own schedule.
    pub fn tile_len(&self) -> u32 {
        let case = crate::case::Case::plain(1, 1);
        let descriptor = Descriptor::new(case.layout_of(1), case.bare_spec());
        self.backend.split_config(&descriptor).tile_len
    }

    /// What of a descriptor it does not offer.
    ///
    /// # Errors
    /// The names of the parts.
    pub fn covers(&self, descriptor: &Descriptor) -> Result<(), String> {
        let missing = self.backend.missing(descriptor);
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = missing.iter().map(|missing| missing.what).collect();
        Err(format!("not offered: {}", names.join(", ")))
    }

    /// `odd` where the backend takes pages of that length, else `even`.
    pub fn page_len(&self, odd: u32, even: u32) -> u32 {
        if self.takes_pages_of(odd) { odd } else { even }
    }

    /// Whether the backend takes pages of a length.
    pub fn takes_pages_of(&self, page_len: u32) -> bool {
        let case = crate::case::Case { page_len, ..crate::case::Case::plain(self.tile_len(), 1) };
        self.backend.missing(&Descriptor::new(case.layout_of(1), case.bare_spec())).is_empty()
    }

    /// The choices of the generators.
    pub fn profile(&self) -> Profile {
        let profile = Profile::new(&self.capability(), self.tile_len());
        profile.with_page_lens(|page_len| self.takes_pages_of(page_len))
    }

    /// The variants of the backend that a long run must have hit.
    pub fn with_variants(self, variants: Vec<String>) -> Self {
        Self { variants, ..self }
    }

    /// Opens a cache of its own.
    ///
    /// # Errors
    /// What the backend said.
    pub fn open(
        &self,
        layout: &CacheLayout,
        spec: &DecodeSpec,
        config: SplitConfig,
        route: Route,
    ) -> Result<Opened, String> {
        let descriptor = Descriptor::new(layout.clone(), spec.clone()).with_split(config.policy);
        let inner = match route {
            Route::Executor => {
                Inner::Executor(self.backend.open(&descriptor, Default::default(), None).map_err(text)?)
            }
            Route::Session => {
                let mut registry = Registry::empty();
                let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
                registry.register(key, Arc::clone(&self.backend));
                let options =
                    SelectOptions { read_environment: false, trial: TrialMode::Skip, ..Default::default() };
                let selection = attn_backend::select(&registry, &descriptor, &options).map_err(text)?;
                let options = SessionOptions { split: Some(config), ..Default::default() };
                Inner::Session(Box::new(Session::open(&selection, options).map_err(text)?))
            }
        };
        Ok(Opened { layout: layout.clone(), spec: spec.clone(), config, inner })
    }
}

impl Opened {
    /// Overwrites the whole cache.
    ///
    /// # Errors
    /// What the backend said.
    pub fn write_image(&mut self, image: &CacheBuffers) -> Result<(), String> {
        for (buffer_idx, bytes) in buffers(&self.layout, image).into_iter().enumerate() {
            match &mut self.inner {
                Inner::Session(session) => session.write_bytes(buffer_idx, 0, bytes).map_err(text)?,
                Inner::Executor(executor) => executor.write_bytes(buffer_idx, 0, bytes).map_err(text)?,
            }
        }
        Ok(())
    }

    /// Says where the cache differs from `image`.
    ///
    /// # Errors
    /// The first byte that differs, or what the backend said.
    pub fn compare_image(&mut self, image: &CacheBuffers) -> Result<(), String> {
        for (buffer_idx, want) in buffers(&self.layout, image).into_iter().enumerate() {
            let mut got = vec![0u8; want.len()];
            match &mut self.inner {
                Inner::Session(session) => session.read_bytes(buffer_idx, 0, &mut got).map_err(text)?,
                Inner::Executor(executor) => executor.read_bytes(buffer_idx, 0, &mut got).map_err(text)?,
            }
            if let Some(i) = (0..want.len()).find(|&i| want[i] != got[i]) {
                return Err(format!(
                    "byte {i} of cache buffer {buffer_idx} is {:#04x}, expected {:#04x}",
                    got[i], want[i]
                ));
            }
        }
        Ok(())
    }

    /// Appends.
    ///
    /// # Errors
    /// What the backend said.
    pub fn append(&mut self, tokens: &Tokens) -> Result<(), String> {
        self.append_slices(tokens.k.as_slice(), tokens.v.as_slice(), &tokens.slots).map_err(text)
    }

    /// Appends, with the error as it is.
    ///
    /// # Errors
    /// The backend's.
    pub fn append_slices(
        &mut self,
        k: FloatSlice<'_>,
        v: FloatSlice<'_>,
        slots: &[i64],
    ) -> Result<(), attn_backend::Error> {
        match &mut self.inner {
            Inner::Session(session) => {
                session.append(k, v, slots)?;
                session.synchronize()
            }
            Inner::Executor(executor) => {
                executor.append(Input::Host(k), Input::Host(v), slots)?;
                executor.synchronize()
            }
        }
    }

    /// Copies whole pages.
    ///
    /// # Errors
    /// What the backend said.
    pub fn copy_pages(&mut self, copies: &[PageCopy]) -> Result<(), String> {
        match &mut self.inner {
            Inner::Session(session) => session.copy_pages(copies).map_err(text),
            Inner::Executor(executor) => executor.copy_pages(copies).map_err(text),
        }
    }

    /// The plan of a step.
    ///
    /// # Errors
    /// What the plan crate said.
    pub fn split_plan(&self, step: &Step) -> Result<SplitPlan, String> {
        SplitPlan::new(&self.spec, &step.kv_lens, &self.config).map_err(text)
    }

    /// Plans and decodes into untouched, guarded outputs.
    ///
    /// # Errors
    /// What the backend said, or which guard it wrote.
    pub fn decode(&mut self, step: &Step) -> Result<Run, String> {
        let request = step.request(&self.spec);
        let batch = request.batch();
        let mut out = Guarded::untouched(self.spec.out_type, self.spec.q_elements(batch));
        let mut lse =
            self.spec.want_lse.then(|| Guarded::untouched(FloatType::F32, self.spec.lse_elements(batch)));
        match &mut self.inner {
            Inner::Session(session) => {
                session.plan(&step.kv_lens, request.page_table).map_err(text)?;
                let lse = match lse.as_mut().map(Guarded::as_mut) {
                    Some(kv_quant::FloatSliceMut::F32(lse)) => Some(lse),
                    _ => None,
                };
                session.decode(step.q.as_slice(), out.as_mut(), lse).map_err(text)?;
                session.synchronize().map_err(text)?;
            }
            Inner::Executor(executor) => {
                let plan = SplitPlan::new(&self.spec, &step.kv_lens, &self.config).map_err(text)?;
                executor.plan(&request, &plan).map_err(text)?;
                let lse = lse.as_mut().map(|lse| Output::Host(lse.as_mut()));
                let (q, out) = (Input::Host(step.q.as_slice()), Output::Host(out.as_mut()));
                executor.normal_decode(NormalDecode { request, plan: &plan, q, out, lse }).map_err(text)?;
                executor.synchronize().map_err(text)?;
            }
        }
        Ok(Run { out: out.into_values()?, lse: lse.map(Guarded::into_values).transpose()? })
    }
}

/// The buffers of a cache as slices.
pub fn buffers<'a>(layout: &CacheLayout, image: &'a CacheBuffers) -> Vec<&'a [u8]> {
    (0..layout.buffer_bytes().len()).map(|buffer_idx| image.view().buffer(buffer_idx)).collect()
}
