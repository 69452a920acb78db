/* Modulated deformable convolution (DCNv2) for several feature maps at once: the C interface of the CUDA kernels.
 *
 * Needs no CUDA or TensorRT headers, and no standard headers either, because NVRTC compiles it too.
 *
 * A problem is one set of weights and the one to eight levels (feature maps) that it is applied to. Nothing here
 * allocates device memory or synchronizes: the caller provides workspace and stream, and every call may be captured in
 * a CUDA graph.
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

/* One feature map. Batch strides count elements from one image to the next; 0 means that images are contiguous.
 *
 * GLIP reads some offset maps flat: the map belongs to a larger level, and its buffer is indexed by the output's size.
 * For that, pass the larger map's pointers and its batch strides (18 or 9 times its own height and width). */
typedef struct GlipDeformLevel {
  const void* x;      /* (batch, in_channels, height, width) or channels last */
  const void* offset; /* (batch, 2 * taps, out_height, out_width); channels 2k, 2k + 1 are dy, dx of tap k */
  const void* mask;   /* (batch, taps, out_height, out_width), see mask_logits; null for all ones */
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
  int x_layout;      /* GLIP_DEFORM_NHWC needs in_channels that are a multiple of 8 */
  int y_layout;
  int mask_logits; /* 0: masks are after their sigmoid; 1: before it, and it is applied here */
  int num_levels;
  GlipDeformLevel levels[GLIP_DEFORM_MAX_LEVELS];
  const void* weight; /* as glip_deform_pack_weights wrote it */
  const void* bias;   /* (out_channels,) or null */
} GlipDeformProblem;

#if !defined(__CUDACC_RTC__) /* NVRTC compiles device functions only */

/* Returns what is wrong with a problem, in one line, or null. Pointers are not checked. */
GLIP_DEFORM_API const char* glip_deform_problem_error(const GlipDeformProblem* problem);

/* Returns the size of packed weights in bytes. */
GLIP_DEFORM_API unsigned long long glip_deform_packed_weight_bytes(const GlipDeformProblem* problem);

/* Writes (out_channels, in_channels, kernel_height, kernel_width) device weights as the kernels read them: (taps, input
 * channels, output channels), both kinds of channels padded with zeros. Needed once for a set of weights.
 * Returns 0, or a CUDA error number. */
GLIP_DEFORM_API int glip_deform_pack_weights(const GlipDeformProblem* problem, const void* weight, void* packed,
                                             void* stream);

/* Returns the bytes of workspace that glip_deform_launch needs: 0 unless x is GLIP_DEFORM_NCHW, which it transposes. */
GLIP_DEFORM_API unsigned long long glip_deform_workspace_bytes(const GlipDeformProblem* problem);

/* Enqueues the convolution of all levels. Buffers must be 16-byte aligned and, like the workspace, stay valid until the
 * stream has executed it. Returns 0, a CUDA error number, or -1 for a problem that glip_deform_problem_error explains,
 * too small a workspace or a misaligned buffer. */
GLIP_DEFORM_API int glip_deform_launch(const GlipDeformProblem* problem, void* workspace,
                                       unsigned long long workspace_bytes, void* stream);

#endif

#ifdef __cplusplus
}
#endif
#endif
