//! Measuring at warm-up what the profiles lack: the step that a session expects, on its own cache.

use super::executor::CudaExecutor;
use crate::Expect;
use attn_kernels::device::{DeviceError, Event};
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable, SplitPlan};
use attn_tune::{Candidates, Choice, Level, Point, RunKey, Timing, Tuner};

/// Candidates that are timed: the model's favourites.
const NUM_CANDIDATES: usize = 8;
/// Timed stretches of each; the median counts.
const NUM_SAMPLES: usize = 5;
/// Steps of a stretch.
const STEPS: usize = 8;
/// A candidate must be this much faster than the model's choice.
const LEAST_GAIN: f64 = 0.01;

impl CudaExecutor {
    /// Times the candidates for the expected step of every spec that the profiles say nothing about (or of all, by
    /// [`Level::Force`]), and lets the tuner learn the best. What the cache holds does not matter: nothing depends on it but
    /// the result.
    pub(super) fn warm_up(&mut self, tuner: &mut Tuner, expect: &Expect) -> Result<(), DeviceError> {
        let specs: Vec<DecodeSpec> = self.arrays.iter().map(|arrays| arrays.spec.clone()).collect();
        for spec in &specs {
            self.warm_up_spec(tuner, expect, spec)?;
        }
        let facts = self.device.facts();
        let driver = format!("CUDA {}.{}", facts.driver_version / 1000, facts.driver_version % 1000 / 10);
        if let Some(dir) = attn_tune::user_dir() {
            match tuner.save(&dir, &driver, &attn_tune::today()) {
                Ok(Some(file)) => tracing::info!("learned schedules are kept in {}", file.display()),
                Ok(None) => {}
                // A folder that nobody may write to is no reason not to decode.
                Err(error) => tracing::warn!("cannot keep learned schedules in {}: {error}", dir.display()),
            }
        }
        Ok(())
    }

    fn warm_up_spec(
        &mut self,
        tuner: &mut Tuner,
        expect: &Expect,
        spec: &DecodeSpec,
    ) -> Result<(), DeviceError> {
        let num_pages = self.layout.num_pages();
        let slots = u32::try_from(self.layout.num_slots()).unwrap_or(u32::MAX);
        let kv_lens = vec![expect.kv_len.min(slots); expect.batch];
        let run = RunKey::of_step(spec, &kv_lens);
        let variant = self.decoder(spec)?;
        let Some(chooser) = self.variants.get(variant).and_then(|variant| variant.chooser.clone()) else {
            return Ok(());
        };
        let decision = chooser.choose(&run);
        let is_known = decision.why.is_measured() && tuner.level() != Level::Force;
        if is_known || run.kv_tokens == 0 {
            return Ok(());
        }
        // The pages of the whole cache in turn, so that long requests and large batches read as much memory as they would.
        let row_pages = kv_lens.first().map_or(0, |kv_len| kv_len.div_ceil(self.layout.page_len()));
        let pages: Vec<i32> = (0..u64::from(row_pages) * kv_lens.len() as u64)
            .map(|index| i32::try_from(index % num_pages).unwrap_or(0))
            .collect();
        let page_table = PageTable { pages: &pages, rows: PageRows::Stride(u64::from(row_pages)) };
        let request = DecodeRequest { spec, kv_lens: &kv_lens, page_table };

        let (key, shape) = (*chooser.key(), *chooser.shape());
        let machine = tuner.machine().clone();
        let model = *tuner.model();
        let predict = |choice: &Choice| model.predict(&machine, &key, &shape, &run, choice);
        let mut candidates: Vec<Choice> = Candidates::all(machine.num_sms, &key, &shape, &run).collect();
        candidates.sort_by(|a, b| predict(a).total_cmp(&predict(b)));
        candidates.truncate(NUM_CANDIDATES);
        let model_times = self.time_choice(&request, &decision.choice)?;
        let (mut best, mut best_times) = (decision.choice, model_times);
        for choice in candidates {
            let times = self.time_choice(&request, &choice)?;
            if times.median < best_times.median && times.median < model_times.median * (1.0 - LEAST_GAIN) {
                (best, best_times) = (choice, times);
            }
        }
        let bytes = run.kv_tokens as f64 * f64::from(spec.num_kv_heads) * f64::from(shape.row_bytes);
        let timing = Timing {
            us: best_times.median,
            p10_us: best_times.fastest,
            p90_us: best_times.slowest,
            model_us: model_times.median,
            floor_us: bytes / machine.read_gb_per_s / 1e3,
        };
        tracing::info!("{key}, {run}: {best}, {:.1} us instead of {:.1}", timing.us, timing.model_us);
        tuner.learn(key, run, Point { choice: best, timing });
        Ok(())
    }

    fn time_choice(&mut self, request: &DecodeRequest<'_>, choice: &Choice) -> Result<Times, DeviceError> {
        let spec = request.spec;
        let variant = self.decoder(spec)?;
        let chooser = self.variants.get(variant).and_then(|variant| variant.chooser.as_ref());
        let row_blocks = chooser.map_or(1, |chooser| chooser.shape().row_blocks);
        let split = choice.split(self.policy, spec.num_kv_heads, row_blocks);
        let split = self
            .variants
            .get(variant)
            .map_or(split, |variant| variant.decoder.deal(split, spec.num_kv_heads));
        let plan = SplitPlan::new(spec, request.kv_lens, &split)
            .map_err(|error| DeviceError::Launch { what: error.to_string() })?;
        self.upload_plan(request, &plan)?;
        let elements = spec.q_elements(request.kv_lens.len());
        let q = self.device.alloc_zeroed(elements * spec.q_type.bytes())?;
        let out = self.device.alloc(elements * spec.out_type.bytes())?;
        let (start, end) = (Event::new(&self.device)?, Event::new(&self.device)?);
        let stretch = || {
            start.record(&self.stream)?;
            for _ in 0..STEPS {
                self.launch(request, q.view(), out.view(), None)?;
            }
            end.record(&self.stream)?;
            end.synchronize()?;
            Ok::<_, DeviceError>(end.microseconds_since(&start)? / STEPS as f64)
        };
        stretch()?;
        let mut samples = [0.0; NUM_SAMPLES];
        for sample in &mut samples {
            *sample = stretch()?;
        }
        self.report.take(&self.stream)?;
        samples.sort_by(f64::total_cmp);
        let [fastest, _, median, _, slowest] = samples;
        Ok(Times { fastest, median, slowest })
    }
}

/// Microseconds of a step, over the stretches.
#[derive(Clone, Copy)]
struct Times {
    fastest: f64,
    median: f64,
    slowest: f64,
}
