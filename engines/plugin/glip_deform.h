/* Modulated deformable convolution (DCNv2) for several feature maps at once: the C interface of the CUDA kernels.
 *
 * Free of CUDA and TensorRT headers; also compiled by NVRTC, hence no standard headers either.
 *
 * A problem is one set of weights and up to eight levels (feature maps) it is applied to. Nothing here allocates
 * device memory or synchronises: the caller gives workspace and stream, and every call may be captured in a CUDA graph.
 */
#ifndef GLIP_DEFORM_H
#define GLIP_DEFORM_H

#define GLIP_DEFORM_MAX_LEVELS 8
#define GLIP_DEFORM_MAX_TAPS 9

#if defined(_WIN32)
#define GLIP_DEFORM_API __declspec(dllexport)
#else
#define GLIP_DEFORM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { GLIP_DEFORM_F32 = 0, GLIP_DEFORM_F16 = 1, GLIP_DEFORM_BF16 = 2 };
enum { GLIP_DEFORM_NCHW = 0, GLIP_DEFORM_NHWC = 1 };

/* One feature map. Batch strides count elements from one image to the next; 0 stands for "images lie back to back".
 *
 * GLIP reads some offset maps flat: the map belongs to a larger level, and its buffer is indexed with the output's
 * size. Give the larger map's pointers and its batch strides (18 or 9 times its own height and width) for that. */
typedef struct GlipDeformLevel {
  const void* x;      /* (batch, in_channels, height, width) or channels last */
  const void* offset; /* (batch, 2 * taps, out_height, out_width); channels 2k, 2k + 1 are dy, dx of tap k */
  const void* mask;   /* (batch, taps, out_height, out_width), after the sigmoid; null for all ones */
  void* y;            /* (batch, out_channels, out_height, out_width) or channels last */
  long long x_batch_stride;
  long long offset_batch_stride;
  long long mask_batch_stride;
  long long y_batch_stride;
  int height;
  int width;
  int out_height;
  int out_width;
} GlipDeformLevel;

typedef struct GlipDeformProblem {
  int batch;
  int in_channels;
  int out_channels;
  int kernel_height; /* kernel_height * kernel_width <= GLIP_DEFORM_MAX_TAPS */
  int kernel_width;
  int stride_height;
  int stride_width;
  int pad_top;
  int pad_left;
  int dilation_height;
  int dilation_width;
  int data_type;     /* of x, weight, bias and y: GLIP_DEFORM_F32, _F16 or _BF16 */
  int position_type; /* of offset and mask: GLIP_DEFORM_F32, or data_type */
  int x_layout;      /* GLIP_DEFORM_NHWC takes in_channels that are a multiple of 8 */
  int y_layout;
  int num_levels;
  GlipDeformLevel levels[GLIP_DEFORM_MAX_LEVELS];
  const void* weight; /* as glip_deform_pack_weights wrote it */
  const void* bias;   /* (out_channels,) or null */
} GlipDeformProblem;

#if !defined(__CUDACC_RTC__) /* NVRTC knows device functions only */

/* What is wrong with a problem, in one line, or null. Pointers are not looked at. */
GLIP_DEFORM_API const char* glip_deform_problem_error(const GlipDeformProblem* problem);

/* Bytes of packed weights. */
GLIP_DEFORM_API unsigned long long glip_deform_packed_weight_bytes(const GlipDeformProblem* problem);

/* Writes (out_channels, in_channels, kernel_height, kernel_width) device weights as the kernels read them: tap by tap,
 * input channels inside, output channels innermost, both padded with zeros. Once per set of weights is enough.
 * Returns 0, or a CUDA error number. */
GLIP_DEFORM_API int glip_deform_pack_weights(const GlipDeformProblem* problem, const void* weight, void* packed,
                                             void* stream);

/* Bytes of workspace glip_deform_launch needs: 0 unless x is GLIP_DEFORM_NCHW, which is transposed there. */
GLIP_DEFORM_API unsigned long long glip_deform_workspace_bytes(const GlipDeformProblem* problem);

/* Enqueues the convolution of all levels. Buffers must be 16-byte aligned and, like the workspace, live until the
 * stream has passed. Returns 0, a CUDA error number, or -1 for a problem glip_deform_problem_error explains, too small
 * a workspace or a misaligned buffer. */
GLIP_DEFORM_API int glip_deform_launch(const GlipDeformProblem* problem, void* workspace,
                                       unsigned long long workspace_bytes, void* stream);

#endif

#ifdef __cplusplus
}
#endif
#endif
