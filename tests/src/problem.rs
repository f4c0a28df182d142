//! A case with its numbers: cache bytes, page table, queries, all from the seed.

use crate::case::{Case, Data, Rows};
use crate::numbers::Numbers;
use crate::poison::{self, Fill};
use crate::values::Values;
use attn_plan::{DecodeRequest, DecodeSpec, PageRows, PageTable};
use kv_quant::{CacheBuffers, CacheLayout, FloatSlice, PlaneId, ScaleType, Side};

/// What changes from step to step: lengths, page table, queries.
#[derive(Clone, Debug)]
pub struct Step {
    /// Tokens of each request.
    pub kv_lens: Vec<u32>,
    /// Page indices.
    pub pages: Vec<i32>,
    /// Row starts; the padded form where a stride is given.
    pub row_starts: Vec<u64>,
    /// `[batch, stride]`.
    pub stride: Option<u64>,
    /// `[batch, q_len, num_q_heads, head_dim]`.
    pub q: Values,
}

/// Tokens to be appended.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// `[slots.len(), num_kv_heads, head_dim]`; NaN where the slot is -1.
    pub k: Values,
    /// As `k`.
    pub v: Values,
    /// Slots in random order, -1 among them.
    pub slots: Vec<i64>,
}

/// A case, materialized.
#[derive(Clone, Debug)]
pub struct Problem {
    /// What it was made from.
    pub case: Case,
    /// The cache's layout.
    pub layout: CacheLayout,
    /// Shapes and mask with their arrays.
    pub spec: DecodeSpec,
    /// The cache before any append.
    pub dead: CacheBuffers,
    /// The cache to decode.
    pub image: CacheBuffers,
    /// How `dead` becomes `image`; `None` for raw data.
    pub tokens: Option<Tokens>,
    /// The step.
    pub step: Step,
}

impl Step {
    /// As a request.
    pub fn request<'a>(&'a self, spec: &'a DecodeSpec) -> DecodeRequest<'a> {
        let rows = match self.stride {
            Some(stride) => PageRows::Stride(stride),
            None => PageRows::Starts(&self.row_starts),
        };
        DecodeRequest { spec, kv_lens: &self.kv_lens, page_table: PageTable { pages: &self.pages, rows } }
    }

    /// A step of some of the requests, in any order, also repeated.
    pub fn select(&self, spec: &DecodeSpec, requests: &[usize]) -> Self {
        let per_request = spec.q_elements(1);
        let mut q = Vec::new();
        for &request in requests {
            q.extend((request * per_request..(request + 1) * per_request).map(|i| self.q.get(i) as f32));
        }
        Self {
            kv_lens: requests.iter().map(|&request| self.kv_lens[request]).collect(),
            pages: self.pages.clone(),
            row_starts: requests.iter().map(|&request| self.row_starts[request]).collect(),
            stride: None,
            q: Values::from_f32(self.q.float_type(), &q),
        }
    }
}

/// One kv head's direction: queries point along it, so a key along it is found by all of them.
struct Directions(Vec<Vec<f32>>);

impl Directions {
    fn new(case: &Case) -> Self {
        let mut numbers = Numbers::new(case.seed, 1);
        Self((0..case.num_kv_heads).map(|_| numbers.normals(case.head_dim as usize)).collect())
    }

    /// Length of a key along the direction whose logit is about 25.
    fn needle(case: &Case) -> f32 {
        (25.0 / ((case.head_dim as f32).sqrt() * case.scale_factor)).clamp(-25.0, 25.0)
    }
}

impl Problem {
    /// With poison in all that is dead.
    pub fn new(case: &Case) -> Self {
        Self::with_fill(case, Fill::Poison)
    }

    /// The same live data over other dead memory.
    pub fn with_fill(case: &Case, fill: Fill) -> Self {
        let mut numbers = Numbers::new(case.seed, 2);
        let spec = spec(case, &mut numbers);
        let directions = Directions::new(case);
        let (layout, step, owners) = place(case, &spec, &directions, &mut numbers);
        let mut dead = poison::dead_cache(&layout, fill);
        if fill == Fill::Poison {
            plant_decoys(case, &layout, &step, &directions, &owners, &mut dead);
        }
        let mut image = dead.clone();
        let tokens = match case.data {
            Data::Raw => {
                write_raw(&layout, &mut image, &owners, &mut numbers);
                None
            }
            _ => {
                let tokens = tokens(case, &spec, &step, &directions, &owners, &mut numbers);
                let (k, v) = (tokens.k.as_slice(), tokens.v.as_slice());
                kv_quant::append(&layout, &mut image.view_mut(), k, v, &tokens.slots).expect("valid tokens");
                Some(tokens)
            }
        };
        Self { case: case.clone(), layout, spec, dead, image, tokens, step }
    }

    /// The same data in other pages.
    pub fn relocate(&self, seed: u64) -> Self {
        let (layout, page_len) = (&self.layout, u64::from(self.layout.page_len()));
        let mut places: Vec<u64> = (0..layout.num_pages()).collect();
        Numbers::new(seed, 4).shuffle(&mut places);
        let mut moved = self.clone();
        for (slot, id, head) in rows_of(layout) {
            let to = places[(slot / page_len) as usize] * page_len + slot % page_len;
            let (buffer_idx, from) = layout.row_bytes(id, slot, head);
            let (_, to) = layout.row_bytes(id, to, head);
            let bytes = self.image.view().bytes(buffer_idx, from).to_vec();
            moved.image.view_mut().bytes_mut(buffer_idx, to).copy_from_slice(&bytes);
        }
        for page in &mut moved.step.pages {
            if let Some(place) = usize::try_from(*page).ok().and_then(|page| places.get(page)) {
                *page = *place as i32;
            }
        }
        moved
    }

    /// The request.
    pub fn request(&self) -> DecodeRequest<'_> {
        self.step.request(&self.spec)
    }
}

/// Every row of a cache.
fn rows_of(layout: &CacheLayout) -> impl Iterator<Item = (u64, PlaneId, u32)> {
    let heads = layout.format().num_kv_heads();
    (0..layout.num_slots()).flat_map(move |slot| {
        PlaneId::ALL.into_iter().flat_map(move |id| (0..heads).map(move |head| (slot, id, head)))
    })
}

fn spec(case: &Case, numbers: &mut Numbers) -> DecodeSpec {
    let mut spec = case.bare_spec();
    let heads = case.num_q_heads();
    let slopes: Vec<f32> = (0..heads)
        .map(|head| match numbers.below(6) {
            0 => 0.0,
            1 => -0.01,
            _ => (-8.0 * (head + 1) as f32 / heads as f32).exp2(),
        })
        .collect();
    let sinks: Vec<f32> = (0..heads).map(|_| numbers.normal() * numbers.pick(&[1.0, 5.0, 30.0])).collect();
    if let Data::EqualLogits(logit) = case.data {
        spec.softmax_scale = logit / case.head_dim as f32;
    }
    spec.alibi_slopes = case.alibi.then_some(slopes);
    spec.sinks = case.sinks.then_some(sinks);
    spec
}

/// Who sees a slot: `(request, token)` of its first owner, or nobody.
type Owners = Vec<Option<(usize, u32)>>;

/// A page of the row that nobody sees any more.
const PASSED: i32 = i32::MIN + 7;

/// Deals shuffled pages to requests and lays out the page table.
fn place(
    case: &Case,
    spec: &DecodeSpec,
    directions: &Directions,
    numbers: &mut Numbers,
) -> (CacheLayout, Step, Owners) {
    let page_len = case.page_len;
    let needed: Vec<usize> = case.kv_lens.iter().map(|&n| n.div_ceil(page_len) as usize).collect();
    let num_pages = needed.iter().sum::<usize>() + 3;
    let layout = case.layout_of(num_pages as u64);
    let mut free: Vec<i32> = (0..num_pages as i32).collect();
    numbers.shuffle(&mut free);
    let mut owners: Owners = vec![None; num_pages * page_len as usize];
    let mut rows: Vec<Vec<i32>> = Vec::new();
    for (request, &kv_len) in case.kv_lens.iter().enumerate() {
        let first_entry = spec.visible_any(kv_len).start / page_len;
        // Full pages of request 0 that are common to both; a page has one content whoever looks.
        let common = if case.shares_prefix { (case.kv_lens[0].min(kv_len) / page_len) as usize } else { 0 };
        let mut row: Vec<i32> = rows.first().map_or(Vec::new(), |first| first[..common].to_vec());
        row.resize(needed[request], PASSED);
        // Pages that a window has passed are given up; those that are seen, shared or not, must be there.
        for page in row.iter_mut().skip(first_entry as usize).filter(|page| **page == PASSED) {
            *page = free.pop().expect("a page for every entry");
        }
        for token in spec.visible_any(kv_len) {
            let page = row[(token / page_len) as usize];
            owners[page as usize * page_len as usize + (token % page_len) as usize]
                .get_or_insert((request, token));
        }
        rows.push(row);
    }
    for page in rows.iter_mut().flatten().filter(|page| **page == PASSED) {
        *page = poison::wild_page(numbers, num_pages as u64);
    }
    let (pages, row_starts, stride) = table(case, &rows, num_pages as u64, numbers);
    let q = queries(case, spec, directions, numbers);
    (layout, Step { kv_lens: case.kv_lens.clone(), pages, row_starts, stride, q }, owners)
}

fn table(
    case: &Case,
    rows: &[Vec<i32>],
    num_pages: u64,
    numbers: &mut Numbers,
) -> (Vec<i32>, Vec<u64>, Option<u64>) {
    let mut pages = Vec::new();
    let mut row_starts = vec![0u64; rows.len()];
    let mut gap = |pages: &mut Vec<i32>, n: usize| {
        pages.extend((0..n).map(|_| poison::wild_page(numbers, num_pages)));
    };
    if case.rows == Rows::Padded {
        let stride = rows.iter().map(Vec::len).max().unwrap_or(0) + 2;
        for (row, start) in rows.iter().zip(&mut row_starts) {
            *start = pages.len() as u64;
            pages.extend(row);
            gap(&mut pages, stride - row.len());
        }
        return (pages, row_starts, Some(stride as u64));
    }
    let mut order: Vec<usize> = (0..rows.len()).collect();
    Numbers::new(case.seed, 3).shuffle(&mut order);
    for request in order {
        gap(&mut pages, 1 + request % 3);
        row_starts[request] = pages.len() as u64;
        pages.extend(&rows[request]);
    }
    gap(&mut pages, 2);
    (pages, row_starts, None)
}

fn queries(case: &Case, spec: &DecodeSpec, directions: &Directions, numbers: &mut Numbers) -> Values {
    let head_dim = case.head_dim as usize;
    let mut q = numbers.normals(spec.q_elements(case.kv_lens.len()));
    match case.data {
        Data::Mean => q.fill(0.0),
        Data::EqualLogits(_) => q.fill(1.0),
        _ => {}
    }
    if let Data::Needle(_) | Data::NeedleAt(_) | Data::OneHot(_) = case.data {
        for (row, q) in q.chunks_exact_mut(head_dim).enumerate() {
            let kv_head = row % case.num_q_heads() as usize / case.gqa_group as usize;
            for (q, along) in q.iter_mut().zip(&directions.0[kv_head]) {
                *q = along + 0.1 * *q;
            }
        }
    }
    Values::from_f32(case.q_type, &q)
}

/// The needle's token within the visible range.
fn needle_at(data: Data, visible: std::ops::Range<u32>) -> u32 {
    let last = (visible.end - visible.start).saturating_sub(1) as f32;
    match data {
        Data::NeedleAt(token) => token,
        Data::Needle(share) => visible.start + (share * last).round() as u32,
        _ => u32::MAX,
    }
}

/// K and V of every live slot, in random order, with skipped tokens between.
fn tokens(
    case: &Case,
    spec: &DecodeSpec,
    step: &Step,
    directions: &Directions,
    owners: &Owners,
    numbers: &mut Numbers,
) -> Tokens {
    let head_dim = case.head_dim as usize;
    let row = case.num_kv_heads as usize * head_dim;
    let mut slots: Vec<i64> =
        (0..owners.len() as i64).filter(|&slot| owners[slot as usize].is_some()).collect();
    slots.extend((0..1 + slots.len() / 16).map(|_| -1));
    numbers.shuffle(&mut slots);
    let loud = [numbers.below(head_dim), numbers.below(head_dim)];
    let (mut k, mut v) = (Vec::with_capacity(slots.len() * row), Vec::with_capacity(slots.len() * row));
    for &slot in &slots {
        let Some((request, token)) = usize::try_from(slot).ok().and_then(|slot| owners[slot]) else {
            k.extend(std::iter::repeat_n(f32::NAN, row));
            v.extend(std::iter::repeat_n(f32::INFINITY, row));
            continue;
        };
        let (mut new_k, mut new_v) = (numbers.normals(row), numbers.normals(row));
        match case.data {
            Data::Normal(sigma) => {
                new_k.iter_mut().chain(&mut new_v).for_each(|x| *x *= sigma);
                // A whole group of zeros is ordinary: padding heads, attention sinks.
                if numbers.chance(0.05) {
                    new_k[..case.k_group_len as usize].fill(0.0);
                    new_v[..case.v_group_len as usize].fill(-0.0);
                }
            }
            Data::Outliers(gain) => {
                new_k.chunks_exact_mut(head_dim).for_each(|k| loud.iter().for_each(|&c| k[c] *= gain));
            }
            Data::Needle(_) | Data::NeedleAt(_) => {
                let is_needle = token == needle_at(case.data, spec.visible_any(step.kv_lens[request]));
                let length = if is_needle { Directions::needle(case) } else { 0.0 };
                for (k, along) in new_k.iter_mut().zip(directions.0.iter().flatten()) {
                    *k = 0.1 * *k + length * along;
                }
            }
            Data::OneHot(at) => {
                let length = if token == at { 16.0 * Directions::needle(case) } else { 0.0 };
                new_k
                    .iter_mut()
                    .zip(directions.0.iter().flatten())
                    .for_each(|(k, along)| *k = length * along);
            }
            Data::EqualLogits(_) => new_k.fill(1.0),
            Data::Ones => new_v.fill(127.0),
            Data::Mean | Data::Raw => {}
        }
        if let Data::Mean | Data::OneHot(_) | Data::EqualLogits(_) = case.data {
            // 127 in every group makes its scale 1, so that every integer is stored as it is.
            let integer = |i: usize, x: f32| if i.is_multiple_of(8) { 127.0 } else { (20.0 * x).round() };
            new_v.chunks_exact_mut(head_dim).for_each(|v| {
                v.iter_mut().enumerate().for_each(|(i, x)| *x = integer(i, *x).clamp(-127.0, 127.0));
            });
        }
        k.extend(new_k);
        v.extend(new_v);
    }
    Tokens { k: Values::from_f32(case.in_type, &k), v: Values::from_f32(case.in_type, &v), slots }
}

/// Behind every request's last token, where its last page has room: a perfect match with a loud value.
fn plant_decoys(
    case: &Case,
    layout: &CacheLayout,
    step: &Step,
    directions: &Directions,
    owners: &Owners,
    dead: &mut CacheBuffers,
) {
    if !matches!(case.data, Data::Needle(_) | Data::NeedleAt(_) | Data::OneHot(_))
        || case.seed.is_multiple_of(3)
    {
        return;
    }
    let length = 2.0 * Directions::needle(case);
    let k: Vec<f32> = directions.0.iter().flatten().map(|x| x * length).collect();
    let v = vec![100.0; k.len()];
    for (request, &kv_len) in step.kv_lens.iter().enumerate() {
        if kv_len.is_multiple_of(case.page_len) {
            continue;
        }
        let page = step.pages[(step.row_starts[request] + u64::from(kv_len / case.page_len)) as usize];
        let slot = i64::from(page) * i64::from(case.page_len) + i64::from(kv_len % case.page_len);
        if owners[slot as usize].is_none() {
            let (k, v) = (FloatSlice::F32(&k), FloatSlice::F32(&v));
            kv_quant::append(layout, &mut dead.view_mut(), k, v, &[slot]).expect("a valid decoy");
        }
    }
}

fn write_raw(layout: &CacheLayout, image: &mut CacheBuffers, owners: &Owners, numbers: &mut Numbers) {
    let scale_type = layout.format().scale_type();
    for (slot, id, head) in rows_of(layout).filter(|(slot, ..)| owners[*slot as usize].is_some()) {
        let (buffer_idx, range) = layout.row_bytes(id, slot, head);
        let row = &mut image.as_mut_vecs()[buffer_idx][range.start as usize..range.end as usize];
        match id {
            PlaneId::Codes(_) => row.iter_mut().for_each(|x| *x = numbers.bits() as u8),
            PlaneId::Scales(side) => {
                let scales = row.chunks_exact_mut(scale_type.bytes());
                scales.for_each(|x| raw_scale(x, scale_type, side, numbers));
            }
        }
    }
}

/// Zero, subnormal, or about the scale of a unit normal.
fn raw_scale(bytes: &mut [u8], scale_type: ScaleType, side: Side, numbers: &mut Numbers) {
    let bits: u32 = match (numbers.below(12), scale_type) {
        (0, _) => 0,
        (1, ScaleType::F16) => 1 + numbers.below(0x3ff) as u32,
        (1, ScaleType::Bf16) => 1 + numbers.below(0x7f) as u32,
        (1, ScaleType::F32) => 1 + numbers.below(0x7f_ffff) as u32,
        (_, ScaleType::F16) => u32::from(half::f16::from_f32(0.02 * numbers.unit()).to_bits()),
        (_, ScaleType::Bf16) => u32::from(half::bf16::from_f32(0.02 * numbers.unit()).to_bits()),
        (_, ScaleType::F32) => (if side == Side::K { 0.02 } else { 0.5 } * numbers.unit()).to_bits(),
    };
    bytes.copy_from_slice(&bits.to_le_bytes()[..bytes.len()]);
}
