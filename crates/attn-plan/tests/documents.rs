//! What `docs/split-schedule.md` shows is what the code prints.

#![allow(clippy::unwrap_used, reason = "a failure is the point")]

use attn_plan::{DecodeSpec, SplitConfig, SplitPlan, SplitPolicy, WorkspaceSize};

fn document() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/split-schedule.md")).unwrap()
}

#[test]
fn the_example_plans_are_printed_as_shown() {
    let document = document();
    let (spec, lens) = (DecodeSpec::new(32, 8, 128), [300, 2000, 0, 64, 700]);
    let config = SplitConfig::throughput(4);
    let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
    assert!(document.contains(&plan.to_string()), "{plan}");
    assert!(document.contains(&format!("`worker_starts` is `{:?}`", plan.worker_starts())));
    assert!(document.contains(&format!("`request_partials` is `{:?}`", plan.request_partials())));
    let config = config.with_policy(SplitPolicy::BatchInvariant { split_len: 512 });
    let plan = SplitPlan::new(&spec, &lens, &config).unwrap();
    assert!(document.contains(&plan.to_string()), "{plan}");
}

#[test]
fn the_table_of_costs_is_what_the_plans_say() {
    let document = document();
    let spec = DecodeSpec::new(32, 8, 128);
    let mut num_rows = 0;
    for line in
        document.lines().filter(|line| line.contains("| throughput |") || line.contains("| batch-invariant("))
    {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let split_len = cells[1].trim_start_matches("batch-invariant(").trim_end_matches(')').parse();
        let policy =
            split_len.map_or(SplitPolicy::Throughput, |split_len| SplitPolicy::BatchInvariant { split_len });
        let lens = vec![8192u32; cells[0].parse().unwrap()];
        let plan = SplitPlan::new(&spec, &lens, &SplitConfig::throughput(33).with_policy(policy)).unwrap();
        let traffic = 2.0 * WorkspaceSize::of(&spec, &plan).unwrap().bytes() as f64;
        let percent = 100.0 * traffic / (lens.len() as f64 * 8192.0 * 2560.0);
        let digits = if percent < 0.1 { 2 } else { 1 };
        let want = [
            plan.items().len().to_string(),
            plan.num_partials().to_string(),
            format!("{percent:.digits$} %"),
            plan.makespan().to_string(),
            format!("{:.0} %", 100.0 * plan.efficiency()),
        ];
        assert_eq!(cells[2..], want, "{line}");
        num_rows += 1;
    }
    assert_eq!(num_rows, 11);
}
