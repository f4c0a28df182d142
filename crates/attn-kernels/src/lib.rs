//! CUDA kernels: contract, keys and launches.
