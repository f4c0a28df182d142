// The constants that the kernels use.
#pragma once
#define CUDART_INF_F __builtin_inff()
