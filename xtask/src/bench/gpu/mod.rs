//! The CUDA benchmark: every case is a graph of launches over page tables that rotate through more memory than the L2
//! holds five times over, on random data, with everything that follows q counted.

mod measure;
mod pool;
mod step;

pub use measure::Bench;
pub use pool::Pool;
pub use step::{DevicePlan, Step};

use super::GpuArgs;
use super::case::Case;
pub use super::record::quantiles;
use super::record::{Record, Row, peers};
use super::suites;
use anyhow::{Context, Result, ensure};
use attn_kernels::device::{CudaDevice, Kernels, Stream};
use attn_plan::SplitConfig;
use measure::Measured;

/// Runs the suites that were asked for, prints the table or the JSON, keeps the record.
pub fn run(args: &GpuArgs) -> Result<()> {
    let device = CudaDevice::open(args.device).context("no CUDA device to measure")?;
    let kernels = Kernels::embedded(&device)?;
    let stream = Stream::new(&device)?;
    let suites = suites::named(&args.suite)?;
    let facts = device.facts();
    let bench = Bench::new(&device, &kernels, &stream, args.samples)?;
    let mut record = Record {
        gpu: facts.name.clone(),
        driver: format!("{}.{}", facts.driver_version / 1000, facts.driver_version % 1000 / 10),
        commit: crate::workspace::commit(),
        read_gb_per_s: bench.read_gb_per_s,
        copy_gb_per_s: bench.copy_gb_per_s,
        rows: Vec::new(),
    };
    eprintln!("{}: read {:.0} GB/s, copy {:.0} GB/s", record.gpu, record.read_gb_per_s, record.copy_gb_per_s);
    for (suite, cases) in suites {
        // Cases over one pool follow each other, so that a pool is filled once.
        let mut pool = None;
        for case in &cases {
            let row = bench
                .case(suite, case, &mut pool, args)
                .with_context(|| format!("{suite}: {}", case.name()))?;
            if !args.json {
                print_row(&row);
            }
            record.rows.push(row);
        }
    }
    let json = serde_json::to_string_pretty(&record)?;
    if let Some(path) = &args.record {
        std::fs::write(path, format!("{json}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{json}");
    }
    Ok(())
}

fn print_row(row: &Row) {
    let best = row.ratio_to.iter().min_by(|a, b| a.1.total_cmp(b.1));
    println!(
        "{:10} {:44} {:8.1} MB {:8.1} us  {:5.1} % of read  {}  {}{}",
        row.suite,
        row.case,
        row.megabytes,
        row.microseconds,
        100.0 * row.share_of_read,
        row.copy_only_microseconds.map_or("no reader".to_owned(), |us| {
            format!("{:5.1} % of copy-only {us:8.1} us", 100.0 * us / row.microseconds)
        }),
        row.relative_error.map_or(String::new(), |error| format!("err {error:.1e}  ")),
        best.map_or(String::new(), |(system, ratio)| format!("{ratio:.2}x {system}")),
    );
}

impl Bench<'_> {
    fn decode(&self, case: &Case, pool: &mut Option<Pool>, args: &GpuArgs) -> Result<Measured> {
        let mut step = Step::new(self, case, pool)?;
        let default = step.default_split()?;
        let split = SplitConfig {
            item_overhead: args.item_overhead.unwrap_or(default.item_overhead),
            min_split_tiles: args.min_split_tiles.unwrap_or(default.min_split_tiles),
            ..default
        };
        let plan = step.plan(&split)?;
        let got = step.run(&plan)?;
        let got = got.to_f32();
        ensure!(got.iter().all(|x| x.is_finite()), "the output has values that are not finite");
        let of_first = || Ok::<_, anyhow::Error>(step::relative_error(&got, &step.oracle()?));
        let relative_error = case.is_checked.then(of_first).transpose()?;
        let microseconds = step.time(&plan, self.num_samples)?;
        let copy_only_microseconds = step.time_reader(self.num_samples)?;
        let text = format!(
            "{}: {} {}, {} heads a block, {} items, {} partials, {}",
            split.policy,
            if plan.num_shares > 0 { plan.num_shares } else { plan.plan.num_busy_workers() },
            if plan.num_shares > 0 { "shares" } else { "workers" },
            plan.heads_per_block,
            plan.plan.items().len(),
            plan.plan.num_partials(),
            step.symbol(&plan)
        );
        Ok(Measured {
            microseconds,
            copy_only_microseconds,
            bytes: step.inputs.bytes,
            relative_error,
            plan: text,
        })
    }

    fn case(&self, suite: &'static str, case: &Case, pool: &mut Option<Pool>, args: &GpuArgs) -> Result<Row> {
        let measured = match case.append_tokens {
            Some(tokens) => self.append(case, tokens)?,
            None => self.decode(case, pool, args)?,
        };
        let mut samples = measured.microseconds;
        let (microseconds, p10, p90) = quantiles(&mut samples);
        let (copy_only, _, _) = quantiles(&mut measured.copy_only_microseconds.clone());
        let copy_only = Some(copy_only).filter(|us| us.is_finite());
        let gb_per_s = measured.bytes / microseconds / 1e3;
        let spec = &case.spec;
        let kv_len = case.kv_lens.iter().copied().max().unwrap_or(0);
        let batch = case.kv_lens.len();
        let peers = if case.is_plain() {
            peers(&self.gpu, spec.num_q_heads, spec.num_kv_heads, spec.head_dim, batch, kv_len)
        } else {
            Default::default()
        };
        Ok(Row {
            suite: suite.to_owned(),
            case: case.name(),
            layout: case.layout.to_string(),
            page_len: case.page_len,
            group_len: case.group_len,
            num_q_heads: spec.num_q_heads,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            batch,
            kv_len,
            megabytes: measured.bytes / 1e6,
            microseconds,
            p10_microseconds: p10,
            p90_microseconds: p90,
            gb_per_s,
            share_of_read: gb_per_s / self.read_gb_per_s,
            copy_only_microseconds: copy_only,
            share_of_copy_only: copy_only.map(|us| us / microseconds),
            relative_error: measured.relative_error,
            plan: measured.plan,
            ratio_to: peers.into_iter().map(|(system, us)| (system, us / microseconds)).collect(),
        })
    }
}
