//! How numbers are coded: head count and size, group lengths, scale type.

use crate::{Element, Error, FloatType, ScaleType, Side};

/// The group lengths that every backend knows; the whole head is the other choice.
pub const GROUP_LENS: [u32; 5] = [8, 16, 32, 64, 128];
/// The smallest head dimension.
pub const MIN_HEAD_DIM: u32 = 16;
/// The largest head dimension.
pub const MAX_HEAD_DIM: u32 = 256;

/// The coding of a cache: valid by construction.
/// ```
/// use kv_quant::{CacheFormat, Error, ScaleType, Side};
/// let format = CacheFormat::new(8, 128, 8, 32, ScaleType::F16)?;
/// assert_eq!(format.num_groups(Side::K), 16);
/// assert_eq!(format.bytes_per_token(), 8 * (2 * 128 + (16 + 4) * 2));
/// assert_eq!(format.to_string(), "int8 h8 d128 gk8 gv32 f16");
/// let error = CacheFormat::new(8, 100, 8, 8, ScaleType::F16).unwrap_err();
/// assert_eq!(error, Error::GroupLen { side: Side::K, group_len: 8, head_dim: 100 });
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheFormat {
    num_kv_heads: u32,
    head_dim: u32,
    k_group_len: u32,
    v_group_len: u32,
    scale_type: ScaleType,
    element: Element,
}

fn check_heads(num_kv_heads: u32, head_dim: u32) -> Result<(), Error> {
    if num_kv_heads == 0 || num_kv_heads > 65535 {
        return Err(Error::NumKvHeads(num_kv_heads));
    }
    if !(MIN_HEAD_DIM..=MAX_HEAD_DIM).contains(&head_dim) {
        return Err(Error::HeadDim { head_dim });
    }
    Ok(())
}

impl CacheFormat {
    /// `head_dim` 16 to 256; each group length one of [`GROUP_LENS`] or the whole head, dividing `head_dim`.
    pub fn new(
        num_kv_heads: u32,
        head_dim: u32,
        k_group_len: u32,
        v_group_len: u32,
        scale_type: ScaleType,
    ) -> Result<Self, Error> {
        check_heads(num_kv_heads, head_dim)?;
        for (side, group_len) in [(Side::K, k_group_len), (Side::V, v_group_len)] {
            let known = GROUP_LENS.contains(&group_len) || group_len == head_dim;
            if !known || !head_dim.is_multiple_of(group_len) {
                return Err(Error::GroupLen { side, group_len, head_dim });
            }
        }
        Ok(Self { num_kv_heads, head_dim, k_group_len, v_group_len, scale_type, element: Element::Int8 })
    }

    /// Floats without scales, for comparison: the same layouts, pools and sessions, but no codes. The planes of codes
    /// hold the floats, those of scales are empty.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn unquantized(num_kv_heads: u32, head_dim: u32, float_type: FloatType) -> Result<Self, Error> {
        check_heads(num_kv_heads, head_dim)?;
        Ok(Self {
            num_kv_heads,
            head_dim,
            k_group_len: head_dim,
            v_group_len: head_dim,
            scale_type: ScaleType::default(),
            element: Element::Float(float_type),
        })
    }

    /// What an element is.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Heads of K and of V.
    pub fn num_kv_heads(&self) -> u32 {
        self.num_kv_heads
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> u32 {
        self.head_dim
    }

    /// Channels that share a scale; the whole head of an unquantized cache.
    pub fn group_len(&self, side: Side) -> u32 {
        match side {
            Side::K => self.k_group_len,
            Side::V => self.v_group_len,
        }
    }

    /// Scales of one token-head; none in an unquantized cache.
    pub fn num_groups(&self, side: Side) -> u32 {
        match self.element {
            Element::Int8 => self.head_dim / self.group_len(side),
            Element::Float(_) => 0,
        }
    }

    /// Storage type of the scales; means nothing in an unquantized cache.
    pub fn scale_type(&self) -> ScaleType {
        self.scale_type
    }

    /// Elements of one token's K, or of its V: `num_kv_heads * head_dim`.
    pub fn row_elements(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }

    /// Elements and scales of one token over all heads, K and V, in bytes, without padding.
    pub fn bytes_per_token(&self) -> u64 {
        let scales = u64::from(self.num_groups(Side::K)) + u64::from(self.num_groups(Side::V));
        let head = 2 * u64::from(self.head_dim) * self.element.bytes() as u64
            + scales * self.scale_type.bytes() as u64;
        head * u64::from(self.num_kv_heads)
    }
}

impl std::fmt::Display for CacheFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} h{} d{}", self.element, self.num_kv_heads, self.head_dim)?;
        if self.element != Element::Int8 {
            return Ok(());
        }
        if self.k_group_len == self.v_group_len {
            write!(f, " g{} {}", self.k_group_len, self.scale_type)
        } else {
            write!(f, " gk{} gv{} {}", self.k_group_len, self.v_group_len, self.scale_type)
        }
    }
}
