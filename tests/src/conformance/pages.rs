//! Sequences that grow, fork, are cut back and freed over one pool of pages: each decodes as if it were alone.

use crate::case::Case;
use crate::compare::{self, Run};
use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::problem::Step;
use crate::subject::{Opened, Route, Subject};
use crate::values::Values;
use attn_plan::DecodeSpec;
use cpu_reference::oracle::{self, OracleOutput};
use kv_quant::{AppendSlots, CacheLayout, FloatSlice, LayoutKind, PagePool, SequenceId};

/// A sequence as a plain vector of rows.
struct Model {
    id: SequenceId,
    k: Vec<f32>,
    v: Vec<f32>,
}

struct Engine<'a> {
    case: &'a Case,
    spec: DecodeSpec,
    layout: CacheLayout,
    opened: Opened,
    pool: PagePool,
    slots: AppendSlots,
    models: Vec<Model>,
    numbers: Numbers,
}

const NUM_PAGES: u64 = 40;

/// Random appends, forks, truncations and frees, a decode of all sequences after every few.
///
/// # Errors
/// The first decode that is not what the plain vectors say.
pub fn pages(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    for (seed, layout) in subject.capability().layouts.into_iter().enumerate() {
        let page_len =
            if layout == LayoutKind::LightLlm { 1 } else { [4, 1, 16, subject.page_len(7, 8)][seed % 4] };
        let case = Case {
            layout,
            page_len,
            num_kv_heads: 2,
            gqa_group: 2,
            seed: seed as u64,
            ..Case::small(tile, 0)
        };
        let mut engine = Engine::new(subject, &case)?;
        for step in 0..60 {
            engine.change()?;
            if step % 3 == 2 {
                engine.decode(subject).map_err(|error| format!("step {step}: {error}\n  in {case:?}"))?;
            }
        }
    }
    Ok(())
}

impl<'a> Engine<'a> {
    fn new(subject: &Subject, case: &'a Case) -> Result<Self, String> {
        let (spec, layout) = (case.bare_spec(), case.layout_of(NUM_PAGES));
        let mut opened = subject.open(&layout, &spec, case.config, Route::Session)?;
        opened.write_image(&poison::dead_cache(&layout, Fill::Poison))?;
        let pool = PagePool::for_layout(&layout);
        let numbers = Numbers::new(case.seed, 6);
        Ok(Self {
            case,
            spec,
            layout,
            opened,
            pool,
            slots: AppendSlots::default(),
            models: Vec::new(),
            numbers,
        })
    }

    fn row(&self) -> usize {
        (self.case.num_kv_heads * self.case.head_dim) as usize
    }

    fn change(&mut self) -> Result<(), String> {
        let text = |error: kv_quant::PoolError| error.to_string();
        let which = self.numbers.below(self.models.len());
        match self.numbers.below(8) {
            _ if self.models.is_empty() => {
                let id = self.pool.allocate();
                self.models.push(Model { id, k: Vec::new(), v: Vec::new() });
            }
            0 if self.models.len() < 6 => {
                let id = self.pool.allocate();
                self.models.push(Model { id, k: Vec::new(), v: Vec::new() });
            }
            1 | 2 if self.models.len() < 6 => {
                let keep = self.numbers.below(self.models[which].k.len() / self.row() + 1);
                let id = self.pool.fork(self.models[which].id, keep as u32).map_err(text)?;
                let end = keep * self.row();
                let (k, v) = (self.models[which].k[..end].to_vec(), self.models[which].v[..end].to_vec());
                self.models.push(Model { id, k, v });
            }
            3 => {
                let keep = self.numbers.below(self.models[which].k.len() / self.row() + 1);
                self.pool.truncate(self.models[which].id, keep as u32).map_err(text)?;
                let end = keep * self.row();
                self.models[which].k.truncate(end);
                self.models[which].v.truncate(end);
            }
            4 if self.models.len() > 3 => {
                let model = self.models.swap_remove(which);
                self.pool.free(model.id).map_err(text)?;
            }
            _ => self.append(which)?,
        }
        Ok(())
    }

    /// Appends to two sequences at once, if the pool has the pages.
    fn append(&mut self, which: usize) -> Result<(), String> {
        let mut batch = vec![(which, 1 + self.numbers.below(9))];
        if self.models.len() > 1 {
            batch.push(((which + 1) % self.models.len(), 1));
        }
        let ids: Vec<(SequenceId, u32)> =
            batch.iter().map(|&(model, n)| (self.models[model].id, n as u32)).collect();
        match self.pool.append_batch(&ids, &mut self.slots) {
            Err(kv_quant::PoolError::OutOfPages { .. }) => return Ok(()),
            other => other.map_err(|error| error.to_string())?,
        }
        let num_tokens: usize = batch.iter().map(|(_, n)| n).sum();
        let (k, v) =
            (self.numbers.normals(num_tokens * self.row()), self.numbers.normals(num_tokens * self.row()));
        self.opened.copy_pages(self.slots.copies())?;
        self.opened
            .append_slices(FloatSlice::F32(&k), FloatSlice::F32(&v), self.slots.slots())
            .map_err(|error| error.to_string())?;
        let mut first = 0;
        for (model, n) in batch {
            let end = first + n * self.row();
            self.models[model].k.extend(&k[first..end]);
            self.models[model].v.extend(&v[first..end]);
            first = end;
        }
        Ok(())
    }

    fn decode(&mut self, subject: &Subject) -> Result<(), String> {
        let ids: Vec<SequenceId> = self.models.iter().map(|model| model.id).collect();
        let (mut pages, mut row_starts, mut kv_lens) = (Vec::new(), Vec::new(), Vec::new());
        self.pool.fill_page_table(&ids, &mut pages, &mut row_starts).map_err(|error| error.to_string())?;
        self.pool.fill_lens(&ids, &mut kv_lens).map_err(|error| error.to_string())?;
        let q = Values::from_f32(self.case.q_type, &self.numbers.normals(self.spec.q_elements(ids.len())));
        let step = Step { kv_lens, pages, row_starts, stride: None, q };
        let run = self.opened.decode(&step)?;
        let plan = self.opened.split_plan(&step)?;
        let expected = self.expected(&step)?;
        let arithmetic = subject.backend.arithmetic(&self.spec, &plan);
        let worst = compare::with_oracle(&self.spec, &expected, &arithmetic, &run)?;
        subject.ledger.error_ratio(&subject.name, worst, || "pages".to_owned());
        subject.ledger.ran(&subject.name, "pages", 1);
        Ok(())
    }

    fn expected(&self, step: &Step) -> Result<Vec<OracleOutput>, String> {
        let per_request = self.spec.q_elements(1);
        let mut outputs = Vec::new();
        for (request, model) in self.models.iter().enumerate() {
            let kv_len = step.kv_lens[request];
            if kv_len as usize * self.row() != model.k.len() {
                return Err(format!("sequence {request} has {kv_len} tokens in the pool"));
            }
            // A cache of its own, filled in order.
            let mut case = self.case.clone();
            (case.layout, case.page_len) = (LayoutKind::Nhd, 1);
            let layout = case.layout_of(u64::from(kv_len.max(1)));
            let mut cache = poison::dead_cache(&layout, Fill::Zeros);
            let slots: Vec<i64> = (0..i64::from(kv_len)).collect();
            let (k, v) = (FloatSlice::F32(&model.k), FloatSlice::F32(&model.v));
            kv_quant::append(&layout, &mut cache.view_mut(), k, v, &slots)
                .map_err(|error| error.to_string())?;
            let own = Step {
                kv_lens: vec![kv_len],
                pages: (0..kv_len as i32).collect(),
                row_starts: vec![0],
                stride: None,
                q: step.q.part(request * per_request..(request + 1) * per_request),
            };
            let output =
                oracle::decode_request(&layout, &cache.view(), &own.request(&self.spec), own.q.as_slice());
            outputs.extend(output.map_err(|error| error.to_string())?);
        }
        assert_eq!(self.layout.num_pages(), self.pool.num_pages());
        Ok(outputs)
    }
}

/// Decodes the front and the back of a sequence as two requests and merges them by their lse: the whole, within the
/// bounds of the parts.
///
/// # Errors
/// The first element that is beyond them.
pub fn partial_results(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    for seed in 0..24u64 {
        let mut numbers = Numbers::new(seed, 7);
        let (front, back) = (16 * (1 + numbers.below(20)) as u32, 1 + numbers.below(150) as u32);
        let case =
            Case { seed, num_kv_heads: 2, gqa_group: 3, page_len: 16, ..Case::plain(tile, front + back) };
        parts(subject, &case, front).map_err(|error| format!("{error}\n  in {case:?}"))?;
        subject.ledger.ran(&subject.name, "merged parts", 1);
    }
    Ok(())
}

fn parts(subject: &Subject, case: &Case, front: u32) -> Result<(), String> {
    let problem = crate::problem::Problem::new(case);
    let mut opened = subject.open(&problem.layout, &problem.spec, case.config, Route::Session)?;
    opened.write_image(&problem.image)?;
    let start = problem.step.row_starts[0];
    let q = problem.step.select(&problem.spec, &[0, 0, 0]).q;
    let kv_len = problem.step.kv_lens[0];
    let step = Step {
        kv_lens: vec![kv_len, front, kv_len - front],
        pages: problem.step.pages.clone(),
        row_starts: vec![start, start, start + u64::from(front / case.page_len)],
        stride: None,
        q,
    };
    let run = opened.decode(&step)?;
    let request = step.request(&problem.spec);
    let expected =
        oracle::decode_request(&problem.layout, &problem.image.view(), &request, step.q.as_slice())
            .map_err(|error| error.to_string())?;
    let arithmetic = subject.backend.arithmetic(&problem.spec, &opened.split_plan(&step)?);
    compare::with_oracle(&problem.spec, &expected, &arithmetic, &run)?;
    let bounds: Vec<Vec<f64>> = expected.iter().map(|part| part.bound(&arithmetic)).collect();
    let lse_bounds: Vec<Vec<f64>> = expected.iter().map(|part| part.lse_bound(&arithmetic)).collect();
    let [whole, first, second] = [0, 1, 2].map(|part| run.request(&problem.spec, part));
    let head_dim = problem.spec.head_dim as usize;
    let lse = |run: &Run, row: usize| run.lse.as_ref().map_or(f64::NAN, |lse| lse.get(row));
    for i in 0..whole.out.len() {
        let row = i / head_dim;
        let (a, b) = (lse(&first, row), lse(&second, row));
        let lse_of_both = a.max(b) + ((a - a.max(b)).exp() + (b - a.max(b)).exp()).ln();
        let (p, r) = ((a - lse_of_both).exp(), (b - lse_of_both).exp());
        let merged = p * first.out.get(i) + r * second.out.get(i);
        // A weight is off by at most the sum of both lse errors, relative.
        let weight_error = (2.0 * (lse_bounds[1][row] + lse_bounds[2][row])).exp_m1();
        let spread = p * first.out.get(i).abs() + r * second.out.get(i).abs();
        let bound = bounds[0][i] + p * bounds[1][i] + r * bounds[2][i] + weight_error * spread + 1e-12;
        if (merged - whole.out.get(i)).abs() > bound {
            return Err(format!("out[{i}]: parts merge to {merged:e}, the whole is {:e}", whole.out.get(i)));
        }
    }
    Ok(())
}
