//! The one launch: a kernel, a shape, one parameter struct, a stream.

use bytemuck::Pod;

use super::driver;
use super::error::DeviceError;
use super::module::Kernel;
use super::stream::Stream;

/// Grid and block of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, along x.
    pub block_threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// Blocks along x at most; along y and z 65535.
const MAX_GRID_X: u32 = i32::MAX.cast_unsigned();
const MAX_GRID_YZ: u32 = 65_535;

impl Kernel {
    /// Queues the kernel with `params` as its one argument. Neither allocates nor waits.
    ///
    /// # Safety
    /// * `P` is the twin of the struct that the kernel takes.
    /// * The addresses in `params` are device memory of this context, of the lengths that the kernel derives from the
    ///   numbers in `params`, and live until the work has ended.
    ///
    /// # Errors
    /// [`DeviceError::Launch`] if the shape does not fit the kernel; [`DeviceError::Driver`], which may be an error of
    /// earlier work.
    pub unsafe fn launch<P: Pod>(
        &self,
        shape: LaunchShape,
        params: &P,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        self.check_shape(shape)?;
        let device = self.device();
        let _current = device.enter()?;
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast()];
        let [grid_x, grid_y, grid_z] = shape.grid;
        // SAFETY: the function is loaded in the current context, the driver copies the one argument before it returns,
        // and what the argument points at is the caller's word.
        let code = unsafe {
            driver::cuLaunchKernel(
                self.handle(),
                grid_x,
                grid_y,
                grid_z,
                shape.block_threads,
                1,
                1,
                shape.shared_bytes,
                stream.handle(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        device.check("cuLaunchKernel", code)
    }

    fn check_shape(&self, shape: LaunchShape) -> Result<(), DeviceError> {
        let facts = self.facts();
        let refuse = |what: String| Err(DeviceError::Launch { what: format!("{}: {what}", self.symbol()) });
        let [x, y, z] = shape.grid;
        if x == 0 || y == 0 || z == 0 || x > MAX_GRID_X || y > MAX_GRID_YZ || z > MAX_GRID_YZ {
            return refuse(format!(
                "grid {x} x {y} x {z}; at most {MAX_GRID_X} x {MAX_GRID_YZ} x {MAX_GRID_YZ}, none 0"
            ));
        }
        if shape.block_threads == 0 || shape.block_threads > facts.max_block_threads {
            return refuse(format!(
                "{} threads a block; at most {}",
                shape.block_threads, facts.max_block_threads
            ));
        }
        if shape.shared_bytes > facts.max_dynamic_shared_bytes {
            return refuse(format!(
                "{} bytes of shared memory; the device has {} for it",
                shape.shared_bytes, facts.max_dynamic_shared_bytes
            ));
        }
        Ok(())
    }
}
