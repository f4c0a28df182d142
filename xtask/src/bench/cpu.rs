//! `cargo xtask bench cpu`: the CPU backend against the machine's read bandwidth and ggml's figures.

use super::record::quantiles;
use anyhow::Context;
use attn_plan::{DecodeRequest, DecodeSpec, PageTable, SplitPlan};
use cpu_reference::case::Rng;
use cpu_reference::{DotProduct, Isa, Workspace, measure};
use kv_quant::{CacheBuffers, CacheFormat, CacheLayout, FloatSlice, FloatSliceMut, FloatType, ScaleType};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

mod ggml;
mod memory;
mod plot;
mod threads;

use memory::CacheMemory;

/// Options of `bench cpu`.
#[derive(clap::Args, Clone, Debug)]
pub struct CpuArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Also write JSON to this file, with the details that the table has
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Draw time against bytes, with the machine's bandwidth as the roof
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Instruction set (portable, avx2, avx512); the best of this machine if not given
    #[arg(long)]
    isa: Option<String>,
    /// q.k in integers
    #[arg(long)]
    int8: bool,
    /// Cache and read measurement in huge pages, where the operating system has them
    #[arg(long)]
    huge_pages: bool,
    /// Group lengths
    #[arg(long, value_delimiter = ',', default_values_t = [8, 32, 128])]
    group_len: Vec<u32>,
    /// Timed steps of each case
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
    /// ggml's program (`benches/peers/ggml.c`), to run just before each case; figures of another machine if not given
    #[arg(long, value_name = "PROGRAM")]
    ggml: Option<PathBuf>,
    /// Threads
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, |n| n.get()))]
    threads: usize,
}

/// Turns of a case in which one thread and then all are timed.
const TURNS: usize = 4;
/// Steps before each of them that are not timed: a core that slept takes some milliseconds to be as fast as the other.
const WARM_STEPS: usize = 50;

/// A head shape and a length: one request, one new token.
struct Case {
    name: &'static str,
    num_kv_heads: u32,
    gqa_group: u32,
    head_dim: u32,
    kv_len: u32,
    /// ggml's flash attention, one query token, on the machine that [`ggml::TABLE`] names: microseconds with a q8_0 and an f16
    /// cache.
    ggml: [f64; 2],
}

const CASES: [Case; 5] = [
    case("8x4 d128 t1024", [8, 4, 128, 1024], [1242.0, 793.0]),
    case("8x4 d128 t8192", [8, 4, 128, 8192], [8940.0, 6640.0]),
    case("8x1 d128 t8192", [8, 1, 128, 8192], [2459.0, 2094.0]),
    case("3x3 d64 t4096", [3, 3, 64, 4096], [985.0, 715.0]),
    case("4x7 d128 t4096", [4, 7, 128, 4096], [4192.0, 3157.0]),
];

const fn case(name: &'static str, shape: [u32; 4], ggml: [f64; 2]) -> Case {
    let [num_kv_heads, gqa_group, head_dim, kv_len] = shape;
    Case { name, num_kv_heads, gqa_group, head_dim, kv_len, ggml }
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    cpu: &'a str,
    isa: &'a str,
    threads: usize,
    read_gb_per_s: f64,
    /// Whose figures `ratio_to` is of.
    ggml: &'a str,
    rows: Vec<SummaryRow<'a>>,
}

/// One case of it.
#[derive(Debug, Serialize)]
struct SummaryRow<'a> {
    case: &'a str,
    group_len: u32,
    microseconds: f64,
    gb_per_s: f64,
    share_of_read: f64,
    ratio_to: &'a BTreeMap<&'static str, f64>,
}

impl<'a> Summary<'a> {
    fn of(record: &'a Record) -> Self {
        let row = |row: &'a Row| SummaryRow {
            case: row.case,
            group_len: row.group_len,
            microseconds: row.microseconds,
            gb_per_s: row.gb_per_s,
            share_of_read: row.share_of_read,
            ratio_to: &row.ratio_to,
        };
        let Record { cpu, isa, threads, read_gb_per_s, ggml, .. } = record;
        let rows = record.rows.iter().map(row).collect();
        Self { cpu, isa, threads: *threads, read_gb_per_s: *read_gb_per_s, ggml, rows }
    }
}

/// What is kept of a run.
#[derive(Debug, Serialize)]
struct Record {
    cpu: String,
    isa: &'static str,
    /// How q.k was computed.
    dot: &'static str,
    threads: usize,
    huge_pages: bool,
    commit: String,
    /// Whose figures `ratio_to` is of.
    ggml: String,
    read_gb_per_s: f64,
    /// f32 input that one thread quantizes and stores, group 32.
    append_gb_per_s: f64,
    rows: Vec<Row>,
}

/// One case. Times are of one step; `gb_per_s` counts codes and scales once, at the median time.
#[derive(Debug, Serialize)]
struct Row {
    case: &'static str,
    group_len: u32,
    megabytes: f64,
    microseconds: f64,
    best_microseconds: f64,
    one_thread_microseconds: f64,
    scaling: f64,
    gb_per_s: f64,
    share_of_read: f64,
    relative_error: f64,
    ggml_microseconds: [f64; 2],
    ratio_to: BTreeMap<&'static str, f64>,
}

/// Runs the command.
pub fn run(args: &CpuArgs) -> anyhow::Result<()> {
    let isa = match &args.isa {
        None => Isa::from_env()?,
        Some(name) => {
            let isa = Isa::ALL.into_iter().find(|isa| isa.name() == name);
            isa.with_context(|| format!("no instruction set {name}"))?
        }
    };
    let dot = if args.int8 { DotProduct::Int8 } else { DotProduct::F32 };
    let (all, one) = (threads::pool(args.threads)?, threads::pool(1)?);
    let read = || -> anyhow::Result<f64> {
        if !args.huge_pages {
            return Ok(all.install(|| measure::read_bandwidth(10)) / 1e9);
        }
        let mut bytes = memory::huge(measure::READ_BYTES)?;
        bytes.fill(1);
        Ok(all.install(|| measure::read_bandwidth_of(&bytes, 10)) / 1e9)
    };
    let mut record = Record {
        cpu: cpu_name(),
        isa: isa.name(),
        dot: if args.int8 { "int8" } else { "f32" },
        threads: args.threads,
        huge_pages: args.huge_pages,
        commit: crate::workspace::commit(),
        ggml: ggml::TABLE.to_owned(),
        read_gb_per_s: read()?,
        append_gb_per_s: one.install(|| append_rate(isa))?,
        rows: Vec::new(),
    };
    for case in &CASES {
        let mut peer = case.ggml;
        if let Some(program) = &args.ggml {
            let figures = ggml::run(program, case, args.threads, args.samples as usize)?;
            (record.ggml, peer) =
                (format!("{}, just before each case", figures.version), figures.microseconds);
        }
        for &group_len in &args.group_len {
            if case.head_dim.is_multiple_of(group_len) {
                let problem = Problem::new(case, group_len, args.huge_pages)?;
                let row = problem.measure(case, (isa, dot), args.samples as usize, [&all, &one])?;
                let names = ggml::CACHES.map(|(name, _)| name);
                record.rows.push(Row {
                    share_of_read: row.gb_per_s / record.read_gb_per_s,
                    ggml_microseconds: peer,
                    ratio_to: names.into_iter().zip(peer.map(|us| us / row.microseconds)).collect(),
                    ..row
                });
            }
        }
    }
    // The machine may have been slower when the first figure was taken.
    let after = read()?;
    if after > record.read_gb_per_s {
        record.read_gb_per_s = after;
        record.rows.iter_mut().for_each(|row| row.share_of_read = row.gb_per_s / after);
    }
    if let Some(path) = &args.record {
        let json = serde_json::to_string_pretty(&record)?;
        std::fs::write(path, format!("{json}\n")).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.plot {
        plot::draw(path, &record)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Summary::of(&record))?);
    } else {
        print(&record);
    }
    Ok(())
}

/// A filled cache of 16-token pages in random order, and a query.
struct Problem {
    layout: CacheLayout,
    cache: CacheMemory,
    spec: DecodeSpec,
    pages: Vec<i32>,
    q: Vec<f32>,
    bytes: f64,
}

impl Problem {
    fn new(case: &Case, group_len: u32, is_huge: bool) -> anyhow::Result<Self> {
        let Case { num_kv_heads, gqa_group, head_dim, kv_len, .. } = *case;
        let format = CacheFormat::new(num_kv_heads, head_dim, group_len, group_len, ScaleType::F16)?;
        let layout = CacheLayout::native(format, u64::from(kv_len.div_ceil(16)), 16)?;
        let mut cache = CacheMemory::zeroed(&layout, is_huge)?;
        let mut rng = Rng::new(1);
        let mut pages: Vec<i32> = (0..layout.num_pages() as i32).collect();
        rng.shuffle(&mut pages);
        let slots: Vec<i64> = (0..i64::from(kv_len)).collect();
        let len = kv_len as usize * (num_kv_heads * head_dim) as usize;
        let noise: Vec<f32> = (0..1 << 16).map(|_| rng.gaussian()).collect();
        // A long period that is no multiple of a row.
        let x: Vec<f32> = noise[..65_521].iter().copied().cycle().take(len).collect();
        let x = FloatSlice::F32(&x);
        cpu_reference::append(&layout, &mut cache.view_mut(&layout)?, x, x, &slots)?;
        let mut spec = DecodeSpec::new(num_kv_heads * gqa_group, num_kv_heads, head_dim);
        (spec.q_type, spec.out_type) = (FloatType::F32, FloatType::F32);
        let q = (0..spec.q_elements(1)).map(|_| rng.gaussian()).collect();
        let bytes = (format.bytes_per_token() * u64::from(kv_len)) as f64;
        Ok(Self { layout, cache, spec, pages, q, bytes })
    }

    fn measure(
        &self,
        case: &Case,
        (isa, dot): (Isa, DotProduct),
        samples: usize,
        [all, one]: [&rayon::ThreadPool; 2],
    ) -> anyhow::Result<Row> {
        let kv_lens = [case.kv_len];
        let page_table = PageTable::padded(&self.pages, self.pages.len() as u64);
        let request = DecodeRequest { spec: &self.spec, kv_lens: &kv_lens, page_table };
        request.check(&self.layout)?;
        let mut out = vec![0f32; self.q.len()];
        let view = self.cache.view(&self.layout)?;
        let mut workspaces = [Workspace::for_isa(isa)?.with_dot(dot), Workspace::for_isa(isa)?.with_dot(dot)];
        let mut steps = |pool: usize, count: usize| -> anyhow::Result<Vec<f64>> {
            let split = cpu_reference::Machine::here()
                .split_config(self.layout.format(), attn_plan::SplitPolicy::Throughput);
            let plan = SplitPlan::new(&self.spec, &kv_lens, &split)?;
            let mut times = Vec::with_capacity(count);
            for step in 0..WARM_STEPS + count {
                let start = Instant::now();
                let (q, out) = (FloatSlice::F32(&self.q), FloatSliceMut::F32(&mut out));
                let workspace = &mut workspaces[pool];
                cpu_reference::decode(&self.layout, view, &request, &plan, q, out, None, workspace)?;
                if step >= WARM_STEPS {
                    times.push(start.elapsed().as_secs_f64() * 1e6);
                }
            }
            Ok(times)
        };
        // In turns, so that both feel the same of a machine whose speed wanders.
        let mut times = [Vec::with_capacity(samples), Vec::with_capacity(samples)];
        for turn in 0..TURNS {
            let count = (samples * (turn + 1)).div_ceil(TURNS) - (samples * turn).div_ceil(TURNS);
            times[0].extend(one.install(|| steps(0, count))?);
            times[1].extend(all.install(|| steps(1, count))?);
        }
        let [(one_thread, ..), (median, ..)] = times.each_mut().map(|times| quantiles(times));
        let best = times[1].first().copied().unwrap_or(f64::NAN);
        let oracle = cpu_reference::oracle::decode_request(
            &self.layout,
            &self.cache.view(&self.layout)?,
            &request,
            FloatSlice::F32(&self.q),
        )?;
        let want: Vec<f64> = oracle.into_iter().flat_map(|oracle| oracle.out).collect();
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut out.iter().zip(&want).map(|(got, want)| f64::from(*got) - want));
        let gb_per_s = self.bytes / median / 1e3;
        Ok(Row {
            case: case.name,
            group_len: self.layout.format().group_len(kv_quant::Side::K),
            megabytes: self.bytes / 1e6,
            microseconds: median,
            best_microseconds: best,
            one_thread_microseconds: one_thread,
            scaling: one_thread / median,
            gb_per_s,
            share_of_read: 0.0,
            relative_error: error / norm(&mut want.iter().copied()),
            ggml_microseconds: [0.0; 2],
            ratio_to: BTreeMap::new(),
        })
    }
}

/// GB/s of f32 input that one thread appends, best of several passes over a megabyte a side.
fn append_rate(isa: Isa) -> anyhow::Result<f64> {
    let format = CacheFormat::new(8, 128, 32, 32, ScaleType::F16)?;
    let layout = CacheLayout::native(format, 16, 16)?;
    let mut cache = CacheBuffers::zeroed(&layout)?;
    let slots: Vec<i64> = (0..256).collect();
    let mut rng = Rng::new(2);
    let x: Vec<f32> = (0..256 * 1024).map(|_| rng.gaussian()).collect();
    let mut best = f64::INFINITY;
    for _ in 0..100 {
        let start = Instant::now();
        let x = FloatSlice::F32(&x);
        cpu_reference::append_on(isa, &layout, &mut cache.view_mut(), x, x, &slots)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * 4.0 * x.len() as f64 / best / 1e9)
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn print(record: &Record) {
    let Record { cpu, isa, dot, threads, huge_pages, read_gb_per_s, append_gb_per_s, .. } = record;
    let pages = if *huge_pages { "huge pages" } else { "ordinary pages" };
    println!(
        "{cpu}, {isa}, q.k in {dot}, {threads} threads, {pages}; read bandwidth {read_gb_per_s:.1} GB/s"
    );
    println!("append: {append_gb_per_s:.1} GB/s of f32 input on one thread");
    println!("ggml: {}", record.ggml);
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "case",
        "group",
        "MB",
        "us",
        "best us",
        "1 thread us",
        "scaling",
        "GB/s",
        "of read",
        "error",
        "vs q8_0",
        "vs f16",
    ]);
    for row in &record.rows {
        let ratio = |name| row.ratio_to.get(name).map_or_else(String::new, |ratio| format!("{ratio:.1}x"));
        table.add_row([
            row.case.to_owned(),
            row.group_len.to_string(),
            format!("{:.1}", row.megabytes),
            format!("{:.0}", row.microseconds),
            format!("{:.0}", row.best_microseconds),
            format!("{:.0}", row.one_thread_microseconds),
            format!("{:.2}", row.scaling),
            format!("{:.1}", row.gb_per_s),
            format!("{:.0} %", 100.0 * row.share_of_read),
            format!("{:.1e}", row.relative_error),
            ratio("ggml_q8_0"),
            ratio("ggml_f16"),
        ]);
    }
    println!("{table}");
}
