//! Profiles that are damaged, foreign, stale or edited by hand: a warning that says so, and the rest is used.
#![allow(clippy::expect_used, clippy::panic, reason = "a test")]

mod common;

use attn_tune::{Cause, Level, PROFILE_DIR_VARIABLE, Profile, TUNE_VARIABLE, Tuner, file_name};
use common::{PROFILE, key, machine, shape, source, tuner};
use proptest::prelude::*;
use std::process::Command;

fn causes(text: &str) -> Vec<Cause> {
    tuner(text).warnings().iter().map(|warning| warning.cause.clone()).collect()
}

#[test]
fn a_profile_comes_back_as_it_was_written() {
    let (profile, left_out) = Profile::parse(PROFILE).expect("a good profile");
    assert!(left_out.is_empty());
    assert_eq!(profile.tables.len(), 3);
    let (again, _) = Profile::parse(&profile.to_string()).expect("what was written can be read");
    assert_eq!(again, profile);
    // Sorted: writing what was read changes the order of tables at most once.
    assert_eq!(again.to_string(), profile.to_string());
}

/// Whatever the order of its tables and lines, a file is written in one order; a new point is one new line.
#[test]
fn files_are_sorted_and_diffs_are_small() {
    let (profile, _) = Profile::parse(PROFILE).expect("a good profile");
    let text = profile.to_string();
    let (head, tables) = PROFILE.split_once("\n[[table]]").expect("tables");
    let mut tables: Vec<String> = tables
        .split("\n[[table]]")
        .map(|table| {
            let (key, points) = table.split_once("points = [\n").expect("points");
            let mut points: Vec<&str> = points.trim_end().trim_end_matches(']').lines().collect();
            points.reverse();
            format!("\n[[table]]{key}points = [\n{}\n]\n", points.join("\n"))
        })
        .collect();
    tables.reverse();
    let shuffled = format!("{head}{}", tables.concat());
    assert_ne!(shuffled, PROFILE);
    let (again, left_out) = Profile::parse(&shuffled).unwrap_or_else(|cause| panic!("{cause}"));
    assert!(left_out.is_empty(), "{left_out:?}");
    assert_eq!(again.to_string(), text);

    let mut more = profile;
    let table = more.tables.values_mut().last().expect("a table");
    let (run, point) = table.iter().next().map(|(run, point)| (*run, *point)).expect("a point");
    table.insert(attn_tune::RunKey { batch: run.batch + 1, ..run }, point);
    let more = more.to_string();
    let new: Vec<&str> = more.lines().filter(|line| !text.lines().any(|old| old == *line)).collect();
    assert_eq!((new.len(), more.lines().count()), (1, text.lines().count() + 1));
}

#[test]
fn the_environment_names_a_level_and_nothing_else_does() {
    let all = [
        (Level::Off, "off"),
        (Level::Profiles, "profiles"),
        (Level::Missing, "missing"),
        (Level::Force, "force"),
    ];
    for (level, name) in all {
        assert_eq!(name.parse(), Ok(level));
        assert_eq!(level.to_string(), name);
        assert_eq!(level.measures(), matches!(level, Level::Missing | Level::Force));
    }
    assert_eq!(Level::default(), Level::Profiles);
    // In processes of their own: this one's environment is everybody's.
    for (set, want) in [(None, "profiles"), (Some("force"), "force"), (Some("off"), "off")] {
        assert_eq!(in_environment(TUNE_VARIABLE, set, "level"), want);
    }
    assert!(in_environment(TUNE_VARIABLE, Some("always"), "level").contains("no tuning level"));
    assert_eq!(in_environment(PROFILE_DIR_VARIABLE, Some("/profiles"), "folder"), "/profiles");
    #[cfg(target_os = "linux")]
    assert_eq!(in_environment("XDG_CONFIG_HOME", Some("/config"), "folder"), "/config/kv8/profiles");
    let error = "always".parse::<Level>().expect_err("no level");
    assert!(error.to_string().contains("off, profiles, missing, force"), "{error}");
}

/// What a process answers whose environment has one variable more, or less.
fn in_environment(variable: &str, value: Option<&str>, what: &str) -> String {
    let mut process = Command::new(std::env::current_exe().expect("this program"));
    process.args(["--exact", "what_the_environment_says", "--ignored", "--nocapture"]);
    process.env_remove(TUNE_VARIABLE).env_remove(PROFILE_DIR_VARIABLE);
    process.envs(value.map(|value| (variable, value)));
    let output = process.output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.split(&format!("{what}: ")).nth(1));
    line.unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
#[allow(clippy::print_stdout, reason = "its answer")]
fn what_the_environment_says() {
    println!(
        "\nlevel: {}",
        Level::from_env().map_or_else(|error| error.to_string(), |level| level.to_string())
    );
    println!("folder: {}", attn_tune::user_dir().expect("a platform with folders").display());
}

#[test]
fn names_with_quotes_are_escaped() {
    let (mut profile, _) = Profile::parse(PROFILE).expect("a good profile");
    profile.device = "a \"GPU\" \\ with\nlines".to_owned();
    let (again, _) = Profile::parse(&profile.to_string()).expect("what was written can be read");
    assert_eq!(again.device, profile.device);
}

#[test]
fn each_fault_has_its_own_warning() {
    assert!(matches!(causes("")[..], [Cause::Damaged { .. }]));
    assert!(matches!(causes("\u{0}garbage")[..], [Cause::Damaged { .. }]));
    assert_eq!(causes(&PROFILE.replace("version = 1", "version = 2")), [Cause::Version { found: 2 }]);
    let foreign = causes(&PROFILE.replace("\"A GPU\"", "\"Another GPU\""));
    let (found, wanted) = ("Another GPU (sm_90)".to_owned(), "A GPU (sm_90)".to_owned());
    assert_eq!(foreign, [Cause::Foreign { found, wanted }]);
    let stale = causes(&PROFILE.replace("0123456789ab", "ba9876543210"));
    let (found, wanted) = ("ba9876543210".to_owned(), "0123456789ab".to_owned());
    assert_eq!(stale, [Cause::Stale { found, wanted }]);
    for damage in ["read_gb_per_s = nan", "read_gb_per_s = -1.0", "read_gb_per_s = 0.0", "read_speed = 3.0"] {
        let text = PROFILE.replace("read_gb_per_s = 3111.5", damage);
        assert!(matches!(causes(&text)[..], [Cause::Damaged { .. }]), "{damage}");
    }
}

#[test]
fn a_bad_entry_is_left_out_and_the_others_serve() {
    let edits = [
        ("blocks = 128", "blocks = 0"),
        ("blocks = 128", "blocks = 99999999"),
        ("blocks = 128", "blocks = -1"),
        ("blocks = 128, ", ""),
        ("blocks = 128", "blocks = 128, threads = 7"),
        ("blocks = 128, heads = 1", "blocks = 128, heads = 3"),
        ("blocks = 128, heads = 1", "blocks = 128, heads = 1.5"),
        ("tokens = 1024, longest = 1024", "tokens = 1024, longest = 1025"),
        ("tokens = 1024, longest = 1024", "tokens = 1025, longest = 1024"),
        ("us = 5.25", "us = inf"),
        ("us = 5.25", "us = \"fast\""),
        ("batch = 1,", "batch = 0,"),
    ];
    let name = "d128 k8 v8 f16 gqa4 q1 records-paged throughput";
    for (from, to) in edits {
        let text = PROFILE.replace(from, to);
        assert_ne!(text, PROFILE, "{from}");
        let tuner = tuner(&text);
        assert!(matches!(tuner.warnings()[..], [ref w] if matches!(w.cause, Cause::BadEntry { .. })), "{to}");
        assert_eq!(tuner.chooser(key(name), shape()).points().len(), 2, "{to}");
    }
    let bad_key = tuner(&PROFILE.replace("gqa4 q1 planes", "gqa4 planes"));
    assert_eq!((bad_key.warnings().len(), bad_key.keys().count()), (1, 2));
    let twice = PROFILE.replace(
        "batch = 128, kv_heads = 8, tokens = 1048576, longest = 8192, blocks = 396, heads = 1",
        "batch = 1, kv_heads = 8, tokens = 1024, longest = 1024, blocks = 64, heads = 1",
    );
    assert!(matches!(causes(&twice)[..], [Cause::BadEntry { ref reason, .. }] if reason.contains("twice")));
}

#[test]
fn off_reads_nothing() {
    let tuner = Tuner::from_sources(machine(), Level::Off, [&source(PROFILE)]);
    assert_eq!((tuner.keys().count(), tuner.warnings().len()), (0, 0));
}

#[test]
fn the_users_profile_overrides_point_by_point() {
    let mine = PROFILE.replace("blocks = 128, heads = 1", "blocks = 64, heads = 1");
    let start = mine.find("    { batch = 8, kv_heads = 8, tokens = 16384").expect("there");
    let end = mine[start..].find('\n').expect("a line") + start + 1;
    let mine = format!("{}{}", &mine[..start], &mine[end..]);
    let tuner = Tuner::from_sources(machine(), Level::Profiles, [&source(PROFILE), &source(&mine)]);
    let chooser = tuner.chooser(key("d128 k8 v8 f16 gqa4 q1 records-paged throughput"), shape());
    let blocks: Vec<u32> = chooser.points().iter().map(|(_, point)| point.choice.num_blocks).collect();
    assert_eq!(blocks, [64, 264, 396]);
}

#[test]
fn a_folder_is_read_and_an_unreadable_file_is_a_warning() {
    let dir = std::env::temp_dir().join(format!("kv8-profiles-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    let file = dir.join(file_name("A GPU"));
    assert!(Tuner::new(machine(), Level::Profiles, Some(&dir)).warnings().is_empty(), "no file is no fault");
    std::fs::write(&file, PROFILE).expect("a file");
    assert_eq!(Tuner::new(machine(), Level::Profiles, Some(&dir)).keys().count(), 3);
    std::fs::write(&file, [0xff, 0xfe, 0x00]).expect("a file");
    let tuner = Tuner::new(machine(), Level::Profiles, Some(&dir));
    assert!(matches!(tuner.warnings()[..], [ref w] if matches!(w.cause, Cause::Unreadable { .. })));
    std::fs::remove_dir_all(&dir).expect("it is ours");
}

#[test]
fn what_was_learned_is_kept_beside_what_stood_there() {
    let dir = std::env::temp_dir().join(format!("kv8-learned-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    let file = dir.join(file_name("A GPU"));
    std::fs::write(&file, PROFILE).expect("a file");
    let mut tuner = Tuner::new(machine(), Level::Missing, Some(&dir));
    assert_eq!(tuner.save(&dir, "13.1", "2026-12-01").expect("nothing to write"), None);
    let name = key("d64 k32 v32 f16 gqa7 q1 records-paged throughput");
    let (run, point) = Profile::parse(PROFILE)
        .expect("a good profile")
        .0
        .tables
        .into_values()
        .flatten()
        .next()
        .expect("a point");
    tuner.learn(name, run, point);
    assert_eq!(tuner.chooser(name, shape()).points(), [(run, point)]);
    assert_eq!(tuner.save(&dir, "13.1", "2026-12-01").expect("written"), Some(file.clone()));
    let (kept, left_out) = Profile::parse(&std::fs::read_to_string(&file).expect("a file")).expect("good");
    assert!(left_out.is_empty());
    assert_eq!((kept.tables.len(), kept.date.as_str()), (4, "2026-12-01"));
    // Of other kernels: replaced, not mixed.
    std::fs::write(&file, PROFILE.replace("0123456789ab", "ba9876543210")).expect("a file");
    tuner.save(&dir, "13.1", "2026-12-01").expect("written");
    let text = std::fs::read_to_string(&file).expect("a file");
    assert_eq!(Profile::parse(&text).expect("good").0.tables.len(), 1);
    std::fs::remove_dir_all(&dir).expect("it is ours");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to a file, reading it ends, and what is left of it can be launched.
    #[test]
    fn no_damage_gets_through(
        cut in 0..PROFILE.len(),
        edits in proptest::collection::vec((0..PROFILE.len(), any::<u8>()), 0..4),
        tokens in 1u32..1_000_000,
    ) {
        let mut bytes = PROFILE.as_bytes().to_vec();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        if cut % 3 == 0 {
            bytes.truncate(cut);
        }
        let tuner = tuner(&String::from_utf8_lossy(&bytes));
        for name in tuner.keys() {
            let chooser = tuner.chooser(*name, shape());
            let choice = chooser.choose(&attn_tune::RunKey::of([tokens], 8)).choice;
            let split = choice.split(attn_plan::SplitPolicy::Throughput, 8, 1);
            prop_assert_eq!(split.check(), Ok(()));
            prop_assert!(8 % choice.heads_per_block == 0);
        }
    }
}
