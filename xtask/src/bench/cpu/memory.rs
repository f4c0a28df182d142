//! The memory that a bench's cache lies in: as the library allocates it, or in huge pages.

use kv_quant::{CacheBuffers, CacheLayout, CacheView, CacheViewMut};
use memmap2::MmapMut;

/// A cache's buffers.
pub enum CacheMemory {
    /// As [`CacheBuffers::zeroed`] makes them.
    Plain(CacheBuffers),
    /// Mappings for which the kernel was asked for huge pages.
    Huge(Vec<MmapMut>),
}

/// Zeroed memory in huge pages where the operating system has them.
pub fn huge(len: usize) -> std::io::Result<MmapMut> {
    let map = MmapMut::map_anon(len.max(1))?;
    #[cfg(target_os = "linux")]
    map.advise(memmap2::Advice::HugePage)?;
    Ok(map)
}

impl CacheMemory {
    /// Zeroed.
    pub fn zeroed(layout: &CacheLayout, is_huge: bool) -> anyhow::Result<Self> {
        if !is_huge {
            return Ok(Self::Plain(CacheBuffers::zeroed(layout)?));
        }
        let lens = layout.buffer_bytes().iter().map(|&bytes| usize::try_from(bytes));
        Ok(Self::Huge(lens.map(|len| Ok(huge(len?)?)).collect::<anyhow::Result<_>>()?))
    }

    /// For reading.
    pub fn view(&self, layout: &CacheLayout) -> Result<CacheView<'_>, kv_quant::Error> {
        match self {
            Self::Plain(buffers) => Ok(buffers.view()),
            Self::Huge(maps) => CacheView::new(layout, &maps.iter().map(|map| &map[..]).collect::<Vec<_>>()),
        }
    }

    /// For writing.
    pub fn view_mut(&mut self, layout: &CacheLayout) -> Result<CacheViewMut<'_>, kv_quant::Error> {
        match self {
            Self::Plain(buffers) => Ok(buffers.view_mut()),
            Self::Huge(maps) => CacheViewMut::new(layout, maps.iter_mut().map(|map| &mut map[..]).collect()),
        }
    }
}
