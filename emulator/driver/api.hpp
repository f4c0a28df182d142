// The driver's interface as NVIDIA's header declares it. What this header declares is exported; the rest of the library is hidden.
#pragma once

#pragma GCC visibility push(default)
#include <cuda.h>

// The header renames this call to its newest version. Callers look the older one up as well.
#undef cuEventElapsedTime
extern "C" {
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end);
CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end);
}
#pragma GCC visibility pop
