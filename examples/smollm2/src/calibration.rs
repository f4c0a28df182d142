//! What a short sample of text says of K and of the queries that read it.

use crate::accuracy::record;
use crate::cache::CacheKind;
use crate::model::{Config, Model};
use crate::transform::Shape;
use crate::vocabulary::Vocabulary;
use anyhow::Result;
use kv_quant::{KeyOffset, QueryMoments, RotaryPairs, ShapedRounding, Side};
use rayon::prelude::*;

/// Constants of every layer, from a sample that is none of the measured texts.
pub struct Calibration {
    offsets: Vec<KeyOffset>,
    /// Of the queries as recorded.
    moments: Vec<QueryMoments>,
    /// Of the projections that read V.
    of_projections: Vec<QueryMoments>,
}

/// GGUF files of llama models have their rows permuted for that.
const PAIRS: RotaryPairs = RotaryPairs::Neighbours;

/// The sample: prose written for this purpose.
const TEXT: &str = "The harbour lay quiet under a pale sky. Two fishermen mended their nets and spoke \
    of the weather, the price of diesel, and a letter that one of them had from his daughter, who studies chemistry in \
    the capital. \"She measures how salts dissolve,\" he said, \"at 20, 40 and 60 degrees.\" Later the ferry came in, \
    forty minutes late: engineers had replaced a pump in the engine room. Here is what the log says:\n\n\
    1. 06:15 pump 3 stopped; pressure fell from 4.2 to 1.1 bar.\n2. 06:20 valve closed by hand.\n\
    3. 07:05 new pump started. fn main() { println!(\"all well\"); }\n\n\
    Nobody on the pier knew any of this, and the children waved as they always do.";

impl Calibration {
    /// Runs the sample through the model over an f32 cache.
    pub fn measure(model: &Model, vocabulary: &Vocabulary) -> Result<Self> {
        let config = model.config();
        let width = config.num_kv_heads * config.head_dim;
        let recorded = record(model, &vocabulary.encode(TEXT)?)?;
        let offsets = recorded.iter().map(|r| KeyOffset::from_sample(&r.k, width));
        let (num_q_heads, num_kv_heads, head_dim) =
            (config.num_q_heads as u32, config.num_kv_heads as u32, config.head_dim as u32);
        let moments = recorded
            .par_iter()
            .map(|r| Ok(QueryMoments::from_sample(&r.q, num_q_heads, num_kv_heads, head_dim)?));
        let of_projections = (0..config.num_layers).into_par_iter().map(|layer| {
            Ok(QueryMoments::from_sample(&model.attn_out(layer)?, num_q_heads, num_kv_heads, head_dim)?)
        });
        Ok(Self {
            offsets: offsets.collect::<Result<_, _>>()?,
            moments: moments.collect::<Result<_>>()?,
            of_projections: of_projections.collect::<Result<_>>()?,
        })
    }

    /// The mean of K, one a layer.
    pub fn offsets(&self) -> Vec<KeyOffset> {
        self.offsets.clone()
    }

    /// What the mean of K is over `num_positions` positions.
    pub fn offsets_over(&self, config: &Config, num_positions: u32) -> Result<Vec<KeyOffset>> {
        let frequencies = config.rotary_frequencies();
        let over = |offset: &KeyOffset| offset.over_positions(&frequencies, PAIRS, num_positions);
        Ok(self.offsets.iter().map(over).collect::<Result<_, _>>()?)
    }

    /// Rounding of rotated K, and of V, for an INT8 cache of `num_positions` positions in which `f16_layers` are left alone.
    pub fn shape(
        &self,
        config: &Config,
        kind: CacheKind,
        f16_layers: &[usize],
        num_positions: u32,
    ) -> Result<Shape> {
        let (format, frequencies) = (kind.format(config)?, config.rotary_frequencies());
        let over = |moments: &QueryMoments| -> Result<QueryMoments> {
            Ok(moments.over_positions(&frequencies, PAIRS, num_positions)?.rotated()?)
        };
        let moments: Vec<QueryMoments> = self.moments.par_iter().map(over).collect::<Result<_>>()?;
        let of_side = |side: Side, moments: &[QueryMoments]| {
            let of_layer = |(layer, moments): (usize, &QueryMoments)| match f16_layers.contains(&layer) {
                true => Ok(None),
                false => Ok(Some(ShapedRounding::new(side, moments, &format)?)),
            };
            moments.par_iter().enumerate().map(of_layer).collect::<Result<_>>()
        };
        let (k, v) = (of_side(Side::K, &moments)?, of_side(Side::V, &self.of_projections)?);
        Ok(Shape { k, v, row_elements: format.row_elements() })
    }
}
