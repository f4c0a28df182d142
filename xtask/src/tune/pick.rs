//! Which schedules are tried for a step. Where they come from: `Candidates`, beside the cost model.

use attn_plan::{DecodeSpec, Error, SplitConfig, SplitPlan, SplitPolicy};
use attn_tune::{Candidates, Choice, CostModel, Machine, RunKey, Shape, StaticKey};

/// A schedule that the cost model expects to take this many times the least is not tried.
const HOPELESS: f64 = 1.8;

/// What a search begins from.
pub struct Facts<'a> {
    pub machine: &'a Machine,
    pub model: &'a CostModel,
    pub key: &'a StaticKey,
    pub shape: &'a Shape,
    pub spec: &'a DecodeSpec,
    pub kv_lens: &'a [u32],
    pub policy: SplitPolicy,
}

/// At most `count` schedules that differ in what is launched: the model's choice, the best of each other kind (heads of a
/// block and whatever else the kernel sees), those that the model decides from, the best of each number of blocks, shares or tiles of an
/// item, then what the model likes next.
///
/// # Errors
/// A split that no plan can follow.
pub fn pick(facts: &Facts<'_>, first: Choice, count: usize) -> Result<Vec<Choice>, Error> {
    let Facts { machine, model, key, shape, spec, kv_lens, policy } = *facts;
    let run = RunKey::of_step(spec, kv_lens);
    let expected = |choice: &Choice| model.predict(machine, key, shape, &run, choice);
    let mut liked: Vec<(f64, Choice)> = Candidates::all(machine.num_sms, key, shape, &run)
        .map(|choice| (expected(&choice), choice))
        .collect();
    liked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let least = liked.first().map_or(0.0, |(us, _)| *us);
    let split = |choice: &Choice| choice.split(policy, spec.num_kv_heads, shape.row_blocks);
    let of_its_kind = |liked: &[(f64, Choice)], at: usize| {
        let kind = |index: usize| liked.get(index).map(|(_, choice)| kind_of(&split(choice)));
        (0..at).all(|before| kind(before) != kind(at)) && kind(at) != Some(kind_of(&split(&first)))
    };
    let hopeful = liked.iter().take_while(|(us, _)| *us <= HOPELESS * least).count();
    let few: Vec<Choice> = Candidates::few(machine.num_sms, key, shape, &run).collect();
    let of_few = (0..liked.len()).filter(|at| liked.get(*at).is_some_and(|(_, choice)| few.contains(choice)));
    let favourites = (0..hopeful).filter(|at| of_its_kind(&liked, *at));
    let size_of = |at: usize| {
        liked.get(at).map(|(_, choice)| {
            let Choice { num_blocks, heads_per_block, num_shares, item_tiles, .. } = *choice;
            (num_blocks, heads_per_block, num_shares, item_tiles)
        })
    };
    let of_its_size = (0..hopeful).filter(|at| (0..*at).all(|before| size_of(before) != size_of(*at)));
    let rest = 0..hopeful;
    let mut picked = vec![(first, SplitPlan::new(spec, kv_lens, &split(&first))?)];
    for (_, choice) in favourites.chain(of_few).chain(of_its_size).chain(rest).filter_map(|at| liked.get(at))
    {
        if picked.len() >= count.max(1) {
            break;
        }
        let plan = SplitPlan::new(spec, kv_lens, &split(choice))?;
        let is_new = picked.iter().all(|(known, of_known)| {
            kind_of(&split(known)) != kind_of(&split(choice)) || !is_same(of_known, &plan)
        });
        if is_new {
            picked.push((*choice, plan));
        }
    }
    Ok(picked.into_iter().map(|(choice, _)| choice).collect())
}

/// A split without the numbers that only shape its plan; of shares and of items with a worker each, whether there are any.
fn kind_of(split: &SplitConfig) -> SplitConfig {
    let (num_shares, item_tiles) = (split.num_shares.min(1), split.item_tiles.min(1));
    SplitConfig { num_workers: 1, item_overhead: 0, min_split_tiles: 1, num_shares, item_tiles, ..*split }
}

/// Whether two plans have the same items on the same workers; workers without any do not count.
fn is_same(a: &SplitPlan, b: &SplitPlan) -> bool {
    let busy = |plan: &SplitPlan| -> Vec<u32> {
        let mut starts = plan.worker_starts().to_vec();
        starts.dedup();
        starts
    };
    a.items() == b.items() && busy(a) == busy(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::tests::{SHAPE, machine};

    #[test]
    fn the_models_choice_comes_first_every_kind_has_a_turn_and_no_plan_comes_twice() {
        let machine = machine();
        let model = CostModel::default();
        let shape = SHAPE;
        let spec = DecodeSpec::new(32, 8, 128);
        let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 planes-scattered throughput".parse().unwrap();
        let first = Choice {
            num_blocks: 396,
            heads_per_block: 2,
            min_split_tiles: 4,
            item_overhead: 4,
            num_shares: 0,
            item_tiles: 0,
        };
        for kv_lens in [vec![64], vec![2048; 8], vec![8192; 128], vec![100, 3000, 50_000, 7]] {
            let facts = Facts {
                machine: &machine,
                model: &model,
                key: &key,
                shape: &shape,
                spec: &spec,
                kv_lens: &kv_lens,
                policy: SplitPolicy::Throughput,
            };
            let picked = pick(&facts, first, 7).unwrap();
            assert_eq!(picked[0], first);
            assert!(picked.len() <= 7);
            // With room enough, whatever the model may choose is tried.
            let all = pick(&facts, first, 1000).unwrap();
            let run = RunKey::of_step(&spec, &kv_lens);
            let plan = |choice: &Choice| {
                let split = choice.split(SplitPolicy::Throughput, 8, 1);
                (kind_of(&split), SplitPlan::new(&spec, &kv_lens, &split).unwrap())
            };
            let tried: Vec<_> = all.iter().map(plan).collect();
            for choice in Candidates::few(machine.num_sms, &key, &shape, &run) {
                let (kind, of_few) = plan(&choice);
                assert!(
                    tried.iter().any(|(known, plan)| *known == kind && is_same(plan, &of_few)),
                    "{choice}"
                );
            }
            let mut heads: Vec<u32> = picked.iter().map(|choice| choice.heads_per_block).collect();
            heads.sort_unstable();
            heads.dedup();
            // Of a single tile, four heads a block are hopeless.
            let hopeful: &[u32] = if kv_lens == [64] { &[1, 2] } else { &[1, 2, 4] };
            assert_eq!(heads, hopeful, "{kv_lens:?}");
            let split = |choice: &Choice| choice.split(SplitPolicy::Throughput, 8, 1);
            for (at, a) in picked.iter().enumerate() {
                for b in &picked[..at] {
                    let plan = |choice| SplitPlan::new(&spec, &kv_lens, &split(choice)).unwrap();
                    assert!(
                        kind_of(&split(a)) != kind_of(&split(b)) || !is_same(&plan(a), &plan(b)),
                        "{a}; {b}"
                    );
                }
            }
            // One tile has one plan of each kind: for each number of heads of a block, dealt, in a share, and an item of its own.
            assert!(kv_lens != [64] || all.len() <= 9, "{all:?}");
        }
    }
}
