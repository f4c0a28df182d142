//! What applies to one GPU: the profiles that were found for it.

use crate::store::{self, SHIPPED, file_name};
use crate::{Cause, Chooser, CostModel, Level, Machine, Point, Profile, RunKey, Shape, StaticKey, Warning};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A profile's text and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub file: PathBuf,
    /// Its text.
    pub text: String,
}

/// Chooses schedules for one GPU.
/// ```
/// use attn_tune::{Level, Machine, Tuner};
/// let machine = Machine {
///     device: "a GPU that nobody measured".to_owned(),
///     arch: "sm_80".to_owned(),
///     build: "0123456789ab".to_owned(),
///     num_sms: 108,
///     l2_bytes: 40 << 20,
///     read_gb_per_s: 1555.0,
/// };
/// let tuner = Tuner::new(machine, Level::Profiles, None);
/// assert!(tuner.warnings().is_empty() && tuner.keys().next().is_none()); // the cost model will decide
/// ```
#[derive(Clone, Debug)]
pub struct Tuner {
    machine: Machine,
    level: Level,
    model: CostModel,
    tables: BTreeMap<StaticKey, BTreeMap<RunKey, Point>>,
    /// Of `tables`, what was measured by this process.
    learned: BTreeMap<StaticKey, BTreeMap<RunKey, Point>>,
    warnings: Vec<Warning>,
}

impl Tuner {
    /// Shipped profiles, and over them those in `user_dir`. Nothing here fails: what cannot be used is a [`Warning`].
    pub fn new(machine: Machine, level: Level, user_dir: Option<&Path>) -> Self {
        let name = file_name(&machine.device);
        let shipped = SHIPPED.iter().filter(|(file, _)| *file == name);
        let mut sources: Vec<_> = shipped
            .map(|(file, text)| Ok(Source { file: PathBuf::from(file), text: (*text).to_owned() }))
            .collect();
        if let Some(file) = user_dir.map(|dir| dir.join(&name)) {
            match std::fs::read_to_string(&file) {
                Ok(text) => sources.push(Ok(Source { file, text })),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => sources
                    .push(Err(Warning { file, cause: Cause::Unreadable { reason: error.to_string() } })),
            }
        }
        let mut tuner = Self::from_sources(machine, level, sources.iter().flatten());
        tuner.warnings.extend(sources.into_iter().filter_map(Result::err));
        tuner
    }

    /// As [`Self::new`] with the user's folder of this platform ([`store::user_dir`]).
    pub fn for_user(machine: Machine, level: Level) -> Self {
        Self::new(machine, level, store::user_dir().as_deref())
    }

    /// From texts; a later one overrides an earlier one, point by point.
    pub fn from_sources<'a>(
        machine: Machine,
        level: Level,
        sources: impl IntoIterator<Item = &'a Source>,
    ) -> Self {
        let mut tuner = Self {
            machine,
            level,
            model: CostModel::default(),
            tables: BTreeMap::new(),
            learned: BTreeMap::new(),
            warnings: Vec::new(),
        };
        if level == Level::Off {
            return tuner;
        }
        for source in sources {
            let mut warn = |cause| tuner.warnings.push(Warning { file: source.file.clone(), cause });
            let profile = match Profile::parse(&source.text) {
                Ok((profile, left_out)) => {
                    left_out.into_iter().for_each(&mut warn);
                    profile
                }
                Err(cause) => {
                    warn(cause);
                    continue;
                }
            };
            if let Some(cause) = tuner.mismatch(&profile) {
                tuner.warnings.push(Warning { file: source.file.clone(), cause });
                continue;
            }
            tuner.machine.read_gb_per_s = profile.read_gb_per_s;
            for (key, table) in profile.tables {
                tuner.tables.entry(key).or_default().extend(table);
            }
        }
        tuner
    }

    fn mismatch(&self, profile: &Profile) -> Option<Cause> {
        let Machine { device, arch, build, .. } = &self.machine;
        let name = |device: &str, arch: &str| format!("{device} ({arch})");
        if (&profile.device, &profile.arch) != (device, arch) {
            let found = name(&profile.device, &profile.arch);
            return Some(Cause::Foreign { found, wanted: name(device, arch) });
        }
        (profile.build != *build)
            .then(|| Cause::Stale { found: profile.build.clone(), wanted: build.clone() })
    }

    /// The look-up for one key.
    pub fn chooser(&self, key: StaticKey, shape: Shape) -> Chooser {
        let points = self.tables.get(&key).into_iter().flatten().map(|(run, point)| (*run, *point)).collect();
        Chooser::new(key, shape, &self.machine, self.model, points)
    }

    /// Takes in a point that was measured here, for choosers made from now on.
    pub fn learn(&mut self, key: StaticKey, run: RunKey, point: Point) {
        self.tables.entry(key).or_default().insert(run, point);
        self.learned.entry(key).or_default().insert(run, point);
    }

    /// Writes what was learned into the user's profile in `dir`, beside what stands there of this GPU and build, and says
    /// where; `None` if nothing was learned.
    ///
    /// # Errors
    /// Those of the file system. A file there that is damaged or of other kernels is replaced.
    pub fn save(&self, dir: &Path, driver: &str, date: &str) -> std::io::Result<Option<PathBuf>> {
        if self.learned.is_empty() {
            return Ok(None);
        }
        let Machine { device, arch, build, read_gb_per_s, .. } = self.machine.clone();
        let old = std::fs::read_to_string(dir.join(file_name(&device))).ok();
        let old = old.and_then(|text| Profile::parse(&text).ok()).map(|(profile, _)| profile);
        let mut profile = old.filter(|profile| self.mismatch(profile).is_none()).unwrap_or_default();
        for (key, table) in &self.learned {
            profile.tables.entry(*key).or_default().extend(table);
        }
        let (driver, date) = (driver.to_owned(), date.to_owned());
        let Profile { coverage, tables, .. } = profile;
        Profile { device, arch, build, driver, date, read_gb_per_s, coverage, tables }.save(dir).map(Some)
    }

    /// Keys that were measured.
    pub fn keys(&self) -> impl Iterator<Item = &StaticKey> {
        self.tables.keys()
    }

    /// What could not be used, and why.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// How much tuning was asked for.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The GPU.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The cost model.
    pub fn model(&self) -> &CostModel {
        &self.model
    }
}
