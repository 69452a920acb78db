// Which elements a deformable convolution reads, and with which weights: the arithmetic of CUDA and host builds.
//
// Compiled by nvcc, NVRTC and any C++17 compiler, so that tests on a CPU cover what runs on a GPU.
#pragma once

#include "glip_deform.h"

#if defined(__CUDACC__)
#define GLIP_BOTH __host__ __device__ __forceinline__
#else
#include <math.h>
#define GLIP_BOTH inline
#endif

namespace glip {

// Input channels are processed in steps of this many; packed weights are padded to a multiple of it.
constexpr int kChannelStep = 32;
// Output channels of packed weights are padded to a multiple of this.
constexpr int kOutputStep = 64;
// Elements a thread reads at once; channels-last pixels are padded to a multiple of it.
constexpr int kVector = 8;

constexpr GLIP_BOTH int round_up(int value, int step) { return (value + step - 1) / step * step; }
constexpr GLIP_BOTH int ceil_div(int value, int step) { return (value + step - 1) / step; }

// Stages of weights in shared memory: asynchronous copies (8.0) look two steps ahead, others one.
constexpr GLIP_BOTH int weight_stages(int capability) { return capability >= 80 ? 3 : 2; }

// The argument of a kernel, passed by value.
struct Launch {
  GlipDeformLevel levels[GLIP_DEFORM_MAX_LEVELS];  // x channels last, no batch stride left at 0
  const void* weight;
  const void* bias;
  int first_tile[GLIP_DEFORM_MAX_LEVELS + 1];  // tiles are numbered across all levels
  int num_levels;
  int batch;
  int in_channels;  // elements from one pixel of x to the next
  int out_channels;
  int taps;
  int kernel_width;
  int stride_height;
  int stride_width;
  int pad_top;
  int pad_left;
  int dilation_height;
  int dilation_width;
  int position_type;
  int mask_logits;
  int y_layout;
};

// The level a tile belongs to.
GLIP_BOTH int level_of(const Launch& launch, int tile) {
  int level = 0;
  while (level + 1 < launch.num_levels && tile >= launch.first_tile[level + 1]) ++level;
  return level;
}

// An output pixel: its image, and its place in it. Pixels are numbered across a level's whole batch.
struct OutPixel {
  int image;
  int index;  // within the image, row-major
  int row;
  int column;
};

GLIP_BOTH OutPixel out_pixel(const GlipDeformLevel& level, int pixel) {
  const int per_image = level.out_height * level.out_width;
  OutPixel place;
  place.image = pixel / per_image;
  place.index = pixel - place.image * per_image;
  place.row = place.index / level.out_width;
  place.column = place.index - place.row * level.out_width;
  return place;
}

// Index of the first packed weight of a tap and an input channel; the output channels follow.
GLIP_BOTH long long packed_weight_index(int tap, int channel, int padded_in, int padded_out) {
  return static_cast<long long>(tap * padded_in + channel) * padded_out;
}

// The four pixels around a position and their bilinear weights. A corner outside the map has weight 0 and the place of
// a pixel inside, so that reading it is allowed.
struct Corners {
  float weight[4];  // top left, top right, bottom left, bottom right
  int first;        // row-major place of the top left one
  int right;        // 1 if the right corners are one pixel to the right, 0 if they coincide with the left
  int down;         // likewise for rows
};

// All weights are zero unless -1 < coordinate < size, as in DCNv2; so they are for a coordinate that is not a number.
GLIP_BOTH Corners corners_at(float y, float x, int height, int width, float modulation) {
  Corners result = {{0.0f, 0.0f, 0.0f, 0.0f}, 0, 0, 0};
  if (!(y > -1.0f && y < static_cast<float>(height) && x > -1.0f && x < static_cast<float>(width))) return result;
  const float floor_y = floorf(y), floor_x = floorf(x);
  const int top = static_cast<int>(floor_y), left = static_cast<int>(floor_x);
  const bool has_bottom = top + 1 < height, has_right = left + 1 < width;
  const float below = y - floor_y, beyond = x - floor_x;
  const float top_weight = top >= 0 ? 1.0f - below : 0.0f, bottom_weight = has_bottom ? below : 0.0f;
  const float left_weight = left >= 0 ? 1.0f - beyond : 0.0f, right_weight = has_right ? beyond : 0.0f;
  result.weight[0] = top_weight * left_weight * modulation;
  result.weight[1] = top_weight * right_weight * modulation;
  result.weight[2] = bottom_weight * left_weight * modulation;
  result.weight[3] = bottom_weight * right_weight * modulation;
  result.down = top >= 0 && has_bottom;
  result.right = left >= 0 && has_right;
  result.first = (top < 0 ? 0 : top) * width + (left < 0 ? 0 : left);
  return result;
}

// What one tap of one output pixel reads. `read(buffer, index)` returns an offset or a mask as float. The maps are
// indexed by the output's size, whatever their own size: GLIP's flat read.
template <class Read>
GLIP_BOTH Corners tap_corners(const Launch& launch, const GlipDeformLevel& level, const OutPixel& pixel, int tap,
                              Read read) {
  const long long plane = static_cast<long long>(level.out_height) * level.out_width;
  const long long dy_at = pixel.image * level.offset_batch_stride + 2 * tap * plane + pixel.index;
  const float dy = read(level.offset, dy_at), dx = read(level.offset, dy_at + plane);
  float modulation = 1.0f;
  if (level.mask) modulation = read(level.mask, pixel.image * level.mask_batch_stride + tap * plane + pixel.index);
  if (level.mask && launch.mask_logits) modulation = 1.0f / (1.0f + expf(-modulation));
  const int tap_row = tap / launch.kernel_width, tap_column = tap - tap_row * launch.kernel_width;
  const int row = pixel.row * launch.stride_height - launch.pad_top + tap_row * launch.dilation_height;
  const int column = pixel.column * launch.stride_width - launch.pad_left + tap_column * launch.dilation_width;
  return corners_at(static_cast<float>(row) + dy, static_cast<float>(column) + dx, level.height, level.width,
                    modulation);
}

}  // namespace glip
