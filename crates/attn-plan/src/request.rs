//! The part of a decode step that changes: lengths and page table.

use crate::{DecodeSpec, Error};
use kv_quant::CacheLayout;

/// Where each request's row of the page table starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRows<'a> {
    /// A padded table: request `r`'s row starts at `r * stride`.
    Stride(u64),
    /// Any row starts, one a request: ragged tables, or rows picked by a request index.
    Starts(&'a [u64]),
}

/// Page indices of all requests. With pages of one slot this is LightLLM's token index.
/// ```
/// use attn_plan::{PageRows, PageTable};
/// let table = PageTable { pages: &[4, 9, 2], rows: PageRows::Starts(&[0, 2]) };
/// assert_eq!(table.row(0, 2), Some(&[4, 9][..]));
/// assert_eq!(table.slot(0, 17, 16), Some(9 * 16 + 1));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTable<'a> {
    /// Page indices; entries past a request's last page are never read.
    pub pages: &'a [i32],
    /// Where each request's row starts.
    pub rows: PageRows<'a>,
}

impl<'a> PageTable<'a> {
    /// A padded table `[batch, stride]`.
    pub fn padded(pages: &'a [i32], stride: u64) -> Self {
        Self { pages, rows: PageRows::Stride(stride) }
    }

    /// Where a request's row starts; `None` past the end of `PageRows::Starts`.
    pub fn row_start(&self, request: usize) -> Option<u64> {
        match self.rows {
            PageRows::Stride(stride) => (request as u64).checked_mul(stride),
            PageRows::Starts(starts) => starts.get(request).copied(),
        }
    }

    /// The first `num_pages` entries of a request's row, or `None` if the table ends before.
    pub fn row(&self, request: usize, num_pages: usize) -> Option<&'a [i32]> {
        let start = usize::try_from(self.row_start(request)?).ok()?;
        self.pages.get(start..start.checked_add(num_pages)?)
    }

    /// The slot of token `token` of a request, or `None` if the table does not hold it.
    pub fn slot(&self, request: usize, token: u32, page_len: u32) -> Option<u64> {
        let start = self.row_start(request)?;
        let entry = start.checked_add(u64::from(token / page_len))?;
        let page = *self.pages.get(usize::try_from(entry).ok()?)?;
        Some(u64::try_from(page).ok()? * u64::from(page_len) + u64::from(token % page_len))
    }
}

/// One decode step: what is asked of every backend.
/// ```
/// use attn_plan::{DecodeRequest, DecodeSpec, Error, PageTable};
/// use kv_quant::{CacheFormat, CacheLayout, ScaleType};
/// let layout = CacheLayout::native(CacheFormat::new(2, 64, 8, 8, ScaleType::F16)?, 8, 16)?;
/// let spec = DecodeSpec::new(6, 2, 64);
/// let pages = [3, 1, 7, -1];                       // two rows of two entries
/// let page_table = PageTable::padded(&pages, 2);
/// let request = DecodeRequest { spec: &spec, kv_lens: &[20, 16], page_table };
/// assert_eq!(request.check(&layout), Ok(()));      // the -1 is past the second request's end
/// let request = DecodeRequest { kv_lens: &[20, 17], ..request };
/// let error = Error::PageOutOfRange { request: 1, position: 1, page: -1, num_pages: 8 };
/// assert_eq!(request.check(&layout), Err(error));
/// # Ok::<(), kv_quant::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DecodeRequest<'a> {
    /// Shapes, scale, mask, types.
    pub spec: &'a DecodeSpec,
    /// Tokens of each sequence, the new ones counted; 0 is allowed.
    pub kv_lens: &'a [u32],
    /// Where the tokens lie.
    pub page_table: PageTable<'a>,
}

impl DecodeRequest<'_> {
    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.kv_lens.len()
    }

    /// Checks the whole request against a cache: shapes, lengths, rows and every page index that will be read.
    ///
    /// # Errors
    /// The first thing found wrong; see [`Error`].
    pub fn check(&self, layout: &CacheLayout) -> Result<(), Error> {
        self.spec.check()?;
        let format = layout.format();
        for (what, spec, cache) in [
            ("num_kv_heads", self.spec.num_kv_heads, format.num_kv_heads()),
            ("head_dim", self.spec.head_dim, format.head_dim()),
        ] {
            if spec != cache {
                return Err(Error::CacheMismatch { what, spec, cache });
            }
        }
        let (batch, max) = (self.batch(), crate::MAX_ITEMS as usize);
        if batch > max {
            return Err(Error::Batch { got: batch, max });
        }
        if let PageRows::Starts(starts) = self.page_table.rows
            && starts.len() != batch
        {
            return Err(Error::PageRowCount { got: starts.len(), want: batch });
        }
        for (request, &kv_len) in self.kv_lens.iter().enumerate() {
            self.check_row(layout, request, kv_len)?;
        }
        Ok(())
    }

    fn check_row(&self, layout: &CacheLayout, request: usize, kv_len: u32) -> Result<(), Error> {
        let need = u64::from(kv_len.div_ceil(layout.page_len()));
        if need == 0 {
            return Ok(());
        }
        if let PageRows::Stride(stride) = self.page_table.rows
            && need > stride
        {
            return Err(Error::PageRowStride { request, kv_len, need, stride });
        }
        let have = self.page_table.pages.len();
        let start = self.page_table.row_start(request).unwrap_or(u64::MAX);
        let row = self.page_table.row(request, need as usize).ok_or(Error::PageTableShort {
            request,
            kv_len,
            need,
            start,
            have,
        })?;
        // Pages wholly before every query's window are not read; an engine may have given them up.
        let first = (self.spec.visible_any(kv_len).start / layout.page_len()) as usize;
        let num_pages = layout.num_pages();
        let is_bad = |page: i32| page < 0 || page as u64 >= num_pages;
        match row.iter().enumerate().skip(first).find(|(_, page)| is_bad(**page)).map(|(i, _)| i) {
            Some(position) => {
                let page = row.get(position).copied().unwrap_or(-1);
                Err(Error::PageOutOfRange { request, position: position as u64, page, num_pages })
            }
            None => Ok(()),
        }
    }
}
