//! The tokenizer, built from the vocabulary and merges inside the GGUF file. (candle would build one too, but it knows
//! neither the `smollm` split nor that this model wants no space before the text.)

use crate::weights::Weights;
use anyhow::{Context, Result, anyhow, ensure};
use candle_core::quantized::gguf_file::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::{AddedToken, Tokenizer};

/// Text to tokens and back.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    end: Vec<u32>,
}

impl Vocabulary {
    /// Builds the byte-level BPE that the file describes (`gpt2` model with the `smollm` split: single digits).
    pub fn load(weights: &Weights) -> Result<Self> {
        let (model, pre) = (weights.text("tokenizer.ggml.model")?, weights.text("tokenizer.ggml.pre")?);
        ensure!(model == "gpt2" && pre == "smollm", "tokenizer {model}/{pre}; known: gpt2/smollm");
        let tokens = weights.texts("tokenizer.ggml.tokens")?;
        let vocab: ahash::AHashMap<_, _> = tokens.iter().cloned().zip(0u32..).collect();
        let merges = weights
            .texts("tokenizer.ggml.merges")?
            .iter()
            .map(|merge| {
                let (left, right) = merge.split_once(' ').context("a merge without a space")?;
                Ok((left.to_owned(), right.to_owned()))
            })
            .collect::<Result<Vec<_>>>()?;
        let bpe =
            BPE::builder().vocab_and_merges(vocab, merges).build().map_err(|e| anyhow!("tokenizer: {e}"))?;
        let mut tokenizer = Tokenizer::new(bpe);
        let split = Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]);
        tokenizer.with_pre_tokenizer(Some(split));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        let special: Vec<_> = tokens
            .iter()
            .zip(weights.list("tokenizer.ggml.token_type")?)
            .filter(|(_, kind)| matches!(kind, Value::I32(3) | Value::U32(3)))
            .map(|(token, _)| AddedToken::from(token.clone(), true))
            .collect();
        tokenizer.add_special_tokens(special).map_err(|e| anyhow!("tokenizer: {e}"))?;
        let end = ["<|endoftext|>", "<|im_end|>"].iter().filter_map(|t| tokenizer.token_to_id(t)).collect();
        Ok(Self { tokenizer, end })
    }

    /// Tokens of `text`; special tokens written out in it are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| anyhow!("tokenizer: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`; special tokens vanish, incomplete characters show as U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(|e| anyhow!("tokenizer: {e}"))
    }

    /// Whether a token ends the text or the turn.
    pub fn is_end(&self, token: u32) -> bool {
        self.end.contains(&token)
    }
}
