//! What an instruction set has to offer.

use kv_quant::ScaleType;

/// One instruction set's vectors of f32. A value of the type is the proof that the CPU has the instructions, which is
/// why methods without pointers are safe.
///
/// Pointers are unaligned; a method reads or writes exactly the elements that it names.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Lanes of a vector: 8 or 16.
    const LANES: usize;
    /// A vector.
    type F: Copy;

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
    /// `p[0]` in lanes 0 to 7 and, if there are 16, `p[1]` in the others.
    /// # Safety
    /// `LANES / 8` f32 are readable at `p`.
    unsafe fn load_by_eights(self, p: *const f32) -> Self::F;
    /// Decodes `n` (1 to 8) stored scales to f32. Writes 8 f32, zeros behind the first `n`.
    /// # Safety
    /// `n` scales are readable at `p`, 8 f32 writable at `out`.
    unsafe fn widen_scales(self, scale_type: ScaleType, p: *const u8, n: usize, out: *mut f32);
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
    /// To the nearest integer.
    fn round(self, x: Self::F) -> Self::F;
    /// `2^n` for integers -126 to 127.
    fn exp2_int(self, n: Self::F) -> Self::F;
    /// `a < b ? x : y`, lane by lane.
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Lane `i` of the result is the sum of the lanes of `rows[i]`; `rows` from `LANES` on are not looked at.
    fn sum_lanes(self, rows: &[Self::F; 16]) -> Self::F;

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
