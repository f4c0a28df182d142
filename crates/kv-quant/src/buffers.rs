//! The memory of a cache: borrowed views, and owned host buffers.

use crate::{CacheLayout, Error, MAX_BUFFERS};

/// A cache's buffers, read-only. Buffers are plain bytes; the layout says what lies where.
/// ```
/// use kv_quant::{CacheFormat, CacheLayout, CacheView, Error, ScaleType};
/// let layout = CacheLayout::lightllm(CacheFormat::new(1, 16, 16, 16, ScaleType::F16)?, 10)?;
/// let (codes, scales) = (vec![0u8; 10 * 2 * 16], vec![0u8; 10 * 2 * 2]);
/// assert!(CacheView::new(&layout, &[&codes, &scales]).is_ok());
/// let error = CacheView::new(&layout, &[&codes, &scales[1..]]).unwrap_err();
/// assert_eq!(error, Error::BufferLen { buffer_idx: 1, got: 39, want: 40 });
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CacheView<'a> {
    buffers: [&'a [u8]; MAX_BUFFERS],
}

/// A cache's buffers, for writing.
#[derive(Debug)]
pub struct CacheViewMut<'a> {
    buffers: [&'a mut [u8]; MAX_BUFFERS],
}

fn check(layout: &CacheLayout, got: &[usize]) -> Result<(), Error> {
    let want = layout.buffer_bytes();
    if got.len() != want.len() {
        return Err(Error::BufferCount { got: got.len(), want: want.len() });
    }
    for (buffer_idx, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = got as u64;
        if got < want {
            return Err(Error::BufferLen { buffer_idx, got, want });
        }
    }
    Ok(())
}

impl<'a> CacheView<'a> {
    /// Borrows one buffer for each of [`CacheLayout::buffer_bytes`], at least that long.
    pub fn new(layout: &CacheLayout, buffers: &[&'a [u8]]) -> Result<Self, Error> {
        let lens: Vec<usize> = buffers.iter().map(|b| b.len()).collect();
        check(layout, &lens)?;
        let mut all: [&[u8]; MAX_BUFFERS] = [&[]; MAX_BUFFERS];
        all.iter_mut().zip(buffers).for_each(|(slot, buffer)| *slot = buffer);
        Ok(Self { buffers: all })
    }

    /// Whether the buffers are long enough for `layout`: a view may meet a layout that it was not made for.
    ///
    /// # Errors
    /// [`Error::BufferLen`].
    #[inline]
    pub fn check(&self, layout: &CacheLayout) -> Result<(), Error> {
        for (buffer_idx, (buffer, &want)) in self.buffers.iter().zip(layout.buffer_bytes()).enumerate() {
            let got = buffer.len() as u64;
            if got < want {
                return Err(Error::BufferLen { buffer_idx, got, want });
            }
        }
        Ok(())
    }

    /// Bytes `range` of a buffer, or an empty slice if it is not there.
    #[inline]
    pub fn bytes(&self, buffer_idx: usize, range: std::ops::Range<u64>) -> &'a [u8] {
        let range = range.start as usize..range.end as usize;
        self.buffers.get(buffer_idx).and_then(|b| b.get(range)).unwrap_or(&[])
    }

    /// A whole buffer.
    pub fn buffer(&self, buffer_idx: usize) -> &'a [u8] {
        self.buffers.get(buffer_idx).copied().unwrap_or(&[])
    }
}

impl<'a> CacheViewMut<'a> {
    /// As [`CacheView::new`].
    pub fn new(layout: &CacheLayout, buffers: Vec<&'a mut [u8]>) -> Result<Self, Error> {
        let lens: Vec<usize> = buffers.iter().map(|b| b.len()).collect();
        check(layout, &lens)?;
        let mut all: [&mut [u8]; MAX_BUFFERS] = std::array::from_fn(|_| Default::default());
        all.iter_mut().zip(buffers).for_each(|(slot, buffer)| *slot = buffer);
        Ok(Self { buffers: all })
    }

    /// The same buffers for reading.
    pub fn as_view(&self) -> CacheView<'_> {
        CacheView { buffers: std::array::from_fn(|i| self.buffers.get(i).map_or(&[][..], |b| b)) }
    }

    /// Bytes `range` of a buffer, or an empty slice if it is not there.
    #[inline]
    pub fn bytes_mut(&mut self, buffer_idx: usize, range: std::ops::Range<u64>) -> &mut [u8] {
        let range = range.start as usize..range.end as usize;
        self.buffers.get_mut(buffer_idx).and_then(|b| b.get_mut(range)).unwrap_or_default()
    }

    /// Copies one page onto another, codes and scales of K and V together. Padding stays as it is.
    ///
    /// # Errors
    /// [`Error::PageOutOfRange`], or [`Error::BufferLen`] if the buffers are of another layout; nothing is copied.
    pub fn copy_page(&mut self, layout: &CacheLayout, src: u64, dst: u64) -> Result<(), Error> {
        let num_pages = layout.num_pages();
        for page in [src, dst] {
            if page >= num_pages {
                return Err(Error::PageOutOfRange { page, num_pages });
            }
        }
        self.as_view().check(layout)?;
        let page_len = u64::from(layout.page_len());
        for id in crate::PlaneId::ALL {
            for slot in 0..page_len {
                for head in 0..layout.format().num_kv_heads() {
                    let (buffer_idx, from) = layout.row_bytes(id, src * page_len + slot, head);
                    let (_, to) = layout.row_bytes(id, dst * page_len + slot, head);
                    if let Some(buffer) = self.buffers.get_mut(buffer_idx) {
                        buffer.copy_within(from.start as usize..from.end as usize, to.start as usize);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the buffers apart, for writers that share them out.
    pub fn into_buffers(self) -> [&'a mut [u8]; MAX_BUFFERS] {
        self.buffers
    }
}

/// Host memory for a whole cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheBuffers {
    buffers: Vec<Vec<u8>>,
}

impl CacheBuffers {
    /// Zeroed buffers of the layout's size: every scale 0, every code 0.
    pub fn zeroed(layout: &CacheLayout) -> Result<Self, Error> {
        let mut buffers = Vec::new();
        for (buffer_idx, &bytes) in layout.buffer_bytes().iter().enumerate() {
            let too_large = Error::TooLarge { buffer_idx, limit: isize::MAX as u64 };
            let len = usize::try_from(bytes).map_err(|_| too_large.clone())?;
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(len).map_err(|_| too_large)?;
            buffer.resize(len, 0u8);
            buffers.push(buffer);
        }
        Ok(Self { buffers })
    }

    /// All buffers, for reading.
    pub fn view(&self) -> CacheView<'_> {
        CacheView { buffers: std::array::from_fn(|i| self.buffers.get(i).map_or(&[][..], |b| b)) }
    }

    /// All buffers, for writing.
    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        let mut all: [&mut [u8]; MAX_BUFFERS] = std::array::from_fn(|_| Default::default());
        all.iter_mut().zip(&mut self.buffers).for_each(|(slot, buffer)| *slot = buffer);
        CacheViewMut { buffers: all }
    }

    /// The buffers themselves, e.g. to fill with a poison pattern.
    pub fn as_mut_vecs(&mut self) -> &mut [Vec<u8>] {
        &mut self.buffers
    }

    /// As [`CacheViewMut::copy_page`].
    ///
    /// # Errors
    /// As there.
    pub fn copy_page(&mut self, layout: &CacheLayout, src: u64, dst: u64) -> Result<(), Error> {
        self.view_mut().copy_page(layout, src, dst)
    }
}
