//! Append and dequantize: the two kernels that have one variant each, and the bandwidth streams.

use kv_quant::FloatType;

use super::cache::{CacheArgs, array_bytes, need};
use super::error::DeviceError;
use super::launch::{LaunchShape, Order};
use super::memory::DeviceView;
use super::module::{Kernel, Kernels};
use super::stream::Stream;
use crate::abi::{AppendParams, DequantizeParams, ErrorRecord, PagedCache, StreamParams};
use crate::key;

/// Threads of a block; `kAppendThreads` in `cuda/append/append.cuh`.
const APPEND_THREADS: u32 = 256;
/// Channels of a lane of append, of K and of V each.
const APPEND_CHANNELS: u32 = 16;
/// Channels of a lane of dequantize.
const DEQUANTIZE_CHANNELS: u32 = 8;
/// Blocks of append a multiprocessor: twice what it holds. More blocks would each begin without rows on the way.
const APPEND_BLOCKS_PER_SM: u32 = 8;
/// Threads of a block; `kStreamThreads` in `cuda/decode/stream.cuh`.
const STREAM_THREADS: u32 = 512;

/// New tokens for a cache.
#[derive(Clone, Copy, Debug)]
pub struct AppendArgs<'a> {
    /// The cache; its page table is not read.
    pub cache: CacheArgs<'a>,
    /// `[num_tokens, num_kv_heads, head_dim]` of `input_type`.
    pub k: DeviceView,
    /// The same shape.
    pub v: DeviceView,
    /// Elements between tokens of k; `num_kv_heads * head_dim` if they lie close.
    pub k_token_stride: u64,
    /// Elements between tokens of v.
    pub v_token_stride: u64,
    /// i64 `[num_tokens]`, -1 = skip.
    pub slot_mapping: DeviceView,
    /// Tokens.
    pub num_tokens: u32,
    /// Type of k and v.
    pub input_type: FloatType,
    /// [`ErrorRecord`].
    pub error: DeviceView,
}

/// Tokens of one request to be gathered into dense k and v.
#[derive(Clone, Copy, Debug)]
pub struct DequantizeArgs<'a> {
    /// The cache, with its page table.
    pub cache: CacheArgs<'a>,
    /// `[token_end - token_start, num_kv_heads, head_dim]` of `out_type`.
    pub k: DeviceView,
    /// The same shape.
    pub v: DeviceView,
    /// The request whose page row is followed.
    pub request_idx: u32,
    /// First token.
    pub token_start: u32,
    /// One past the last token.
    pub token_end: u32,
    /// Type of k and v.
    pub out_type: FloatType,
    /// [`ErrorRecord`].
    pub error: DeviceView,
}

/// The kernels that move data in and out of a cache.
#[derive(Clone, Debug)]
pub struct CacheKernels {
    append: Kernel,
    dequantize: Kernel,
}

impl Kernels {
    /// Loads append and dequantize.
    ///
    /// # Errors
    /// As [`Kernels::get`].
    pub fn cache_kernels(&self) -> Result<CacheKernels, DeviceError> {
        Ok(CacheKernels { append: self.get("kv8_append")?, dequantize: self.get("kv8_dequantize")? })
    }

    /// Loads the streams that measure bandwidth.
    ///
    /// # Errors
    /// As [`Kernels::get`].
    pub fn stream_kernels(&self) -> Result<StreamKernels, DeviceError> {
        Ok(StreamKernels { read: self.get("kv8_stream_read")?, copy: self.get("kv8_stream_copy")? })
    }
}

impl CacheKernels {
    /// Queues the quantization of new tokens into their slots. Neither allocates nor waits; can be captured.
    ///
    /// # Errors
    /// [`DeviceError::Launch`] if a view is too short; [`DeviceError::KeyMiss`] if the kernel does not take the cache;
    /// [`DeviceError::Driver`]. Bad values and slots are in the error record.
    pub fn append(&self, args: &AppendArgs<'_>, stream: &Stream) -> Result<(), DeviceError> {
        let AppendArgs { num_tokens, .. } = *args;
        if num_tokens == 0 {
            return Ok(());
        }
        let cache = args.cache.params()?;
        key::check_append(&cache)?;
        let row = u64::from(cache.num_kv_heads) * u64::from(cache.head_dim);
        let bytes = |stride: u64| -> Result<u64, DeviceError> {
            let before_last =
                array_bytes(&[u64::from(num_tokens - 1), stride], args.input_type.bytes() as u64)?;
            Ok(before_last.saturating_add(row * args.input_type.bytes() as u64))
        };
        need("k", args.k, bytes(args.k_token_stride)?)?;
        need("v", args.v, bytes(args.v_token_stride)?)?;
        need("slot_mapping", args.slot_mapping, array_bytes(&[u64::from(num_tokens)], 8)?)?;
        need("error", args.error, size_of::<ErrorRecord>() as u64)?;
        let params = AppendParams {
            cache,
            k: args.k.address(),
            v: args.v.address(),
            slot_mapping: args.slot_mapping.address(),
            error: args.error.address(),
            k_token_stride: args.k_token_stride,
            v_token_stride: args.v_token_stride,
            num_tokens,
            input_type: args.input_type as u32,
        };
        let lanes = lanes(&cache, APPEND_CHANNELS);
        let mut shape = pair_shape(&cache, num_tokens, lanes)?;
        // Its blocks stride over the pairs.
        let enough = self.append.device().facts().num_sms.max(1) * APPEND_BLOCKS_PER_SM;
        shape.grid[0] = shape.grid[0].min(enough);
        // SAFETY: the struct is the twin of the kernel's, and every array in it was checked against the shapes; slots
        // out of range are reported by the kernel and not followed. It waits for the kernel before it, and lets the next begin
        // only then.
        unsafe { self.append.launch(shape, &params, Order::Overlapping, stream) }
    }

    /// Queues the gathering of tokens into dense k and v. Neither allocates nor waits; can be captured.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn dequantize(&self, args: &DequantizeArgs<'_>, stream: &Stream) -> Result<(), DeviceError> {
        let num_tokens = args.token_end.saturating_sub(args.token_start);
        if num_tokens == 0 {
            return Ok(());
        }
        let cache = args.cache.params()?;
        key::check_append(&cache)?;
        let dims = [u64::from(num_tokens), u64::from(cache.num_kv_heads), u64::from(cache.head_dim)];
        let bytes = array_bytes(&dims, args.out_type.bytes() as u64)?;
        need("k", args.k, bytes)?;
        need("v", args.v, bytes)?;
        need("error", args.error, size_of::<ErrorRecord>() as u64)?;
        let params = DequantizeParams {
            cache,
            k: args.k.address(),
            v: args.v.address(),
            error: args.error.address(),
            request_idx: args.request_idx,
            token_start: args.token_start,
            token_end: args.token_end,
            out_type: args.out_type as u32,
        };
        let shape = pair_shape(&cache, num_tokens, lanes(&cache, DEQUANTIZE_CHANNELS))?;
        // SAFETY: as for append; page indices out of range are reported by the kernel and not followed.
        unsafe { self.dequantize.launch(shape, &params, Order::AfterPrevious, stream) }
    }
}

/// Lanes that hold a row of channels, so many each: `append_lanes` and `dequantize_lanes` in `cuda/append/`.
fn lanes(cache: &PagedCache, channels: u32) -> u32 {
    cache.head_dim.div_ceil(channels).next_power_of_two().clamp(64 / channels, 256 / channels)
}

/// Grid over (token, kv head) pairs, each held by so many lanes.
fn pair_shape(cache: &PagedCache, num_tokens: u32, lanes: u32) -> Result<LaunchShape, DeviceError> {
    let pairs = u64::from(num_tokens) * u64::from(cache.num_kv_heads);
    let blocks = pairs.div_ceil(u64::from(APPEND_THREADS / lanes));
    let blocks = u32::try_from(blocks).map_err(|_| DeviceError::Launch {
        what: format!("{num_tokens} tokens are too many for one launch"),
    })?;
    Ok(LaunchShape {
        grid: [blocks, 1, 1],
        block: [APPEND_THREADS, 1],
        shared_bytes: 0,
        cluster: 1,
        balances: false,
    })
}

/// Plain streams over memory: what the device can read, and copy.
#[derive(Clone, Debug)]
pub struct StreamKernels {
    read: Kernel,
    copy: Kernel,
}

impl StreamKernels {
    /// Queues reading all of `src` (a multiple of 64 KiB counts; what is left over is not read).
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn read(&self, src: DeviceView, scratch: DeviceView, stream: &Stream) -> Result<(), DeviceError> {
        need("scratch", scratch, 4)?;
        self.launch(&self.read, src, scratch, stream)
    }

    /// Queues copying `src` to `dst`, likewise.
    ///
    /// # Errors
    /// [`DeviceError::Launch`] if `dst` is shorter; [`DeviceError::Driver`].
    pub fn copy(&self, src: DeviceView, dst: DeviceView, stream: &Stream) -> Result<(), DeviceError> {
        need("dst", dst, src.len_bytes())?;
        self.launch(&self.copy, src, dst, stream)
    }

    fn launch(
        &self,
        kernel: &Kernel,
        src: DeviceView,
        dst: DeviceView,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        if !src.address().is_multiple_of(16) || !dst.address().is_multiple_of(16) {
            return Err(DeviceError::Launch { what: "streams take addresses aligned to 16".to_owned() });
        }
        let params =
            StreamParams { src: src.address(), dst: dst.address(), num_vectors: src.len_bytes() / 16 };
        let blocks = kernel.device().facts().num_sms * kernel.blocks_per_sm(STREAM_THREADS, 0)?.max(1);
        let shape = LaunchShape {
            grid: [blocks, 1, 1],
            block: [STREAM_THREADS, 1],
            shared_bytes: 0,
            cluster: 1,
            balances: false,
        };
        // SAFETY: the struct is the twin of the kernel's; both arrays have that many vectors, or are not written.
        unsafe { kernel.launch(shape, &params, Order::AfterPrevious, stream) }
    }
}
