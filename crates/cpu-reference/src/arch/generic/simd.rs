//! What an instruction set has to offer.

use kv_quant::ScaleType;

/// 1.5 * 2^23 + 127: its neighbours are integers, whose lowest bits are an exponent with its bias.
pub(crate) const EXP2_SHIFT: f32 = 12_583_039.0;

/// A loop that is compiled once for each instruction set, apart from its caller.
pub(crate) trait Loop<S: Simd> {
    /// Must be `#[inline(always)]`, so that it is compiled with the target features of the function that it ends up in.
    fn run(self, s: S);
}

/// One instruction set's vectors of f32. A value of the type is the proof that the CPU has the instructions, which is
/// why methods without pointers are safe.
///
/// Pointers are unaligned; a method reads or writes exactly the elements that it names.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Lanes of a vector: 8 or 16.
    const LANES: usize;
    /// A vector.
    type F: Copy;
    /// The same with instructions for [`Self::dot_codes`] that only some CPUs of the set have.
    type Integer: Simd;

    /// Whether this CPU has them.
    fn integer(self) -> Option<Self::Integer>;

    /// Runs a loop in a function of its own that has the instruction set's target features. Everything inlined into one
    /// function would take a compiler minutes.
    fn run<L: Loop<Self>>(self, inner: L);

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// `LANES` f32 are readable at `p`.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// `LANES` f32 are writable at `p`.
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// `LANES` codes as f32.
    /// # Safety
    /// `LANES` bytes are readable at `p`.
    unsafe fn load_codes(self, p: *const i8) -> Self::F;
    /// Lane `i` is the sum of the products of codes `4 i..4 i + 4`, exact; `4 * LANES` codes each. No code of `q` is -128.
    /// `offsets` are `LANES` i32, -128 times the sum of the four codes of `q`: for instructions that take `k + 128`.
    /// # Safety
    /// Codes and offsets are readable.
    #[inline(always)]
    unsafe fn dot_codes(self, k: *const i8, q: *const i8, _offsets: *const i32) -> Self::F {
        let mut lanes = [0f32; 16];
        for (lane, sum) in lanes.iter_mut().enumerate().take(Self::LANES) {
            let mut products = 0;
            for i in lane * 4..lane * 4 + 4 {
                // SAFETY: the caller's.
                products += unsafe { i32::from(*k.add(i)) * i32::from(*q.add(i)) };
            }
            *sum = products as f32;
        }
        // SAFETY: 16 f32, at least LANES.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// `p[0]` in lanes 0 to 7 and, if there are 16, `p[stride]` in the others.
    /// # Safety
    /// These f32 are readable.
    unsafe fn load_by_eights(self, p: *const f32, stride: usize) -> Self::F;
    /// `p[lane / N]`, `N` being 1, 2, 4 or 8.
    /// # Safety
    /// `LANES` f32 are readable at `p`.
    unsafe fn load_repeated<const N: usize>(self, p: *const f32) -> Self::F;
    /// Decodes `n` (1 to 8) scales, `offset` bytes into each of eight rows, to f32: scale `i` of row `j` goes to
    /// `out[i * stride + j]`.
    /// # Safety
    /// `rows` are eight pointers, each good for `offset` bytes and `n` scales; `out` is good for `(n - 1) * stride + 8` f32.
    #[inline(always)]
    unsafe fn widen_scales(
        self,
        scale_type: ScaleType,
        rows: *const *const u8,
        offset: usize,
        n: usize,
        out: *mut f32,
        stride: usize,
    ) {
        let bytes = scale_type.bytes();
        for row in 0..8 {
            // SAFETY: the caller's.
            let stored = unsafe { std::slice::from_raw_parts((*rows.add(row)).add(offset), n * bytes) };
            for (i, stored) in stored.chunks_exact(bytes).enumerate() {
                // SAFETY: the caller's.
                unsafe { *out.add(i * stride + row) = scale_type.read(stored).unwrap_or(f32::NAN) };
            }
        }
    }
    /// Asks for the cache line of `p`. Any address is allowed.
    fn prefetch(self, p: *const u8);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, x: Self::F) -> Self::F;
    /// `a * b + c`, fused where the machine can.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `2^n` of `n + `[`EXP2_SHIFT`] for integers -126 to 127; anything for others.
    fn exp2_shifted(self, n: Self::F) -> Self::F;
    /// `a < b ? x : y`, lane by lane.
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Stores eight f32: the sums of the lanes of each of `rows`.
    /// # Safety
    /// Eight f32 are writable at `p`.
    unsafe fn store_sums(self, rows: &[Self::F; 8], p: *mut f32);

    /// The largest lane.
    fn max_lanes(self, x: Self::F) -> f32;
    /// Stores lanes within +-127, rounded half to even, as `LANES` codes.
    /// # Safety
    /// `LANES` bytes are writable at `p`.
    unsafe fn store_codes(self, p: *mut i8, x: Self::F);
    /// [`Self::store_codes`] of four vectors in a row.
    /// # Safety
    /// `4 * LANES` bytes are writable at `p`.
    #[inline(always)]
    unsafe fn store_codes_of_four(self, p: *mut i8, x: [Self::F; 4]) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { self.store_codes(p.add(i * Self::LANES), x) };
        }
    }
    /// `kv_quant::round_scale_up` of the first 8 lanes: stores the first `n` scales at `p` and returns all their values.
    /// No scale overflows its type.
    /// # Safety
    /// `n` (1 to 8) scales are writable at `p`.
    unsafe fn round_scales_up(self, scale_type: ScaleType, amax: Self::F, p: *mut u8, n: usize) -> Self::F;
}
