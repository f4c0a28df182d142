//! `cargo xtask bundle`: test and bench programs with their fixtures in one folder, for a machine that has a GPU and its
//! driver but neither Rust nor a toolkit.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace;

#[derive(clap::Args)]
pub struct Args {
    /// Where the bundle goes; replaced if it is there [default: target/bundle]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Packages whose tests are taken; may be given several times [default: all]
    #[arg(short, long, value_name = "NAME")]
    package: Vec<String>,
    /// Leave out the programs (`xtask` with its demo and benches, `kv8-validate`, `smollm2`); tests alone
    #[arg(long)]
    tests_only: bool,
}

/// What programs read at run time, by folder below the root.
const FIXTURES: [&str; 2] = ["tests/fixtures", "benches"];

/// One program of the bundle.
struct Program {
    /// Folder of its package below the root, which tests find in `CARGO_MANIFEST_DIR`.
    package_dir: PathBuf,
    name: String,
    executable: PathBuf,
}

pub fn run(args: &Args) -> Result<()> {
    let root = workspace::root();
    let image = workspace::kernels_output().join("kv8.fatbin");
    ensure!(image.is_file(), "there is no {}: run `cargo xtask kernels` first", image.display());
    let out = args.out.clone().unwrap_or_else(|| root.join("target/bundle"));
    check_replaceable(&out)?;

    let packages: Vec<String> = if args.package.is_empty() {
        vec!["--workspace".to_owned()]
    } else {
        args.package.iter().flat_map(|name| ["-p".to_owned(), name.clone()]).collect()
    };
    println!("building tests with feature cuda");
    let tests = build(&root, &["test", "--no-run", "--features", "cuda"], &packages, true)?;
    let tools = if args.tests_only {
        Vec::new()
    } else {
        println!("building xtask, kv8-validate and smollm2 with feature cuda");
        let packages = ["-p", "xtask", "-p", "attn-backend", "-p", "smollm2", "--bins"].map(str::to_owned);
        build(&root, &["build", "--release", "--features", "cuda"], &packages, false)?
    };
    ensure!(!tests.is_empty(), "cargo built no tests");

    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("removing {}", out.display()))?;
    }
    for (folder, programs) in [("tests", &tests), ("tools", &tools)] {
        let folder = out.join("bin").join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        for program in programs {
            install(&program.executable, &folder.join(&program.name))?;
        }
    }
    let packages: BTreeSet<&Path> = tests.iter().map(|program| program.package_dir.as_path()).collect();
    for package in packages {
        fs::create_dir_all(out.join(package))?;
    }
    for fixtures in FIXTURES {
        let from = root.join(fixtures);
        if from.is_dir() {
            copy_tree(&from, &out.join(fixtures))?;
        }
    }
    fs::copy(workspace::kernels_output().join("manifest.json"), out.join("manifest.json"))?;
    let mutants = crate::mutants::output();
    if mutants.is_dir() {
        copy_tree(&mutants, &out.join("mutants"))?;
    }
    fs::write(out.join(MARK), "This folder is written by `cargo xtask bundle` and replaced by it.\n")?;
    write_script(&out.join("run.sh"), &tests)?;
    println!(
        "{} tests, {} tools, {:.1} MB: {}",
        tests.len(),
        tools.len(),
        size(&out)? as f64 / 1e6,
        out.display()
    );
    println!("there: ./run.sh, or ./run.sh --list, ./run.sh TEST [ARGUMENTS OF THE TEST PROGRAM]");
    Ok(())
}

/// A file by which a bundle is known, so that nothing else is ever removed.
const MARK: &str = "BUNDLE";

fn check_replaceable(out: &Path) -> Result<()> {
    let empty = fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    ensure!(empty || out.join(MARK).is_file(), "{} is no bundle; it is left alone", out.display());
    Ok(())
}

/// Runs cargo and answers the programs that it made.
fn build(root: &Path, command: &[&str], packages: &[String], tests: bool) -> Result<Vec<Program>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .env("KV8_COMMIT", crate::workspace::commit())
        .args(command)
        .args(packages)
        .arg("--message-format=json-render-diagnostics")
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo")?;
    ensure!(output.status.success(), "cargo {} failed", command.join(" "));
    let mut programs: Vec<Program> = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let (Some(executable), Some(manifest), Some(target)) = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
            message["target"]["name"].as_str(),
        ) else {
            continue;
        };
        if message["profile"]["test"].as_bool() != Some(tests) {
            continue;
        }
        let manifest_dir = Path::new(manifest).parent().unwrap_or(root);
        let package_dir = manifest_dir.strip_prefix(root).unwrap_or(manifest_dir).to_path_buf();
        let package =
            package_dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let name = if tests { format!("{package}-{target}") } else { target.to_owned() };
        programs.push(Program { package_dir, name, executable: executable.into() });
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

/// Copies a program without its debugging information, where `strip` is at hand: it is most of the size.
fn install(from: &Path, to: &Path) -> Result<()> {
    let stripped =
        Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(from).stderr(Stdio::null()).status();
    if !stripped.is_ok_and(|status| status.success()) {
        fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(|| format!("copying {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() { size(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}

fn write_script(path: &Path, tests: &[Program]) -> Result<()> {
    let mut script = String::from(SCRIPT_HEAD);
    for test in tests {
        script += &format!("test_program {} {}\n", test.name, test.package_dir.display());
    }
    script += SCRIPT_TAIL;
    fs::write(path, script)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

const SCRIPT_HEAD: &str = r#"#!/bin/sh
# Runs the tests of this bundle; needs a GPU with its driver and nothing else.
#   ./run.sh                       all tests; a missing GPU is a failure
#   ./run.sh --list                their names
#   ./run.sh NAME [ARGUMENTS...]   one test program, with arguments of Rust's test harness
#   ./run.sh fuzz [CASES]          the suite on the GPU alone, with so many random cases for the kernels [64000]
#   ./run.sh sanitize              every kernel of the image under the four tools of compute-sanitizer
#   ./run.sh mutants               the suite against each image of mutants/ (cargo xtask mutants)
#   ./run.sh evidence              all GPU tests, then fuzz, sanitize and mutants
# KV8_REQUIRE_GPU=0 lets GPU tests skip. KV8_RUNNER is put before each program, for example
# KV8_RUNNER="compute-sanitizer --tool memcheck --error-exitcode 9".
here=$(cd "$(dirname "$0")" && pwd)
: "${KV8_REQUIRE_GPU:=1}"
export KV8_REQUIRE_GPU
[ -x "$here/bin/tools/kv8-validate" ] && export KV8_VALIDATE="$here/bin/tools/kv8-validate"
only=$1
[ $# -gt 0 ] && shift
it="$here/bin/tests/tests-it"
logs=${KV8_LOGS:-$here/logs}

# Each tool in a process of its own, all at once; arrays apart, so that a tool sees where each ends.
sanitize() {
    command -v compute-sanitizer > /dev/null || { echo "sanitize: there is no compute-sanitizer here"; return 2; }
    mkdir -p "$logs"
    for tool in memcheck racecheck initcheck synccheck; do
        (
            begin=$(date +%s)
            # A block has a barrier for each stage of each warp and one for shares: more than synccheck makes room for by itself,
            # which ends in a launch failure of the tool's own.
            more=
            [ $tool = synccheck ] && more="--num-cuda-barriers 1024"
            cd "$here/tests" && KV8_ALLOCATE_APART=1 CARGO_MANIFEST_DIR="$here/tests" \
                compute-sanitizer --tool $tool $more --error-exitcode 9 "$it" gpu::every_kernel --exact \
                > "$logs/$tool.log" 2>&1
            echo "$? $(($(date +%s) - begin))" > "$logs/$tool.end"
        ) &
    done
    wait
    bad=0
    for tool in memcheck racecheck initcheck synccheck; do
        read -r code seconds < "$logs/$tool.end"
        [ "$code" = 0 ] || bad=1
        echo "sanitize: $tool: exit code $code, $seconds s: $(grep -a SUMMARY "$logs/$tool.log" | tail -n 1)"
        grep -a "kernels of the image" "$logs/$tool.log" || bad=1
    done
    return $bad
}

# Eight processes at a time. Folder 0 is the image without a bug, which must pass.
mutants() {
    [ -d "$here/mutants" ] || { echo "mutants: run cargo xtask mutants before cargo xtask bundle"; return 2; }
    mkdir -p "$logs"
    rm -f "$logs"/mutant*
    ls "$here/mutants" | sort -n | xargs -P 8 -I{} sh -c "cd '$here/tests' && KV8_IMAGE_DIR='$here/mutants/{}' \
        CARGO_MANIFEST_DIR='$here/tests' '$it' gpu::seeded_bug --exact --ignored > '$logs/mutant-{}.log' 2>&1 \
        || echo {} >> '$logs/mutants.failed'"
    grep -ah "bug" "$logs"/mutant-*.log | grep -a "killed by\|SURVIVES\|no bug" | sort -u -t ' ' -k 2n | cut -c 1-200
    killed=$(grep -al "killed by" "$logs"/mutant-*.log | wc -l)
    bugs=$(($(ls "$here/mutants" | wc -l) - 1))
    echo "mutants: $killed of $bugs killed"
    [ ! -s "$logs/mutants.failed" ] && [ "$killed" = "$bugs" ] && grep -aq "no bug: passes" "$logs/mutant-0.log"
}

fuzz() {
    (cd "$here/tests" && KV8_CASES=${1:-64000} CARGO_MANIFEST_DIR="$here/tests" "$it" conformance::cuda)
}

case $only in
fuzz) fuzz "$@"; exit ;;
sanitize) sanitize; exit ;;
mutants) mutants; exit ;;
evidence)
    code=0
    "$here/run.sh" attn-kernels-gpu || code=1
    for test in attn-backend-builtin attn-backend-cuda_session; do "$here/run.sh" $test || code=1; done
    "$here/run.sh" tests-it gpu:: || code=1
    fuzz || code=1
    sanitize || code=1
    mutants || code=1
    echo "evidence: $([ $code = 0 ] && echo complete || echo FAILED)"
    exit $code
    ;;
esac
arguments="$*"
ran=0
failed=""

test_program() {
    if [ "$only" = --list ]; then
        echo "$1"
        return
    fi
    [ -n "$only" ] && [ "$only" != "$1" ] && return
    echo "== $1"
    ran=$((ran + 1))
    # Tests find their fixtures as under cargo: in the folder of their package.
    # shellcheck disable=SC2086
    if ! (cd "$here/$2" && CARGO_MANIFEST_DIR="$here/$2" $KV8_RUNNER "$here/bin/tests/$1" $arguments); then
        failed="$failed $1"
    fi
}

"#;

const SCRIPT_TAIL: &str = r#"
[ "$only" = --list ] && exit 0
if [ "$ran" = 0 ]; then
    echo "no test program named $only; ./run.sh --list names them"
    exit 2
fi
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all $ran test programs passed"
"#;
