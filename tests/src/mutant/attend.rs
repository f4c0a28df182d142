//! A plain decode in f32 over the plan's items, with a place for every fault.

use super::Fault;
use attn_plan::{DecodeRequest, SoftmaxState, SplitPlan, WorkItem};
use half::{bf16, f16};
use kv_quant::{CacheBuffers, CacheLayout, FloatSlice, PlaneId, Side};

/// One decode of a mutant.
pub(super) struct Attend<'a> {
    pub fault: Fault,
    pub layout: &'a CacheLayout,
    pub cache: &'a CacheBuffers,
    pub request: &'a DecodeRequest<'a>,
    pub plan: &'a SplitPlan,
    pub q: FloatSlice<'a>,
    /// How many decodes the executor has done before.
    pub num_calls: u64,
}

/// Running state of one query row.
struct State {
    softmax: SoftmaxState,
    o: Vec<f32>,
}

/// What one query row is.
struct Row<'a> {
    request_idx: usize,
    q_idx: u32,
    head: usize,
    kv_head: u32,
    kv_len: u32,
    q: &'a [f32],
}

impl Attend<'_> {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// One row: `None` if nothing is to be written, else output and lse.
    pub fn row(&self, request_idx: usize, q_idx: u32, head: usize) -> Option<(Vec<f32>, f32)> {
        let spec = self.request.spec;
        let head_dim = spec.head_dim as usize;
        let gqa = spec.gqa_group() as usize;
        if self.is(Fault::BatchBeyond256Dropped) && request_idx >= 256 {
            return None;
        }
        let kv_head = match self.fault {
            Fault::GqaModulo => head % spec.num_kv_heads as usize,
            Fault::GqaNextHead if head % gqa == gqa - 1 => (head / gqa + 1) % spec.num_kv_heads as usize,
            Fault::GqaPowerOfTwoOnly => (head / gqa.next_power_of_two()).min(spec.num_kv_heads as usize - 1),
            _ => head / gqa,
        };
        let q_row = match self.fault {
            Fault::RowsOfLaterTokensSwapped => spec.q_len - 1 - q_idx,
            _ => q_idx,
        };
        let mut q = vec![0f32; head_dim];
        let row = (request_idx * spec.q_len as usize + q_row as usize) * spec.num_q_heads as usize + head;
        self.q.widen(row * head_dim, &mut q);
        let row_request = if self.is(Fault::RequestZeroForAll) { 0 } else { request_idx };
        let kv_len = self.request.kv_lens[request_idx];
        let row = Row { request_idx: row_request, q_idx, head, kv_head: kv_head as u32, kv_len, q: &q };
        let items: Vec<&WorkItem> =
            self.plan.items().iter().filter(|item| item.request_idx as usize == request_idx).collect();
        let mut partials: Vec<State> =
            items.iter().enumerate().map(|(i, _)| self.partial(&row, &items, i)).collect();
        if self.is(Fault::OrderChanges) && self.num_calls % 2 == 1 {
            partials.reverse();
        }
        if self.is(Fault::MergeDropsLast) && partials.len() > 1 {
            partials.pop();
        }
        let mut state = State { softmax: SoftmaxState::EMPTY, o: vec![0.0; head_dim] };
        for partial in &mut partials {
            self.merge(&mut state, partial, items.len());
        }
        self.finish(state, head, gqa)
    }

    fn finish(&self, mut state: State, head: usize, gqa: usize) -> Option<(Vec<f32>, f32)> {
        let sinks = self.request.spec.sinks.as_ref().filter(|_| !self.is(Fault::SinkMissing));
        let head = if self.is(Fault::SinkOfKvHead) { head / gqa } else { head };
        let before = state.softmax;
        if let Some(&sink) = sinks.and_then(|sinks| sinks.get(head)) {
            let (a, _) = state.softmax.merge(SoftmaxState::single(sink));
            state.o.iter_mut().for_each(|x| *x *= a);
        }
        if state.softmax.is_empty() {
            match self.fault {
                Fault::EmptyNotWritten => return None,
                Fault::EmptyIsNan => return Some((vec![f32::NAN; state.o.len()], f32::NEG_INFINITY)),
                Fault::EmptyLsePositive => return Some((state.o, f32::INFINITY)),
                _ => {}
            }
        }
        let factor = state.softmax.normalizer();
        state.o.iter_mut().for_each(|x| *x *= factor);
        if self.is(Fault::OutputInF16First) {
            state.o.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
        }
        let lse = match self.fault {
            Fault::LseInBase2 => state.softmax.lse() * std::f32::consts::LOG2_E,
            Fault::LseWithoutMaximum if !state.softmax.is_empty() => state.softmax.l.ln(),
            Fault::SinkNotInLse => before.lse(),
            _ => state.softmax.lse(),
        };
        Some((state.o, lse))
    }

    fn merge(&self, state: &mut State, other: &mut State, num_items: usize) {
        let round = |x: &mut f32| match self.fault {
            Fault::PartialsInBf16 if num_items > 1 => *x = bf16::from_f32(*x).to_f32(),
            Fault::PartialsInF16 if num_items > 1 => *x = f16::from_f32(*x).to_f32(),
            _ => {}
        };
        other.o.iter_mut().for_each(round);
        match self.fault {
            Fault::MergeIgnoresWeights if !state.softmax.is_empty() && !other.softmax.is_empty() => {
                let m = state.softmax.m.max(other.softmax.m);
                state.softmax = SoftmaxState { m, l: state.softmax.l + other.softmax.l };
                state.o.iter_mut().zip(&other.o).for_each(|(x, y)| *x += y);
            }
            Fault::MergeSkipsMaximum if !state.softmax.is_empty() => {
                // The maximum of the first partial is kept: right as long as the later ones are not much larger.
                let factor = (other.softmax.m - state.softmax.m).exp();
                state.softmax.l += other.softmax.l * factor;
                state.o.iter_mut().zip(&other.o).for_each(|(x, y)| *x += y * factor);
            }
            _ => state.softmax.merge_row(&mut state.o, other.softmax, &other.o),
        }
    }

    /// The tokens of one item, after the faults that change them.
    fn tokens(&self, row: &Row<'_>, items: &[&WorkItem], i: usize) -> std::ops::Range<u32> {
        let (mut start, mut end) = (items[i].token_start, items[i].token_end);
        let (is_first, is_last) = (i == 0, i + 1 == items.len());
        let visible = self.request.spec.visible(row.kv_len, row.q_idx);
        match self.fault {
            Fault::LastTokenDropped if is_last && row.kv_len > 1 => end -= 1,
            Fault::FirstTokenDropped if is_first && end > start => start += 1,
            Fault::SplitEdgeDropped if !is_last => end -= 1,
            Fault::SplitEdgeTwice if !is_last => end += 1,
            Fault::OnePastTheEnd if is_last && end > start => end += 1,
            Fault::ShortTailSkipped if is_last && end - start < 4 && end > 8 => end = start,
            _ => {}
        }
        let _ = visible;
        start..end.max(start)
    }

    fn visible(&self, row: &Row<'_>, t: u32) -> bool {
        let spec = self.request.spec;
        let range = spec.visible(row.kv_len, row.q_idx);
        let window = spec.window.unwrap_or(u32::MAX);
        match self.fault {
            Fault::OnePastTheEnd if t >= row.kv_len => true,
            Fault::WindowOneShort if window < row.kv_len && window > 1 => {
                range.contains(&t) && t != range.start
            }
            Fault::WindowOneLong => range.contains(&t) || (t + 1 == range.start && !range.is_empty()),
            Fault::WindowIgnored => t < range.end,
            Fault::CausalityIgnored => t >= range.start,
            Fault::CausalOffByOne => range.contains(&t) || (t == range.end && t < row.kv_len),
            _ => range.contains(&t),
        }
    }

    fn partial(&self, row: &Row<'_>, items: &[&WorkItem], i: usize) -> State {
        let spec = self.request.spec;
        let head_dim = spec.head_dim as usize;
        let mut state = State { softmax: SoftmaxState::EMPTY, o: vec![0.0; head_dim] };
        let tile = self.plan.config().map_or(64, |config| config.tile_len);
        let mut tokens = self.tokens(row, items, i);
        if let Fault::WindowIgnored | Fault::WindowOneLong | Fault::WindowWeightsZeroButReads = self.fault
            && i == 0
        {
            // The plan cuts the front at a token; a kernel that works in tiles starts at the tile.
            tokens.start -= tokens.start % tile;
        }
        let mut hidden = Vec::new();
        for t in tokens {
            if !self.visible(row, t) {
                hidden.push(t);
                continue;
            }
            if self.is(Fault::TileEdgeDropped) && t % tile == tile - 1 && t + 1 < row.kv_len {
                continue;
            }
            let (k, v) = self.read(row, t);
            let s = self.logit(row, t, &k);
            let mut token = SoftmaxState::single(s);
            if self.is(Fault::NoMaximum) {
                // exp(s) outright; right while it does not overflow.
                token = SoftmaxState { m: 0.0, l: s.exp() };
                let v: Vec<f32> = v.iter().map(|v| v * token.l).collect();
                state.softmax.merge_row(&mut state.o, token, &v);
                continue;
            }
            state.softmax.merge_row(&mut state.o, token, &v);
            if self.is(Fault::LastTokenTwice) && t + 1 == row.kv_len && row.kv_len > 1 {
                state.softmax.merge_row(&mut state.o, token, &v);
            }
        }
        if self.is(Fault::WindowWeightsZeroButReads) && !state.softmax.is_empty() {
            for t in hidden {
                let (_, v) = self.read(row, t);
                state.o.iter_mut().zip(&v).for_each(|(o, v)| *o += 0.0 * v);
            }
        }
        if self.is(Fault::OnePastTheEndWithWeightZero) && i + 1 == items.len() && items[i].num_tokens() > 0 {
            let (_, v) = self.read(row, items[i].token_end);
            state.o.iter_mut().zip(&v).for_each(|(o, v)| *o += 0.0 * v);
        }
        if let (Fault::SinkPerSplit, Some(sinks)) = (self.fault, &spec.sinks)
            && i > 0
        {
            let sink = sinks[row.head];
            state.softmax.merge_row(&mut state.o, SoftmaxState::single(sink), &vec![0.0; head_dim]);
        }
        state
    }

    fn logit(&self, row: &Row<'_>, t: u32, k: &[f32]) -> f32 {
        let spec = self.request.spec;
        let scale = if self.is(Fault::ScaleSignLost) { spec.softmax_scale.abs() } else { spec.softmax_scale };
        let mut s = scale * row.q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
        let cap = spec.soft_cap.filter(|_| !self.is(Fault::SoftCapMissing));
        let capped = |s: f32| cap.map_or(s, |cap| cap * (s / cap).tanh());
        let head = if self.is(Fault::AlibiOfKvHead) { row.kv_head as usize } else { row.head };
        let position = i64::from(row.kv_len) - i64::from(spec.q_len) + i64::from(row.q_idx);
        let alibi = match &spec.alibi_slopes {
            Some(_) if self.is(Fault::AlibiMissing) => 0.0,
            Some(slopes) if self.is(Fault::AlibiFromTokenZero) => slopes[head] * t as f32,
            Some(slopes) => slopes[head] * (i64::from(t) - position) as f32,
            None => 0.0,
        };
        if self.is(Fault::SoftCapAfterAlibi) {
            s = capped(s + alibi);
        } else {
            s = capped(s) + alibi;
        }
        s
    }

    /// Dequantized K and V of a token; zeros where the page table or the cache does not hold it.
    fn read(&self, row: &Row<'_>, t: u32) -> (Vec<f32>, Vec<f32>) {
        let page_len = self.layout.page_len();
        let mut t_read = t;
        if self.is(Fault::PageEdgeReadsNextSlot) && page_len > 1 && t % page_len == page_len - 1 {
            t_read = t - 1;
        }
        let mut slot = self.request.page_table.slot(row.request_idx, t_read, page_len).unwrap_or(u64::MAX);
        if self.is(Fault::Indices16Bit) {
            slot &= 0xffff;
        }
        if slot >= self.layout.num_slots() {
            slot = 0;
        }
        (self.read_side(Side::K, slot, row.kv_head), self.read_side(Side::V, slot, row.kv_head))
    }

    fn read_side(&self, side: Side, slot: u64, kv_head: u32) -> Vec<f32> {
        let format = self.layout.format();
        let row = |id| {
            let (buffer_idx, range) = self.layout.row_bytes(id, slot, kv_head);
            self.cache.view().buffer(buffer_idx).get(range.start as usize..range.end as usize).unwrap_or(&[])
        };
        let scales: Vec<f32> = row(PlaneId::Scales(side))
            .chunks_exact(format.scale_type().bytes())
            .map(|bytes| self.scale(format.scale_type().read(bytes).unwrap_or(f32::NAN), side))
            .collect();
        let mut group_len = format.group_len(side) as usize;
        if self.is(Fault::VGroupLenOfK) && side == Side::V {
            group_len = format.group_len(Side::K) as usize;
        }
        let shift = match (self.fault, side) {
            (Fault::KScaleOfNextGroup, Side::K) | (Fault::VScaleOfNextGroup, Side::V) => 1,
            _ => 0,
        };
        let scale = |c: usize| scales[(c / group_len + shift) % scales.len()];
        row(PlaneId::Codes(side)).iter().enumerate().map(|(c, &code)| self.code(code) * scale(c)).collect()
    }

    fn scale(&self, scale: f32, side: Side) -> f32 {
        match self.fault {
            Fault::SubnormalScaleFlushed if scale < 6.1e-5 => 0.0,
            Fault::KScaleApplied2x if side == Side::K => scale * scale,
            _ => scale,
        }
    }

    fn code(&self, code: u8) -> f32 {
        match self.fault {
            Fault::LowestCodeClamped => f32::from((code as i8).max(-127)),
            Fault::CodesUnsigned => f32::from(code),
            _ => f32::from(code as i8),
        }
    }
}
