//! How far a dequantized value can be from the input: proven here, used by every tolerance.

/// The largest magnitude of a written code. -128 is never written, but is read as -128.
pub const fn max_code() -> i8 {
    127
}

/// Upper bound of `|x - code * scale|` in exact arithmetic, for the *stored* `scale`.
///
/// The scale is rounded up, so `|x / scale| <= 127` and the clamp never bites. The f32 quotient `y` differs from
/// `x / scale` by at most `127 * 2^-24`; rounding `y` to an integer adds at most 1/2. Hence
/// `|x - code * scale| <= scale * (1/2 + 127 * 2^-24)`: half a step, and 7.6e-6 of a step for the division.
/// The result is exact in f64 for every scale type.
/// ```
/// let (x, scale) = (0.3f32, 0.01f32);
/// let code = kv_quant::quantize_value(x, scale);
/// let error = (f64::from(x) - f64::from(code) * f64::from(scale)).abs();
/// assert!(error <= kv_quant::quantization_error_bound(scale));
/// ```
pub fn quantization_error_bound(scale: f32) -> f64 {
    f64::from(scale) * (0.5 + 127.0 / 16_777_216.0)
}
