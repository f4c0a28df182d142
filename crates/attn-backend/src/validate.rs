//! Every check of a call, once, before anything runs. Below this crate a violated precondition is a bug.
//!
//! None of these allocates: callers on the hot path lend their scratch memory.

use crate::{Array, BackendId, Capability, Error, Input, Memory, Output};
use attn_kernels::DeviceView;
use attn_plan::{DecodeRequest, DecodeSpec};
use kv_quant::{CacheLayout, FloatType, PageCopy};
use std::ops::Range;

/// Device buffers of a cache start at multiples of this many bytes: the widest access of a kernel.
pub(crate) const DEVICE_ALIGN: u64 = 16;

/// What a session knows that its calls are checked against.
#[derive(Debug)]
pub(crate) struct Facts {
    pub backend: BackendId,
    pub layout: CacheLayout,
    pub device_arrays: bool,
    pub is_read_only: bool,
    /// The caller's device buffers; empty if the cache is elsewhere.
    pub device_cache: Vec<DeviceView>,
}

/// Memory that checks need, kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub slots: Vec<(i64, usize)>,
    /// (page, is written, which copy)
    pages: Vec<(u64, bool, usize)>,
}

/// A spec by itself and against the cache.
pub(crate) fn spec(layout: &CacheLayout, spec: &DecodeSpec) -> Result<(), Error> {
    spec.check()?;
    let format = layout.format();
    for (what, spec, cache) in [
        ("num_kv_heads", spec.num_kv_heads, format.num_kv_heads()),
        ("head_dim", spec.head_dim, format.head_dim()),
    ] {
        if spec != cache {
            return Err(attn_plan::Error::CacheMismatch { what, spec, cache }.into());
        }
    }
    Ok(())
}

/// The memory that a session is to be opened over.
pub(crate) fn memory(
    layout: &CacheLayout,
    memory: &Memory<'_>,
    backend: &BackendId,
    capability: &Capability,
) -> Result<(), Error> {
    let got = memory.kind();
    if !capability.memory.contains(&got) {
        let offered: Vec<String> = capability.memory.iter().map(ToString::to_string).collect();
        return Err(Error::Memory { got, backend: backend.clone(), offered: offered.join(", ") });
    }
    match memory {
        Memory::Owned => Ok(()),
        Memory::Host(view) => Ok(view.as_view().check(layout)?),
        Memory::HostReadOnly(view) => Ok(view.check(layout)?),
        Memory::Device(buffers) => device_cache(layout, buffers),
    }
}

fn device_cache(layout: &CacheLayout, buffers: &[DeviceView]) -> Result<(), Error> {
    let want = layout.buffer_bytes();
    if buffers.len() != want.len() {
        return Err(kv_quant::Error::BufferCount { got: buffers.len(), want: want.len() }.into());
    }
    for (buffer_idx, (buffer, &want)) in buffers.iter().zip(want).enumerate() {
        let array = Array::Cache(buffer_idx);
        address(array, buffer.address(), DEVICE_ALIGN)?;
        if buffer.len_bytes() < want {
            return Err(kv_quant::Error::BufferLen { buffer_idx, got: buffer.len_bytes(), want }.into());
        }
        let range = span(array, *buffer)?;
        for (other_idx, other) in buffers.iter().enumerate().take(buffer_idx) {
            disjoint(
                (Array::Cache(other_idx), span(Array::Cache(other_idx), *other)?),
                (array, range.clone()),
            )?;
        }
    }
    Ok(())
}

fn span(array: Array, view: DeviceView) -> Result<Range<u64>, Error> {
    let end = view.address().checked_add(view.len_bytes());
    Ok(view.address()..end.ok_or(Error::SizeOverflow { array, what: "address + bytes" })?)
}

fn address(array: Array, address: u64, align: u64) -> Result<(), Error> {
    if address == 0 || !address.is_multiple_of(align) {
        return Err(Error::Address { array, address, align });
    }
    Ok(())
}

fn disjoint(first: (Array, Range<u64>), second: (Array, Range<u64>)) -> Result<(), Error> {
    let is_empty = first.1.is_empty() || second.1.is_empty();
    if !is_empty && first.1.start < second.1.end && second.1.start < first.1.end {
        return Err(Error::Overlap { first: first.0, second: second.0 });
    }
    Ok(())
}

/// Where an array lies: nowhere in particular on the host, or the byte addresses on the device.
type Place = Option<Range<u64>>;

impl Facts {
    fn place(&self, array: Array, slice: Option<&crate::DeviceSlice>) -> Result<Place, Error> {
        let Some(slice) = slice else { return Ok(None) };
        if !self.device_arrays {
            return Err(Error::HostOnly { array, backend: self.backend.clone() });
        }
        if !slice.is_empty() {
            address(array, slice.address(), slice.float_type().bytes() as u64)?;
        }
        Ok(Some(span(array, slice.view())?))
    }

    /// Errors unless a written array keeps clear of the cache.
    fn clear_of_cache(&self, array: Array, place: &Place) -> Result<(), Error> {
        let Some(range) = place else { return Ok(()) };
        self.device_cache.iter().enumerate().try_for_each(|(buffer_idx, buffer)| {
            disjoint(
                (array, range.clone()),
                (Array::Cache(buffer_idx), span(Array::Cache(buffer_idx), *buffer)?),
            )
        })
    }

    /// Arguments of an append.
    pub(crate) fn append(
        &self,
        k: &Input<'_>,
        v: &Input<'_>,
        slots: &[i64],
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        self.writable()?;
        let format = self.layout.format();
        let row = u64::from(format.num_kv_heads()) * u64::from(format.head_dim());
        let what = "num_tokens * num_kv_heads * head_dim";
        let want =
            (slots.len() as u64).checked_mul(row).ok_or(Error::SizeOverflow { array: Array::K, what })?;
        let mut places = [None, None];
        for ((array, x), place) in [(Array::K, k), (Array::V, v)].into_iter().zip(&mut places) {
            len(array, x.len(), want)?;
            *place = self.place(array, x.device())?;
            self.clear_of_cache(array, place)?;
        }
        if k.float_type() != v.float_type() {
            return Err(kv_quant::Error::MixedTypes { k: k.float_type(), v: v.float_type() }.into());
        }
        let [k, v] = &places;
        same_memory((Array::K, k), (Array::V, v))?;
        self.slots(slots, scratch)
    }

    fn slots(&self, slots: &[i64], scratch: &mut Scratch) -> Result<(), Error> {
        let num_slots = self.layout.num_slots();
        scratch.slots.clear();
        for (token, &slot) in slots.iter().enumerate() {
            if slot < -1 || slot >= num_slots as i64 {
                return Err(kv_quant::Error::SlotOutOfRange { token, slot, num_slots }.into());
            }
            if slot >= 0 {
                scratch.slots.push((slot, token));
            }
        }
        scratch.slots.sort_unstable();
        for pair in scratch.slots.windows(2) {
            if let [(slot, first), (other, second)] = *pair
                && slot == other
            {
                return Err(kv_quant::Error::SlotTwice { slot, first, second }.into());
            }
        }
        Ok(())
    }

    /// Lengths and page table of a step whose spec has been checked.
    pub(crate) fn plan(&self, request: &DecodeRequest<'_>) -> Result<(), Error> {
        request.check(&self.layout)?;
        let num_slots = self.layout.num_slots();
        match request.kv_lens.iter().enumerate().find(|(_, kv_len)| u64::from(**kv_len) > num_slots) {
            Some((request, &kv_len)) => Err(Error::KvLen { request, kv_len, num_slots }),
            None => Ok(()),
        }
    }

    /// Arrays of a decode step.
    pub(crate) fn decode(
        &self,
        spec: &DecodeSpec,
        batch: usize,
        q: &Input<'_>,
        out: &Output<'_>,
        lse: Option<&Output<'_>>,
    ) -> Result<(), Error> {
        let rows = (batch as u64)
            .checked_mul(u64::from(spec.q_len) * u64::from(spec.num_q_heads))
            .ok_or(Error::SizeOverflow { array: Array::Lse, what: "batch * q_len * num_q_heads" })?;
        let elements = rows
            .checked_mul(u64::from(spec.head_dim))
            .ok_or(Error::SizeOverflow { array: Array::Q, what: "batch * q_len * num_q_heads * head_dim" })?;
        float_type(Array::Q, q.float_type(), spec.q_type)?;
        float_type(Array::Out, out.float_type(), spec.out_type)?;
        len(Array::Q, q.len(), elements)?;
        len(Array::Out, out.len(), elements)?;
        match lse {
            None if spec.want_lse => return Err(Error::LseMissing),
            Some(_) if !spec.want_lse => return Err(Error::LseNotWanted),
            Some(lse) => {
                float_type(Array::Lse, lse.float_type(), FloatType::F32)?;
                len(Array::Lse, lse.len(), rows)?;
            }
            None => {}
        }
        let q = (Array::Q, &self.place(Array::Q, q.device())?);
        let out = (Array::Out, &self.place(Array::Out, out.device())?);
        self.written(out, q)?;
        let Some(lse) = lse else { return Ok(()) };
        let lse = (Array::Lse, &self.place(Array::Lse, lse.device())?);
        self.written(lse, q)?;
        self.written(lse, out)
    }

    /// A written array beside another one.
    fn written(&self, written: (Array, &Place), other: (Array, &Place)) -> Result<(), Error> {
        same_memory(other, written)?;
        self.clear_of_cache(written.0, written.1)?;
        match (written.1, other.1) {
            (Some(range), Some(other_range)) => {
                disjoint((other.0, other_range.clone()), (written.0, range.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Errors if the cache may not be written.
    pub(crate) fn writable(&self) -> Result<(), Error> {
        if self.is_read_only { Err(Error::ReadOnly) } else { Ok(()) }
    }

    /// Page copies: in range, and no page written by one is touched by another.
    pub(crate) fn copies(&self, copies: &[PageCopy], scratch: &mut Scratch) -> Result<(), Error> {
        self.writable()?;
        let num_pages = self.layout.num_pages();
        scratch.pages.clear();
        for (copy, PageCopy { src, dst }) in copies.iter().enumerate() {
            for (page, is_written) in [(*src, false), (*dst, true)] {
                if page >= num_pages {
                    return Err(Error::CopyPage { copy, page, num_pages });
                }
                scratch.pages.push((page, is_written, copy));
            }
        }
        scratch.pages.sort_unstable();
        for pair in scratch.pages.windows(2) {
            if let [(page, _, first), (other, is_written, second)] = *pair
                && page == other
                && is_written
            {
                let (first, second) = (first.min(second), first.max(second));
                return Err(Error::CopyConflict { first, second, page });
            }
        }
        Ok(())
    }

    /// Raw bytes of a cache buffer.
    pub(crate) fn byte_range(&self, buffer_idx: usize, offset: u64, len: usize) -> Result<(), Error> {
        let have = self.layout.buffer_bytes().get(buffer_idx).copied().unwrap_or(0);
        let end = offset.saturating_add(len as u64);
        if buffer_idx >= self.layout.buffer_bytes().len() || end > have {
            return Err(Error::ByteRange { buffer_idx, start: offset, end, have });
        }
        Ok(())
    }
}

fn len(array: Array, got: u64, want: u64) -> Result<(), Error> {
    if got == want { Ok(()) } else { Err(Error::Len { array, got, want }) }
}

fn float_type(array: Array, got: FloatType, want: FloatType) -> Result<(), Error> {
    if got == want { Ok(()) } else { Err(Error::Type { array, got, want }) }
}

fn same_memory(first: (Array, &Place), second: (Array, &Place)) -> Result<(), Error> {
    if first.1.is_some() == second.1.is_some() {
        Ok(())
    } else {
        Err(Error::MixedMemory { first: first.0, second: second.0 })
    }
}
