//! The look-up: which choice for a step, and why.

use crate::candidates::ITEM_OVERHEAD;
use crate::{Candidates, Choice, CostModel, Point, PolicyClass, RunKey, Shape, StaticKey};
use std::fmt;
use std::sync::Arc;

/// A measured neighbour farther away than this many octaves says nothing: the cost model is asked instead.
pub const MAX_DISTANCE: f32 = 1.5;

/// Answers for one key, step by step.
#[derive(Clone, Debug)]
pub struct Chooser {
    pub(crate) key: StaticKey,
    pub(crate) shape: Shape,
    pub(crate) num_sms: u32,
    pub(crate) read_gb_per_s: f64,
    pub(crate) model: CostModel,
    pub(crate) points: Arc<[(RunKey, Point)]>,
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
    /// The cost model expects it to be fastest.
    Modelled {
        /// Microseconds that the model expects.
        expected_us: f64,
        /// How far the nearest measured step is, if there is one for this key.
        nearest: Option<f32>,
    },
}

impl Chooser {
    /// The choice for a step. A pure function of the key, the profiles and the step; does not allocate.
    pub fn choose(&self, run: &RunKey) -> Decision {
        let mut nearest: Option<(f32, &RunKey, &Point)> = None;
        for (measured, point) in self.points.iter() {
            let distance = run.distance(measured);
            let is_usable = run.num_kv_heads.is_multiple_of(point.choice.heads_per_block)
                && point.choice.heads_per_block <= self.shape.max_heads_per_block
                && point.choice.num_shares <= self.shape.most_shares;
            if is_usable && nearest.is_none_or(|(best, ..)| distance < best) {
                nearest = Some((distance, measured, point));
            }
        }
        match nearest {
            Some((distance, measured, point)) if distance <= MAX_DISTANCE => Decision {
                choice: self.hold(point.choice),
                why: Why::Measured { nearest: *measured, distance },
            },
            _ => self.modelled(run, nearest.map(|(distance, ..)| distance)),
        }
    }

    fn modelled(&self, run: &RunKey, nearest: Option<f32>) -> Decision {
        let Self { key, shape, num_sms, read_gb_per_s, model, .. } = self;
        let mut best: Option<(f64, Choice)> = None;
        for choice in Candidates::few(*num_sms, key, shape, run) {
            let us = model.predict_on(*num_sms, *read_gb_per_s, key, shape, run, &choice);
            if best.is_none_or(|(least, _)| us < least) {
                best = Some((us, choice));
            }
        }
        let full = Choice {
            num_blocks: (num_sms * shape.blocks_per_sm).max(1),
            heads_per_block: 1,
            min_split_tiles: 1,
            item_overhead: ITEM_OVERHEAD,
            num_shares: 0,
        };
        let (expected_us, choice) = best.unwrap_or((0.0, full));
        Decision { choice: self.hold(choice), why: Why::Modelled { expected_us, nearest } }
    }

    /// Takes out of a choice what the policy forbids: the shape of a block changes bits, and the choice looks at the batch.
    fn hold(&self, choice: Choice) -> Choice {
        match self.key.policy {
            PolicyClass::Throughput => choice,
            PolicyClass::BatchInvariant => Choice { heads_per_block: 1, num_shares: 0, ..choice },
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
