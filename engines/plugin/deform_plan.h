// From a problem to the launch that computes it: checks, sizes, and the choice of a tile. Host only, without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deform_math.h"

namespace glip {

// The kernels. A block computes `pixels` x `channels` outputs.
struct TileShape {
  const char* suffix;  // of the kernel's name, after glip_deform_f16_ for instance
  int pixels;
  int channels;
  int depth;  // input channels of one tap in a step
  int threads;
  double efficiency;  // of a fully occupied multiprocessor, relative to the widest tile; an estimate
};

constexpr TileShape kTensorTiles[] = {
    {"wide", 128, 256, 32, 256, 1.0}, {"medium", 64, 128, 32, 128, 0.7}, {"small", 32, 64, 32, 64, 0.4}};
constexpr TileShape kScalarTile = {"scalar", 64, 64, 16, 128, 1.0};

inline int element_size(int data_type) { return data_type == GLIP_DEFORM_F32 ? 4 : 2; }

// Returns what is wrong with a problem, or null; pointers are not checked.
inline const char* problem_error(const GlipDeformProblem& p) {
  if (p.batch < 1 || p.in_channels < 1 || p.out_channels < 1) return "batch and channels are at least 1";
  if (p.kernel_height < 1 || p.kernel_width < 1 || p.kernel_height * p.kernel_width > GLIP_DEFORM_MAX_TAPS)
    return "the kernel has 1 to 9 taps, such as 3x3";
  if (p.stride_height < 1 || p.stride_width < 1 || p.dilation_height < 1 || p.dilation_width < 1)
    return "strides and dilations are at least 1";
  if (p.data_type < GLIP_DEFORM_F32 || p.data_type > GLIP_DEFORM_BF16) return "data is fp32, fp16 or bf16";
  if (p.position_type != GLIP_DEFORM_F32 && p.position_type != p.data_type)
    return "offset and mask are fp32 or have the data's type";
  if ((p.x_layout | p.y_layout) & ~1) return "layouts are NCHW or NHWC";
  if (p.x_layout == GLIP_DEFORM_NHWC && p.in_channels % kVector) return "NHWC input has a multiple of 8 channels";
  if (p.num_levels < 1 || p.num_levels > GLIP_DEFORM_MAX_LEVELS) return "there are 1 to 8 levels";
  for (int i = 0; i < p.num_levels; ++i) {
    const GlipDeformLevel& level = p.levels[i];
    if (level.height < 1 || level.width < 1 || level.out_height < 1 || level.out_width < 1)
      return "sizes of a level are at least 1";
    // Kernels count pixels of a batch, and elements of an image, in 32 bits.
    const double image = double(level.height) * level.width * round_up(p.in_channels, kVector);
    if (image >= 2147483648.0 || double(p.batch) * level.out_height * level.out_width >= 2147480000.0)
      return "a level has fewer than 2^31 elements";
  }
  return nullptr;
}

inline std::size_t packed_weight_elements(const GlipDeformProblem& p) {
  return std::size_t(p.kernel_height) * p.kernel_width * round_up(p.in_channels, kChannelStep) *
         round_up(p.out_channels, kOutputStep);
}

// Elements of one level of x, channels last, its images contiguous; rounded up to a multiple of 128.
inline std::size_t transposed_elements(const GlipDeformProblem& p, const GlipDeformLevel& level) {
  const std::size_t elements =
      std::size_t(p.batch) * level.height * level.width * round_up(p.in_channels, kVector);
  return (elements + 127) / 128 * 128;
}

inline std::size_t workspace_bytes(const GlipDeformProblem& p) {
  std::size_t elements = 0;
  if (p.x_layout == GLIP_DEFORM_NCHW)
    for (int i = 0; i < p.num_levels; ++i) elements += transposed_elements(p, p.levels[i]);
  return elements * element_size(p.data_type);
}

// Returns a level with the batch strides that were left at 0; the stride of x is that of the caller's layout.
inline GlipDeformLevel with_strides(const GlipDeformProblem& p, GlipDeformLevel level) {
  const long long in = static_cast<long long>(level.height) * level.width;
  const long long out = static_cast<long long>(level.out_height) * level.out_width;
  const int taps = p.kernel_height * p.kernel_width;
  if (!level.x_batch_stride) level.x_batch_stride = in * p.in_channels;
  if (!level.offset_batch_stride) level.offset_batch_stride = out * 2 * taps;
  if (!level.mask_batch_stride) level.mask_batch_stride = out * taps;
  if (!level.y_batch_stride) level.y_batch_stride = out * p.out_channels;
  return level;
}

// Returns the launch of a valid problem in tiles of `tile_pixels`. For NCHW problems, x is expected in `workspace`.
inline Launch make_launch(const GlipDeformProblem& p, int tile_pixels, void* workspace) {
  Launch launch{};
  launch.weight = p.weight;
  launch.bias = p.bias;
  launch.num_levels = p.num_levels;
  launch.batch = p.batch;
  launch.in_channels = p.x_layout == GLIP_DEFORM_NCHW ? round_up(p.in_channels, kVector) : p.in_channels;
  launch.out_channels = p.out_channels;
  launch.taps = p.kernel_height * p.kernel_width;
  launch.kernel_width = p.kernel_width;
  launch.stride_height = p.stride_height;
  launch.stride_width = p.stride_width;
  launch.pad_top = p.pad_top;
  launch.pad_left = p.pad_left;
  launch.dilation_height = p.dilation_height;
  launch.dilation_width = p.dilation_width;
  launch.position_type = p.position_type;
  launch.mask_logits = p.mask_logits;
  launch.y_layout = p.y_layout;
  auto* place = static_cast<unsigned char*>(workspace);
  for (int i = 0; i < p.num_levels; ++i) {
    GlipDeformLevel& level = launch.levels[i] = with_strides(p, p.levels[i]);
    if (p.x_layout == GLIP_DEFORM_NCHW) {
      level.x = place;
      level.x_batch_stride = static_cast<long long>(level.height) * level.width * launch.in_channels;
      if (place) place += transposed_elements(p, level) * element_size(p.data_type);
    }
    const int pixels = p.batch * level.out_height * level.out_width;
    launch.first_tile[i + 1] = launch.first_tile[i] + ceil_div(pixels, tile_pixels);
  }
  return launch;
}

// Whether tensor cores of a compute capability (80 for 8.0) multiply a data type; fp32 is never reduced to TF32.
inline bool has_tensor_cores(int data_type, int capability) {
  return data_type == GLIP_DEFORM_F16 ? capability >= 70 : data_type == GLIP_DEFORM_BF16 && capability >= 80;
}

// Bytes of dynamic shared memory of a block; the kernels lay it out by the same numbers.
inline int shared_bytes(const TileShape& tile, int data_type, int capability) {
  const int table = GLIP_DEFORM_MAX_TAPS * tile.pixels * 24;
  const int size = element_size(data_type);
  const int by_pixel = tile.pixels * (tile.channels + 8) * size, by_channel = tile.channels * (tile.pixels + 8) * size;
  int finish = by_pixel > by_channel ? by_pixel : by_channel;
  int work = 2 * tile.depth * (tile.pixels + 4) * 4 + 2 * tile.depth * tile.channels * 4;
  if (has_tensor_cores(data_type, capability)) {
    work = 2 * tile.pixels * (tile.depth + 8) * 2 + weight_stages(capability) * tile.depth * (tile.channels + 8) * 2;
    finish += tile.threads / 32 * 1024;  // opaque fragments (7.0) are written through a patch of each warp
  }
  return table + work > finish ? table + work : finish;
}

// Returns the tile with the least estimated time: the number of rounds in which the multiprocessors, one block each,
// compute all blocks, times the cost of a block.
inline const TileShape& choose_tile(const GlipDeformProblem& p, int capability, int processors) {
  if (!has_tensor_cores(p.data_type, capability)) return kScalarTile;
  const TileShape* best = nullptr;
  double best_cost = 0;
  for (const TileShape& tile : kTensorTiles) {
    // Before 8.0 there are no asynchronous copies, without which the wide tile has too few registers.
    if (capability < 80 && tile.pixels > 64) continue;
    const long long blocks =
        static_cast<long long>(make_launch(p, tile.pixels, nullptr).first_tile[p.num_levels]) *
        ceil_div(p.out_channels, tile.channels);
    const double rounds = static_cast<double>((blocks + processors - 1) / processors);
    const double cost = rounds * tile.pixels * tile.channels / tile.efficiency;
    if (!best || cost < best_cost) best = &tile, best_cost = cost;
  }
  return *best;
}

}  // namespace glip
