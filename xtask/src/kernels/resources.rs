//! What ptxas tells of each kernel with `-v`: registers, spills, stack, shared memory.

use anyhow::{Context, Result, ensure};

use super::compile::Job;

/// One kernel for one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub name: String,
    pub arch: String,
    pub registers: u32,
    pub spill_store_bytes: u32,
    pub spill_load_bytes: u32,
    pub stack_bytes: u32,
    /// Shared memory that the code itself declares; what a launch adds is in the table.
    pub static_shared_bytes: u32,
}

/// Reads lines such as
///
/// ```text
/// ptxas info    : Compiling entry function 'kv8_append' for 'sm_90a'
/// ptxas info    : Function properties for kv8_append
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem
/// ```
pub fn parse(log: &str) -> Result<Vec<Resources>> {
    let mut all: Vec<Resources> = Vec::new();
    let mut properties_of = "";
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut quoted = rest.split('\'');
            let name = quoted.next().unwrap_or_default().to_owned();
            let arch = quoted.nth(1).unwrap_or_default().to_owned();
            all.push(Resources { name, arch, ..Resources::default() });
            continue;
        }
        if let Some(name) = line.split("Function properties for ").nth(1) {
            properties_of = name.trim();
            continue;
        }
        // A function that was not inlined has properties of its own; its spills count for the kernel that calls it.
        let Some(current) = all.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            let [stack, stores, loads] =
                ["stack frame", "spill stores", "spill loads"].map(|what| bytes(line, what));
            current.spill_store_bytes += stores;
            current.spill_load_bytes += loads;
            if properties_of == current.name {
                current.stack_bytes = stack;
            }
        } else if let Some(used) = line.split("Used ").nth(1).filter(|used| used.contains(" registers")) {
            let registers = used.split(' ').next().unwrap_or_default();
            current.registers = registers.parse().with_context(|| format!("ptxas says: {line}"))?;
            current.static_shared_bytes = bytes(line, "smem");
        }
    }
    ensure!(!all.is_empty(), "ptxas told of no kernel:\n{log}");
    Ok(all)
}

/// The number before " bytes `what`"; 0 if the line has none.
fn bytes(line: &str, what: &str) -> u32 {
    let before = line.split(&format!(" bytes {what}")).next().filter(|before| before.len() < line.len());
    before.and_then(|before| before.rsplit([' ', ',']).next()?.parse().ok()).unwrap_or(0)
}

/// The kernels of a unit; every architecture must have the same.
pub fn symbols(jobs: &[Job]) -> Result<Vec<String>> {
    let mut symbols: Option<Vec<String>> = None;
    for job in jobs {
        let mut names: Vec<String> = job.resources()?.into_iter().map(|resources| resources.name).collect();
        names.sort();
        let expected = symbols.get_or_insert_with(|| names.clone());
        ensure!(
            *expected == names,
            "{} has other kernels: {names:?} instead of {expected:?}",
            job.target.arch()
        );
    }
    Ok(symbols.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_log_is_read_kernel_by_kernel() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'one' for 'sm_90a'\n\
            ptxas info    : Function properties for one\n    \
            16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Function properties for helper\n    \
            0 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem\n\
            ptxas info    : Compile time = 16.425 ms\n\
            ptxas info    : Compiling entry function 'two' for 'sm_90a'\n\
            ptxas info    : Function properties for two\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 10 registers, used 1 barriers\n";
        let all = parse(log).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].name.as_str(), all[0].arch.as_str()), ("one", "sm_90a"));
        assert_eq!((all[0].registers, all[0].static_shared_bytes, all[0].stack_bytes), (40, 64, 16));
        assert_eq!((all[0].spill_store_bytes, all[0].spill_load_bytes), (5, 10));
        assert_eq!((all[1].registers, all[1].static_shared_bytes, all[1].spill_load_bytes), (10, 0, 0));
        assert!(parse("").is_err());
    }
}
