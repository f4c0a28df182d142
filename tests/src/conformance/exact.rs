//! Results that arithmetic without a fault gives exactly.

use super::judge::{Verdict, fill, judge_problem};
use crate::case::{Case, Data};
use crate::problem::Problem;
use crate::subject::{Route, Subject};
use crate::values::Values;
use cpu_reference::oracle;
use kv_quant::FloatType;

/// q = 0 and integer V: the exact mean. One token takes all: its V row. V constant: that constant. Equal logits of any
/// size: the exact mean. Lengths are powers of two, so that the mean needs no rounding.
///
/// # Errors
/// The first element whose bits are others.
pub fn exact(subject: &Subject) -> Result<(), String> {
    let tile = subject.tile_len();
    let mut cases = Vec::new();
    for kv_len in [1, 2, 16, 64, 4 * tile.next_power_of_two(), 1024] {
        for data in [
            Data::Mean,
            Data::OneHot(0),
            Data::OneHot(kv_len / 2),
            Data::OneHot(kv_len - 1),
            Data::Ones,
            Data::EqualLogits(-524_288.0),
            Data::EqualLogits(60_000.0),
            Data::EqualLogits(1.0),
        ] {
            for out_type in FloatType::ALL {
                let case = Case { out_type, gqa_group: 2, num_kv_heads: 2, ..Case::plain(tile, kv_len) };
                let case = Case { k_group_len: 8, v_group_len: 64, ..case }.with_data(data);
                cases.push(case.clone());
                cases.push(case.batch_invariant(1));
            }
        }
    }
    for (seed, case) in cases.into_iter().enumerate() {
        let case = Case { seed: seed as u64, ..case };
        one(subject, &case).map_err(|error| format!("{error}\n  in {case:?}"))?;
    }
    Ok(())
}

fn one(subject: &Subject, case: &Case) -> Result<(), String> {
    let problem = Problem::new(case);
    if let Verdict::Skipped(_) = judge_problem(subject, "exact", &problem)? {
        return Ok(());
    }
    let mut opened = subject.open(&problem.layout, &problem.spec, case.config, Route::Executor)?;
    let plan = opened.split_plan(&problem.step)?;
    // A weight that is rounded on its own no longer cancels against the denominator, nor does a sum in another order.
    let is_rounded = subject.backend.arithmetic(&problem.spec, &plan).p_unit > 0.0;
    if case.data == Data::Ones && (is_rounded || case.out_type == FloatType::F32) {
        return Ok(());
    }
    fill(&mut opened, &problem)?;
    let run = opened.decode(&problem.step)?;
    let request = problem.request();
    let q = problem.step.q.as_slice();
    let expected = oracle::decode_request(&problem.layout, &problem.image.view(), &request, q)
        .map_err(|error| error.to_string())?;
    // Integers over a power of two: what the oracle's own rounding left is removed.
    let grain = f64::from(1 << 20);
    let exact = |x: &f64| ((x * grain).round() / grain) as f32;
    let expected: Vec<f32> = expected.iter().flat_map(|o| &o.out).map(exact).collect();
    let expected = Values::from_f32(case.out_type, &expected);
    // Equal as numbers: the sign of a zero is nobody's.
    match (0..expected.len()).find(|&i| run.out.get(i) != expected.get(i)) {
        None => Ok(()),
        Some(i) => Err(format!("out[{i}] is {:e}, exact is {:e}", run.out.get(i), expected.get(i))),
    }
}
