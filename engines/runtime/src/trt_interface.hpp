// The headers of TensorRT, or with GLIP_RTX those of TensorRT-RTX, and which of their functions there are.
#pragma once

#include <NvInferRuntime.h>

/// Major and minor version of TensorRT. Where nothing else is said, TensorRT-RTX has the functions of 10.13.
#ifdef GLIP_RTX
#define GLIP_INTERFACE 1013
#if NV_TENSORRT_MAJOR >= 8
#error "these are the headers of TensorRT, not of TensorRT-RTX; set TENSORRT_RTX_DIR"
#endif
#else
#define GLIP_INTERFACE (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR)
#if GLIP_INTERFACE < 806
#error "TensorRT 8.6 or newer is needed; set TENSORRT_DIR"
#endif
#endif
