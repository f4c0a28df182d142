//! The look-up: which choice for a step, and why.

use crate::candidates::ITEM_OVERHEAD;
use crate::{Candidates, Choice, CostModel, Machine, Point, PolicyClass, RunKey, Shape, StaticKey};
use std::fmt;
use std::sync::Arc;

/// A measured neighbour farther away than this many octaves says nothing: the cost model is asked instead.
pub const MAX_DISTANCE: f32 = 1.5;

/// Within this many octaves a measured step is as good as the same step.
pub const SAME_STEP: f32 = 0.5;

/// Answers for one key, step by step.
#[derive(Clone, Debug)]
pub struct Chooser {
    key: StaticKey,
    shape: Shape,
    num_sms: u32,
    read_gb_per_s: f64,
    model: CostModel,
    /// By the size of the work, the first of their coordinates.
    points: Arc<[(RunKey, Point)]>,
    /// Of each point: logarithms are taken once, not at each look-up.
    coordinates: Arc<[[f32; 3]]>,
}

/// A choice and the reason for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// What to do.
    pub choice: Choice,
    /// Why.
    pub why: Why,
}

/// Why a choice was made.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Why {
    /// It was fastest for a measured step nearby.
    Measured {
        /// That step.
        nearest: RunKey,
        /// How far it is, in octaves.
        distance: f32,
    },
    /// The cost model expects it to be fastest, and at a measured step nearby nothing was faster than what it had chosen
    /// there.
    Agreed {
        /// Microseconds that the model expects.
        expected_us: f64,
        /// That step.
        nearest: RunKey,
        /// How far it is, in octaves.
        distance: f32,
    },
    /// The cost model expects it to be fastest, and of what was measured fastest for a step nearby that it loses more here than
    /// it had gained there.
    Outweighed {
        /// Microseconds that the model expects.
        expected_us: f64,
        /// That step.
        nearest: RunKey,
        /// How far it is, in octaves.
        distance: f32,
    },
    /// The cost model expects it to be fastest.
    Modelled {
        /// Microseconds that the model expects.
        expected_us: f64,
        /// How far the nearest measured step is, if there is one for this key.
        nearest: Option<f32>,
    },
}

impl Why {
    /// Whether a measured step nearby had a say.
    pub fn is_measured(&self) -> bool {
        !matches!(self, Why::Modelled { .. })
    }
}

impl Chooser {
    pub(crate) fn new(
        key: StaticKey,
        shape: Shape,
        machine: &Machine,
        model: CostModel,
        mut points: Vec<(RunKey, Point)>,
    ) -> Self {
        points.sort_by(|(a, _), (b, _)| a.coordinates()[0].total_cmp(&b.coordinates()[0]).then(a.cmp(b)));
        let coordinates = points.iter().map(|(run, _)| run.coordinates()).collect();
        let points = points.into();
        let Machine { num_sms, read_gb_per_s, .. } = *machine;
        Self { key, shape, num_sms, read_gb_per_s, model, points, coordinates }
    }

    /// The choice for a step. A pure function of the key, the profiles and the step; does not allocate.
    pub fn choose(&self, run: &RunKey) -> Decision {
        let nearest = self.nearest(run);
        let modelled = |why: &dyn Fn(f64) -> Why| {
            let (choice, expected_us) = self.modelled(run);
            Decision { choice, why: why(expected_us) }
        };
        let Some((distance, measured, point)) = nearest.filter(|(distance, ..)| *distance <= MAX_DISTANCE)
        else {
            let nearest = nearest.map(|(distance, ..)| distance);
            return modelled(&|expected_us| Why::Modelled { expected_us, nearest });
        };
        // What the model had chosen there and nothing had beaten says that the model is right hereabouts, not that its
        // numbers for another step are right for this one.
        let is_the_models = point.timing.us >= point.timing.model_us;
        if is_the_models && distance > SAME_STEP {
            return modelled(&|expected_us| Why::Agreed { expected_us, nearest: *measured, distance });
        }
        if distance > SAME_STEP {
            let (choice, expected_us) = self.modelled(run);
            let gained = point.timing.model_us / point.timing.us;
            if self.predict(run, &point.choice) > gained * expected_us {
                return Decision {
                    choice,
                    why: Why::Outweighed { expected_us, nearest: *measured, distance },
                };
            }
        }
        Decision { choice: self.hold(point.choice), why: Why::Measured { nearest: *measured, distance } }
    }

    fn predict(&self, run: &RunKey, choice: &Choice) -> f64 {
        let Self { key, shape, num_sms, read_gb_per_s, model, .. } = self;
        model.expect(*num_sms, *read_gb_per_s, key, shape, run).us(choice)
    }

    /// The nearest point whose choice the kernel can run, and how far it is.
    fn nearest(&self, run: &RunKey) -> Option<(f32, &RunKey, &Point)> {
        let at = run.coordinates();
        let middle = self.coordinates.partition_point(|coordinates| coordinates[0] < at[0]);
        let mut nearest: Option<(f32, &RunKey, &Point)> = None;
        // Whether to look further on this side: no point is nearer than its size is.
        let mut visit = |index: usize| {
            let (Some(coordinates), Some((measured, point))) =
                (self.coordinates.get(index), self.points.get(index))
            else {
                return false;
            };
            if nearest.is_some_and(|(best, ..)| (coordinates[0] - at[0]).abs() >= best) {
                return false;
            }
            let distance = RunKey::between(&at, coordinates);
            let is_usable = run.num_kv_heads.is_multiple_of(point.choice.heads_per_block)
                && point.choice.heads_per_block <= self.shape.max_heads_per_block
                && point.choice.num_shares <= self.shape.most_shares;
            if is_usable && nearest.is_none_or(|(best, ..)| distance < best) {
                nearest = Some((distance, measured, point));
            }
            true
        };
        let (mut below, mut above) = (middle, middle);
        let (mut is_open_below, mut is_open_above) = (true, true);
        while is_open_below || is_open_above {
            if is_open_above {
                is_open_above = visit(above);
                above += 1;
            }
            if is_open_below {
                is_open_below = below > 0 && visit(below - 1);
                below = below.saturating_sub(1);
            }
        }
        nearest
    }

    /// The model's choice and what it expects of it, microseconds.
    fn modelled(&self, run: &RunKey) -> (Choice, f64) {
        let Self { key, shape, num_sms, read_gb_per_s, model, .. } = self;
        let expect = model.expect(*num_sms, *read_gb_per_s, key, shape, run);
        let mut best: Option<(f64, Choice)> = None;
        for choice in Candidates::few(*num_sms, key, shape, run) {
            let us = expect.us(&choice);
            if best.is_none_or(|(least, _)| us < least) {
                best = Some((us, choice));
            }
        }
        let num_blocks = (num_sms * shape.blocks_per_sm).max(1);
        let full = Choice { item_overhead: ITEM_OVERHEAD, ..Choice::dealt(num_blocks) };
        let (expected_us, choice) = best.unwrap_or((0.0, full));
        (self.hold(choice), expected_us)
    }

    /// Takes out of a choice what the policy forbids: the shape of a block changes bits, and the choice looks at the batch.
    fn hold(&self, choice: Choice) -> Choice {
        match self.key.policy {
            PolicyClass::Throughput => choice,
            // Who does which item changes none.
            PolicyClass::BatchInvariant { .. } => Choice { heads_per_block: 1, num_shares: 0, ..choice },
        }
    }

    /// The key that is answered for.
    pub fn key(&self) -> &StaticKey {
        &self.key
    }

    /// The kernel's shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Measured steps of this key.
    pub fn points(&self) -> &[(RunKey, Point)] {
        &self.points
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.choice, self.why)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Measured { nearest, distance } => {
                write!(f, "measured at {nearest}, {distance:.2} octaves away")
            }
            Why::Agreed { expected_us, nearest, distance } => write!(
                f,
                "the cost model expects {expected_us:.1} us; nothing was faster than its choice at {nearest}, \
                 {distance:.2} octaves away"
            ),
            Why::Outweighed { expected_us, nearest, distance } => write!(
                f,
                "the cost model expects {expected_us:.1} us, and of the choice measured at {nearest}, {distance:.2} octaves \
                 away, more than it gained there"
            ),
            Why::Modelled { expected_us, nearest: None } => {
                write!(f, "the cost model expects {expected_us:.1} us; nothing was measured for this key")
            }
            Why::Modelled { expected_us, nearest: Some(distance) } => write!(
                f,
                "the cost model expects {expected_us:.1} us; the nearest measured step is {distance:.1} octaves away"
            ),
        }
    }
}
