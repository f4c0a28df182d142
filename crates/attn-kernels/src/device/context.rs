//! A device opened for use: its primary context, made current around each call and given back after.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cust::context::Context;
use cust::device::Device;

use super::driver::{self, Handle};
use super::error::{DeviceError, DriverError};
use crate::probe::{DeviceFacts, probe};

/// The first sticky error of each device, 0 for none. A lost primary context is lost for the whole process,
/// so the mark outlives every [`CudaDevice`].
static POISON: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];

/// A device with its primary context retained. Clones share the context, and so do all buffers, streams and modules
/// made from it; it is released with the last of them. May be used from any thread.
#[derive(Clone)]
pub struct CudaDevice {
    shared: Arc<Shared>,
}

struct Shared {
    facts: DeviceFacts,
    /// Code loaded so far. It is unloaded with the device and not before.
    modules: Mutex<Vec<(ModuleKey, LoadedModule)>>,
    context: Context,
}

/// What a loaded unit is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ModuleKey {
    /// A unit of the embedded image, by name.
    Embedded(&'static str),
    /// An image given at run time, by number.
    Given(u64),
}

struct LoadedModule(Handle);

// SAFETY: the driver allows a module to be used from any thread.
unsafe impl Send for LoadedModule {}

impl Drop for Shared {
    fn drop(&mut self) {
        let modules = std::mem::take(&mut *self.modules.lock().unwrap_or_else(PoisonError::into_inner));
        if modules.is_empty() || poison_of(self.facts.ordinal).is_some() {
            return;
        }
        let enter = || Current::try_enter(self.context.as_raw().cast());
        // What is not unloaded now never is: asked twice, as for all that is freed.
        if let Ok(_current) = enter().or_else(|_| enter()) {
            for (_, module) in modules {
                // SAFETY: loaded once, unloaded once; whatever could use it has held this device. A refusal cannot be
                // reported here.
                let _ = unsafe { driver::cuModuleUnload(module.0) };
            }
        }
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CudaDevice").field(&self.shared.facts).finish()
    }
}

impl CudaDevice {
    /// Probes the device and retains its primary context (creating it if nobody has).
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] with the missing thing; [`DeviceError::ContextPoisoned`] if this process has lost
    /// the context before; [`DeviceError::OutOfMemory`] or [`DeviceError::Driver`] if the context cannot be made.
    pub fn open(ordinal: u32) -> Result<Self, DeviceError> {
        let facts = probe(ordinal)?;
        fail_if_poisoned(ordinal)?;
        let mut number = 0;
        let mut handle: Handle = std::ptr::null_mut();
        // `cust` must not see a failing code, so the context is retained here first; its own retain then succeeds.
        // SAFETY: each call writes one value; the probe has initialised the driver.
        unsafe {
            driver::check("cuDeviceGet", driver::cuDeviceGet(&raw mut number, ordinal.cast_signed()))?;
            driver::check(
                "cuDevicePrimaryCtxRetain",
                driver::cuDevicePrimaryCtxRetain(&raw mut handle, number),
            )
            .map_err(|error| if error.code == 2 { out_of_context_memory(&facts) } else { error.into() })?;
        }
        let _restore = Current::enter(handle);
        let context = Device::get_device(ordinal).and_then(Context::new);
        // SAFETY: gives back the retain above; `context` holds its own, if it was made.
        let released = driver::check("cuDevicePrimaryCtxRelease", unsafe {
            driver::cuDevicePrimaryCtxRelease_v2(number)
        });
        let context = context.map_err(|error| DriverError {
            code: error as u32,
            name: driver::name_of(error as u32),
            call: "cuDevicePrimaryCtxRetain",
        })?;
        released?;
        Ok(Self { shared: Arc::new(Shared { facts, modules: Mutex::default(), context }) })
    }

    /// What was read of the device when it was opened.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.shared.facts
    }

    /// The `CUcontext` as a number, for comparing with an engine's.
    #[must_use]
    pub fn raw_context(&self) -> u64 {
        self.shared.context.as_raw() as u64
    }

    /// Waits for all work on the device's context.
    ///
    /// # Errors
    /// Errors of earlier work surface here, as [`DeviceError::Driver`] or, from the second time on,
    /// [`DeviceError::ContextPoisoned`].
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        let _current = self.enter()?;
        // SAFETY: the context is current.
        self.check("cuCtxSynchronize", unsafe { driver::cuCtxSynchronize() })
    }

    /// Free and total device memory in bytes.
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn memory_info(&self) -> Result<(usize, usize), DeviceError> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        self.check("cuMemGetInfo", unsafe { driver::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }

    /// The error that made the context unusable, if one has.
    #[must_use]
    pub fn poisoned(&self) -> Option<DriverError> {
        poison_of(self.shared.facts.ordinal)
    }

    /// Makes the context current until the guard goes; fails fast once the context is lost.
    pub(crate) fn enter(&self) -> Result<Current, DeviceError> {
        fail_if_poisoned(self.shared.facts.ordinal)?;
        Current::try_enter(self.shared.context.as_raw().cast()).map_err(DeviceError::Driver)
    }

    /// As [`Self::enter`], for destructors: `None` where nothing can or need be freed any more. What a destructor does not
    /// free is lost, so an answer other than a lost context is asked for twice.
    pub(crate) fn enter_to_free(&self) -> Option<Current> {
        self.enter().or_else(|_| self.enter()).ok()
    }

    /// The module of a key, loaded by `load` if it has not been.
    pub(crate) fn module(
        &self,
        key: ModuleKey,
        load: impl FnOnce() -> Result<Handle, DeviceError>,
    ) -> Result<Handle, DeviceError> {
        let mut modules = self.shared.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = modules.iter().find(|(loaded, _)| *loaded == key) {
            return Ok(module.0);
        }
        let module = load()?;
        modules.push((key, LoadedModule(module)));
        Ok(module)
    }

    /// Turns a driver's answer into a result, and remembers a sticky error for all users of the device.
    pub(crate) fn check(&self, call: &'static str, code: u32) -> Result<(), DeviceError> {
        let Err(error) = driver::check(call, code) else { return Ok(()) };
        if error.is_sticky()
            && let Some(mark) = POISON.get(self.shared.facts.ordinal as usize)
        {
            let _ = mark.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
        }
        Err(error.into())
    }
}

fn poison_of(ordinal: u32) -> Option<DriverError> {
    let code = POISON.get(ordinal as usize)?.load(Ordering::Acquire);
    (code != 0).then(|| DriverError { code, name: driver::name_of(code), call: "an earlier call" })
}

fn fail_if_poisoned(ordinal: u32) -> Result<(), DeviceError> {
    poison_of(ordinal).map_or(Ok(()), |first| Err(DeviceError::ContextPoisoned { first }))
}

fn out_of_context_memory(facts: &DeviceFacts) -> DeviceError {
    let total_bytes = usize::try_from(facts.memory_bytes).unwrap_or(usize::MAX);
    DeviceError::OutOfMemory { kind: "device", requested_bytes: 0, free_bytes: 0, total_bytes }
}

/// A context that is current on this thread while this lives; then the one before it is again.
pub(crate) struct Current {
    /// What to set again; `None` if nothing had to change.
    before: Option<Handle>,
    /// Currency is a thread's: the guard must not leave it.
    _thread: PhantomData<*mut ()>,
}

impl Current {
    fn try_enter(context: Handle) -> Result<Self, DriverError> {
        let mut before: Handle = std::ptr::null_mut();
        // SAFETY: writes one pointer; `context` is retained by whoever calls this.
        unsafe {
            driver::check("cuCtxGetCurrent", driver::cuCtxGetCurrent(&raw mut before))?;
            if before == context {
                return Ok(Self { before: None, _thread: PhantomData });
            }
            driver::check("cuCtxSetCurrent", driver::cuCtxSetCurrent(context))?;
        }
        Ok(Self { before: Some(before), _thread: PhantomData })
    }

    /// For the moments around opening: remembers what is current, whatever comes.
    fn enter(context: Handle) -> Option<Self> {
        Self::try_enter(context).ok()
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: the context was current before, or null, which means none. A refusal cannot be reported here.
            let _ = unsafe { driver::cuCtxSetCurrent(before) };
        }
    }
}
