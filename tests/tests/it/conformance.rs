//! The conformance suite, stamped on every backend of the registry.

use attn_backend::{Backend, BackendId, CpuInt8Backend, FormatKey, Operation, OperationKey, Registry};
use attn_tests::conformance::{Effort, SUITES, Suite};
use attn_tests::count::{Ledger, num_cases};
use attn_tests::forced_isa::ForcedIsa;
use attn_tests::subject::Subject;
use cpu_reference::{DotProduct, Isa};
use libtest_mimic::{Failed, Trial};
use std::sync::Arc;
use std::time::Instant;

/// Set, and not to 0, where a missing GPU is a failure.
const REQUIRE_GPU: &str = "KV8_REQUIRE_GPU";

/// Rounds for the kernel by itself: more than 10^8 elements.
const APPEND_ROUNDS: usize = 20;

pub fn trials(ledger: &Arc<Ledger>) -> Vec<Trial> {
    let registry = Registry::builtin();
    let key = OperationKey { format: FormatKey::INT8_GROUP, operation: Operation::NormalDecode };
    let candidates = registry.candidates(&key).expect("a backend in every build");
    let all = num_cases(2000);
    let mut trials: Vec<Trial> = Vec::new();
    for backend in candidates.iter().filter(|backend| backend.id() != BackendId::CUDA) {
        trials.extend(of_backend(Subject::new(Arc::clone(backend), ledger), all, ledger));
    }
    trials.extend(cuda(all, ledger));
    // What a caller who wants integer dot products registers.
    trials.extend(of_backend(Subject::new(Arc::new(CpuInt8Backend), ledger), all / 8, ledger));
    // The preferred instruction set is what the CPU backend itself runs.
    for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::best()) {
        let forced: Arc<dyn Backend> = Arc::new(ForcedIsa { isa, dot: DotProduct::F32 });
        trials.extend(of_backend(Subject::new(forced, ledger), all / 4, ledger));
    }
    // Integer dot products on each of the others, also those that have no instructions for them.
    for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::best()) {
        let forced: Arc<dyn Backend> = Arc::new(ForcedIsa { isa, dot: DotProduct::Int8 });
        trials.extend(of_backend(Subject::new(forced, ledger), all / 8, ledger));
    }
    trials
}

/// The kernels four times: behind the backend and by themselves between canaries, each with f16 operands and without,
/// so that what would hide in f16's rounding shows. The backend allocates for each case, hence fewer of them.
#[cfg(feature = "cuda")]
fn cuda(all: u32, ledger: &Arc<Ledger>) -> Vec<Trial> {
    use attn_kernels::key::{Arithmetic, INSTANCES, KernelKind};
    use attn_tests::guarded::Guarded;

    let mut trials = Vec::new();
    for (arithmetic, share) in [(Arithmetic::Mma, 1), (Arithmetic::F32, 2)] {
        let rows = INSTANCES.iter().map(|instance| instance.key);
        let rows = rows.filter(|key| key.kind == KernelKind::Stage1 && key.arithmetic == arithmetic);
        let variants: Vec<String> = rows.map(|key| key.to_string()).collect();
        let backend = attn_backend::CudaBackend { arithmetic, ..Default::default() };
        let backends: [(Arc<dyn Backend>, u32); 2] =
            [(Arc::new(backend), 16), (Arc::new(Guarded { arithmetic, heads_per_block: None }), share)];
        for (backend, share) in backends {
            let subject = Subject::new(backend, ledger).with_variants(variants.clone());
            trials.extend(of_backend(subject, all / share, ledger));
        }
    }
    trials
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: u32, ledger: &Arc<Ledger>) -> Vec<Trial> {
    vec![absent(BackendId::CUDA, "not in this build: feature `cuda` is off".to_owned(), ledger)]
}

fn of_backend(subject: Subject, num_cases: u32, ledger: &Arc<Ledger>) -> Vec<Trial> {
    if let Err(refusal) = subject.probe() {
        return vec![absent(subject.backend.id(), refusal.to_string(), ledger)];
    }
    // On the host, a million tokens are for thorough runs.
    let is_host = !subject.name.starts_with("cuda");
    let append_rounds = if subject.name == "cuda-guarded" { APPEND_ROUNDS } else { 1 };
    let effort = Effort { num_cases, append_rounds, has_longest: !is_host || num_cases >= 10_000 };
    let stamp = |suite: &'static Suite| {
        let subject = subject.clone();
        Trial::test(format!("conformance::{}::{}", subject.name, suite.name), move || {
            #[cfg(feature = "cuda")]
            let _shared = attn_tests::gpu::DEVICE.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            subject.keep_open();
            let begin = Instant::now();
            let outcome = (suite.run)(&subject, &effort);
            // Not judged; said for whoever plans a run.
            subject.ledger.took(&subject.name, suite.name, begin.elapsed());
            outcome.map_err(Failed::from)
        })
    };
    SUITES.iter().map(stamp).collect()
}

/// A backend that cannot run here: said aloud, and a failure where a GPU is required.
pub fn absent(backend: BackendId, reason: String, ledger: &Arc<Ledger>) -> Trial {
    let ledger = Arc::clone(ledger);
    Trial::test(format!("conformance::{backend}::is_available"), move || {
        ledger.skipped(backend.as_str(), &format!("the whole suite: {reason}"));
        let is_set = std::env::var(REQUIRE_GPU).is_ok_and(|value| value != "0" && !value.is_empty());
        // An instruction set that this processor lacks is no GPU.
        let is_required = is_set && backend.as_str().starts_with(BackendId::CUDA.as_str());
        if is_required {
            Err(format!("{REQUIRE_GPU} is set, and {backend} is {reason}").into())
        } else {
            Ok(())
        }
    })
}
