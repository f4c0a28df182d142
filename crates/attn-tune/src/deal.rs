//! How `attn_plan` deals a step's work to workers, from the few numbers that the cost model knows of it.

use crate::PolicyClass;
use crate::choice::Choice;
use crate::expect::{Expect, ceil, pieces};

/// Share of the room for blocks beyond which a launch counts as full, and what plans are dealt to then: `attn_kernels::residency`, in which
/// `Decoder::deal` finds fewer workers for such a plan.
const FULL: f64 = 0.98;
const ENOUGH: f64 = 0.97;

/// How work is dealt out.
#[derive(Debug, PartialEq)]
pub(crate) struct Deal {
    /// Workers that have any.
    pub used: f64,
    /// Tiles of the one that has most.
    pub tiles: f64,
    /// Its items.
    pub items: f64,
    /// Whether no request is cut.
    pub is_whole: bool,
}

impl Expect<'_> {
    pub(crate) fn deal(&self, choice: &Choice) -> Deal {
        let workers = self.workers(choice);
        match self.key.policy {
            PolicyClass::BatchInvariant { split_len } => {
                let (pieces, len) = pieces(self.run, split_len);
                let items = ceil(pieces / workers);
                let is_whole = pieces <= f64::from(self.run.batch);
                Deal { used: ceil(pieces / items), tiles: items * len, items, is_whole }
            }
            PolicyClass::Throughput if self.is_uniform => self.deal_equal(choice, workers),
            PolicyClass::Throughput => self.deal_unequal(choice, workers),
        }
    }

    /// Requests of one length: as the plan is, but for a tile or an item of the rounding (a test compares).
    fn deal_equal(&self, choice: &Choice, workers: f64) -> Deal {
        let Self { run, tiles, longest, .. } = *self;
        let (batch, overhead) = (f64::from(run.batch), f64::from(choice.item_overhead));
        let least = f64::from(choice.min_split_tiles).min(longest);
        // A worker ends within a request, but where several requests and several workers end together.
        let cuts = |workers: f64| workers - common_divisor(run.batch, workers as u32);
        let work = tiles + (batch + cuts(workers)) * overhead;
        let load = ceil(work / workers).max(least + overhead);
        let each = ceil(batch / workers);
        // No request is long enough for two of the smallest splits, or whole ones cost no worker more than two items do.
        let is_short = longest < 2.0 * f64::from(choice.min_split_tiles);
        if is_short || workers <= 1.0 || each * (longest + overhead) <= load + 2.0 * overhead {
            return Deal { used: ceil(batch / each), tiles: each * longest, items: each, is_whole: true };
        }
        let used = ceil(tiles / least).min(workers);
        let most = ceil(tiles / used).max(least);
        let pieces = batch * ceil(longest / most);
        if pieces <= workers {
            return Deal { used: pieces, tiles: most, items: 1.0, is_whole: false };
        }
        let items = ceil((batch + cuts(used)) / used);
        Deal { used, tiles: (tiles / used).max(least), items, is_whole: false }
    }

    /// Requests of which only the sum and the longest are known.
    fn deal_unequal(&self, choice: &Choice, workers: f64) -> Deal {
        let Self { run, longest, .. } = *self;
        let (batch, overhead) = (f64::from(run.batch), f64::from(choice.item_overhead));
        let least = f64::from(choice.min_split_tiles);
        // Each request's last tile is half full.
        let tiles = self.tiles + 0.5 * batch;
        // No request is long enough for two of the smallest splits: each is one worker's.
        if workers <= 1.0 || longest < 2.0 * least {
            let load = ceil(tiles / workers.min(batch)).max(longest);
            let used = ceil(tiles / load).min(batch).clamp(1.0, workers);
            return Deal { used, tiles: load, items: batch / used, is_whole: true };
        }
        // Nearly every worker ends within a request, but no item is shorter than the smallest split.
        let pieces = (batch + workers).min(ceil(tiles / least)).max(batch);
        let work = tiles + pieces * overhead;
        let load = ceil(work / workers).max(least + overhead);
        if longest <= load + overhead {
            let load = ceil((tiles + batch * overhead) / workers).max(longest + overhead);
            let used = ceil((tiles + batch * overhead) / load).clamp(1.0, workers.min(batch));
            let items = batch / used;
            return Deal { used, tiles: (load - items * overhead).max(longest), items, is_whole: true };
        }
        let used = ceil((tiles + batch * overhead) / (load - overhead)).clamp(1.0, workers);
        let items = if longest >= load { 1.0 } else { (batch + used) / used };
        Deal { used, tiles: (load - items * overhead).max(1.0), items, is_whole: false }
    }

    /// Workers of a choice; fewer where their blocks would fill the device.
    fn workers(&self, choice: &Choice) -> f64 {
        let Self { run, shape, num_sms, .. } = *self;
        let workers = f64::from(choice.num_workers(run.num_kv_heads, shape.row_blocks));
        let each = (self.blocks / f64::from(choice.heads_per_block)).max(1.0);
        let room = num_sms * f64::from(shape.blocks_per_sm);
        let blocks = workers * each;
        if blocks > room || blocks <= FULL * room {
            return workers;
        }
        let enough = (ENOUGH * room / each) as u64;
        (enough as f64).clamp(1.0, workers)
    }
}

/// The greatest common divisor.
fn common_divisor(a: u32, b: u32) -> f64 {
    let (mut a, mut b) = (a, b);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    f64::from(a)
}

#[cfg(test)]
mod tests {
    use crate::choice::Choice;
    use crate::expect::Expect;
    use crate::{Candidates, CostModel, RunKey, Shape, StaticKey};
    use attn_plan::{DecodeSpec, SplitPlan, SplitPolicy};

    const SHAPE: Shape = Shape {
        blocks_per_sm: 3,
        max_heads_per_block: 4,
        row_blocks: 1,
        row_bytes: 320,
        most_shares: 16,
        share_blocks_per_sm: 2,
        share_warps: 8,
    };

    /// The launch deals to as many workers as the model thinks: the constants of both.
    #[test]
    fn workers_leave_the_room_that_the_launch_leaves() {
        use attn_kernels::residency::workers_to_leave_room;
        let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 records-paged throughput".parse().unwrap();
        let model = CostModel::default();
        let mut num_fewer = 0;
        for num_kv_heads in [1u32, 2, 4, 8] {
            let run = RunKey { num_kv_heads, ..RunKey::of([4096; 4], num_kv_heads) };
            let expect = model.expect(132, 3000.0, &key, &SHAPE, &run);
            for num_blocks in 1..=800 {
                let choice = Choice::dealt(num_blocks);
                let asked = choice.num_workers(num_kv_heads, 1);
                let launched = workers_to_leave_room(asked, num_kv_heads, 3 * 132);
                assert_eq!(
                    expect.workers(&choice),
                    f64::from(launched),
                    "{num_blocks} blocks, {num_kv_heads} kv heads"
                );
                num_fewer += u32::from(launched < asked);
            }
        }
        assert!(num_fewer > 0);
    }

    /// Tiles of the worker that has most.
    fn most_tiles(plan: &SplitPlan) -> f64 {
        let tiles_of = |items: &[attn_plan::WorkItem]| {
            items.iter().map(|item| (item.token_end - item.token_start).div_ceil(64)).sum::<u32>()
        };
        let of_worker = |starts: &[u32]| tiles_of(&plan.items()[starts[0] as usize..starts[1] as usize]);
        f64::from(plan.worker_starts().windows(2).map(of_worker).max().unwrap())
    }

    /// Of every dealt candidate: what the plan is, what the model takes it for.
    #[test]
    fn equal_requests_are_dealt_as_the_plan_deals_them() {
        let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 planes-scattered throughput".parse().unwrap();
        let model = CostModel::default();
        let (mut num_plans, mut num_off) = (0, 0);
        for (batch, kv_len) in [1u32, 2, 3, 8, 16, 31, 128]
            .into_iter()
            .flat_map(|batch| [64u32, 500, 1024, 2048, 5000, 16_384, 131_072].map(|kv_len| (batch, kv_len)))
        {
            let spec = DecodeSpec::new(32, 8, 128);
            let kv_lens = vec![kv_len; batch as usize];
            let run = RunKey::of_step(&spec, &kv_lens);
            let expect = model.expect(132, 3000.0, &key, &SHAPE, &run);
            for choice in Candidates::all(132, &key, &SHAPE, &run)
                .filter(|choice| choice.num_shares == 0 && choice.item_tiles == 0)
            {
                let deal = expect.deal(&choice);
                let plan = plan_of(&expect, &choice, &spec, &kv_lens);
                num_plans += 1;
                let is_off = (deal.tiles / most_tiles(&plan)).log2().abs() > 0.5
                    || deal.is_whole != (plan.num_partials() == 0);
                num_off += u32::from(is_off);
            }
        }
        assert!(num_plans > 2000 && num_off * 50 < num_plans, "{num_off} of {num_plans}");
    }

    /// The plan of a choice, for as many workers as are expected to find room.
    fn plan_of(expect: &Expect<'_>, choice: &Choice, spec: &DecodeSpec, kv_lens: &[u32]) -> SplitPlan {
        let mut split = choice.split(SplitPolicy::Throughput, 8, 1);
        split.num_workers = expect.workers(choice) as u32;
        SplitPlan::new(spec, kv_lens, &split).unwrap()
    }

    /// Lengths as they come: most of them short and a few long, evenly spread, and one long among short ones.
    fn unequal_batches() -> Vec<Vec<u32>> {
        let mut turn = 1u32;
        let mut uniform = || {
            turn = turn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(turn >> 8) / f64::from(1u32 << 24)
        };
        let mut batches = Vec::new();
        for batch in [4usize, 8, 16, 31, 64, 128, 256] {
            for median in [200.0, 800.0, 3000.0, 12_000.0] {
                // Twelve even numbers add up to nearly a normal one.
                let gauss = |uniform: &mut dyn FnMut() -> f64| (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
                let long_tail = (0..batch)
                    .map(|_| (median * (1.4 * gauss(&mut uniform)).exp()).clamp(1.0, 131_072.0) as u32);
                batches.push(long_tail.collect());
                batches.push((0..batch).map(|at| 1 + 2 * median as u32 * at as u32 / batch as u32).collect());
                batches.push(
                    (0..batch).map(|at| if at == batch / 2 { 131_072 } else { median as u32 }).collect(),
                );
            }
        }
        batches
    }

    /// Only the sum and the longest are known, so: of seven plans in eight the busiest worker's tiles to 13 %, a fifth of the workers, and whether
    /// anything is cut; of 99 in 100 the tiles to a factor of two.
    #[test]
    fn unequal_requests_are_dealt_nearly_as_the_plan_deals_them() {
        let key: StaticKey = "d128 k8 v8 f16 gqa4 q1 planes-scattered throughput".parse().unwrap();
        let model = CostModel::default();
        let (mut near, mut far, mut num_plans, mut num_wrong) = (0u32, 0u32, 0u32, 0u32);
        for kv_lens in unequal_batches() {
            let spec = DecodeSpec::new(32, 8, 128);
            let run = RunKey::of_step(&spec, &kv_lens);
            let expect = model.expect(132, 3000.0, &key, &SHAPE, &run);
            assert!(!expect.is_uniform);
            for choice in Candidates::all(132, &key, &SHAPE, &run)
                .filter(|choice| choice.num_shares == 0 && choice.item_tiles == 0)
            {
                let deal = expect.deal(&choice);
                let plan = plan_of(&expect, &choice, &spec, &kv_lens);
                let off = deal.tiles / most_tiles(&plan);
                let workers = deal.used / f64::from(plan.num_busy_workers());
                num_plans += 1;
                near += u32::from((0.87..1.15).contains(&off) && (0.8..1.25).contains(&workers));
                far += u32::from(!(0.5..2.0).contains(&off));
                num_wrong += u32::from(deal.is_whole != (plan.num_partials() == 0));
            }
        }
        let text = format!("{near} near, {far} far, {num_wrong} cut or not, of {num_plans}");
        assert!(num_plans > 5000 && num_plans - near < num_plans / 8, "{text}");
        assert!(far < num_plans / 100 && num_wrong < num_plans / 8, "{text}");
    }
}
