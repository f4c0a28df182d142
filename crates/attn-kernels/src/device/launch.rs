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
    /// Threads of a block along x and y.
    pub block: [u32; 2],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks along z that run at once and reach each other's shared memory; 1: none do.
    pub cluster: u32,
    /// Whether the device may place the blocks of a cluster where most room is, rather than side by side
    /// ([`residency::balances_clusters`](crate::residency::balances_clusters)).
    pub balances: bool,
}

/// When a launch may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// After all earlier work of the stream.
    AfterPrevious,
    /// As soon as the kernel before it lets it (programmatic dependent launch), where device and driver have that; the
    /// kernel must wait for the results of the one before by itself. Elsewhere as `AfterPrevious`.
    Overlapping,
}

/// The driver's launch configuration (`CUlaunchConfig`).
#[repr(C)]
pub(crate) struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: driver::Handle,
    attributes: *mut LaunchAttribute,
    num_attributes: u32,
}

/// `CUlaunchAttribute`: a number, and a value of 64 bytes of which those here use the first words.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct LaunchAttribute {
    id: u32,
    _pad: u32,
    value: [u32; 16],
}

const _: () = assert!(size_of::<LaunchAttribute>() == 72 && size_of::<LaunchConfig>() == 56);

impl LaunchAttribute {
    fn new(id: u32, words: &[u32]) -> Self {
        let mut value = [0; 16];
        value.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        Self { id, _pad: 0, value }
    }
}

const CLUSTER_DIMENSION: u32 = 4;
const CLUSTER_SCHEDULING_POLICY: u32 = 5;
/// `CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING`.
const LOAD_BALANCING: u32 = 2;
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;
/// First version in which such launches can be captured into a graph.
const OVERLAP_DRIVER: u32 = 12_030;
/// First architecture that has them.
const OVERLAP_SM: u32 = 90;

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
        order: Order,
        stream: &Stream,
    ) -> Result<(), DeviceError> {
        self.check_shape(shape)?;
        let device = self.device();
        let _current = device.enter()?;
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast()];
        let facts = device.facts();
        let overlaps =
            order == Order::Overlapping && facts.sm >= OVERLAP_SM && facts.driver_version >= OVERLAP_DRIVER;
        if overlaps || shape.cluster > 1 {
            let wanted = [
                (overlaps, LaunchAttribute::new(PROGRAMMATIC_STREAM_SERIALIZATION, &[1])),
                (shape.cluster > 1, LaunchAttribute::new(CLUSTER_DIMENSION, &[1, 1, shape.cluster])),
                (
                    shape.cluster > 1 && shape.balances,
                    LaunchAttribute::new(CLUSTER_SCHEDULING_POLICY, &[LOAD_BALANCING]),
                ),
            ];
            let mut attributes = [LaunchAttribute::new(0, &[]); 3];
            let mut num_attributes = 0;
            for ((_, attribute), to) in
                wanted.into_iter().filter(|(is_wanted, _)| *is_wanted).zip(&mut attributes)
            {
                *to = attribute;
                num_attributes += 1;
            }
            let config = LaunchConfig {
                grid: shape.grid,
                block: [shape.block[0], shape.block[1], 1],
                shared_bytes: shape.shared_bytes,
                stream: stream.handle(),
                attributes: attributes.as_mut_ptr(),
                num_attributes,
            };
            let (config, function) = (&raw const config, self.handle());
            // SAFETY: as below; the configuration and its attributes live through the call.
            let code = unsafe {
                driver::cuLaunchKernelEx(config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
            };
            return device.check("cuLaunchKernelEx", code);
        }
        let [grid_x, grid_y, grid_z] = shape.grid;
        // SAFETY: the function is loaded in the current context, the driver copies the one argument before it returns,
        // and what the argument points at is the caller's word.
        let code = unsafe {
            driver::cuLaunchKernel(
                self.handle(),
                grid_x,
                grid_y,
                grid_z,
                shape.block[0],
                shape.block[1],
                1,
                shape.shared_bytes,
                stream.handle(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        device.check("cuLaunchKernel", code)
    }

    /// The most blocks that a cluster of a launch of this shape can have on this device, by the driver; 1 where the driver
    /// does not know.
    pub(super) fn most_in_cluster(&self, shape: LaunchShape) -> u32 {
        let Ok(_current) = self.device().enter() else { return 1 };
        let config = LaunchConfig {
            grid: shape.grid,
            block: [shape.block[0], shape.block[1], 1],
            shared_bytes: shape.shared_bytes,
            stream: std::ptr::null_mut(),
            attributes: std::ptr::null_mut(),
            num_attributes: 0,
        };
        let mut blocks = 0;
        // SAFETY: writes one integer; the function is of a loaded module and the configuration lives through the call.
        let code = unsafe {
            driver::cuOccupancyMaxPotentialClusterSize(&raw mut blocks, self.handle(), &raw const config)
        };
        if code == 0 { u32::try_from(blocks).unwrap_or(1).max(1) } else { 1 }
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
        if shape.cluster == 0 || !z.is_multiple_of(shape.cluster) {
            return refuse(format!("clusters of {} blocks along a grid of {z}", shape.cluster));
        }
        let threads = u64::from(shape.block[0]) * u64::from(shape.block[1]);
        if threads == 0 || threads > u64::from(facts.max_block_threads) {
            return refuse(format!("{threads} threads a block; at most {}", facts.max_block_threads));
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
