// See NvInferRuntime.h. TensorRT-RTX has no version 0, so that none of its libraries is opened by what is built with this.
#define TRT_MAJOR_RTX 0
#define TRT_MINOR_RTX 7
#define TRT_PATCH_RTX 1
