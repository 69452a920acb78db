// The deformable convolution in plain C++ and fp32, with the index and blending arithmetic of the kernels.
//
// For tests, not for speed. Buffers are in host memory; the interface is that of the CUDA library under other names.
#include <vector>

#include "../deform_plan.h"

namespace {

float read_float(const void* buffer, long long index) { return static_cast<const float*>(buffer)[index]; }

// One output pixel of one level.
void convolve(const glip::Launch& launch, const GlipDeformLevel& level, const glip::OutPixel& pixel, bool x_last,
              float* sums) {
  const int padded_in = glip::round_up(launch.in_channels, glip::kChannelStep);
  const int padded_out = glip::round_up(launch.out_channels, glip::kOutputStep);
  const auto* x = static_cast<const float*>(level.x) + pixel.image * level.x_batch_stride;
  const long long x_pixel = x_last ? launch.in_channels : 1;
  const long long x_channel = x_last ? 1 : static_cast<long long>(level.height) * level.width;
  const auto* bias = static_cast<const float*>(launch.bias);
  for (int n = 0; n < launch.out_channels; ++n) sums[n] = bias ? bias[n] : 0.0f;
  for (int tap = 0; tap < launch.taps; ++tap) {
    const glip::Corners corners = glip::tap_corners(launch, level, pixel, tap, read_float);
    for (int c = 0; c < launch.in_channels; ++c) {
      float value = 0.0f;
      for (int k = 0; k < 4; ++k) {
        const int at = corners.first + (k & 1) * corners.right + (k >> 1) * corners.down * level.width;
        value += x[at * x_pixel + c * x_channel] * corners.weight[k];
      }
      const auto* row = static_cast<const float*>(launch.weight) +
                        glip::packed_weight_index(tap, c, padded_in, padded_out);
      for (int n = 0; n < launch.out_channels; ++n) sums[n] += row[n] * value;
    }
  }
}

}  // namespace

extern "C" {

GLIP_DEFORM_API const char* glip_deform_host_problem_error(const GlipDeformProblem* problem) {
  return glip::problem_error(*problem);
}

GLIP_DEFORM_API unsigned long long glip_deform_host_packed_weight_bytes(const GlipDeformProblem* problem) {
  return glip::packed_weight_elements(*problem) * sizeof(float);
}

GLIP_DEFORM_API void glip_deform_host_pack_weights(const GlipDeformProblem* problem, const float* weight,
                                                   float* packed) {
  const GlipDeformProblem& p = *problem;
  const int taps = p.kernel_height * p.kernel_width;
  const int padded_in = glip::round_up(p.in_channels, glip::kChannelStep);
  const int padded_out = glip::round_up(p.out_channels, glip::kOutputStep);
  for (int tap = 0; tap < taps; ++tap)
    for (int c = 0; c < padded_in; ++c)
      for (int n = 0; n < padded_out; ++n) {
        const bool inside = c < p.in_channels && n < p.out_channels;
        const float value = inside ? weight[(static_cast<long long>(n) * p.in_channels + c) * taps + tap] : 0.0f;
        packed[glip::packed_weight_index(tap, c, padded_in, padded_out) + n] = value;
      }
}

// Computes tile by tile, `tile_pixels` each, as the blocks of the CUDA kernels do.
// Returns 0, or -1 for a problem that glip_deform_host_problem_error explains, or that is not fp32.
GLIP_DEFORM_API int glip_deform_host_run(const GlipDeformProblem* problem, int tile_pixels) {
  const GlipDeformProblem& p = *problem;
  if (glip::problem_error(p) || p.data_type != GLIP_DEFORM_F32 || tile_pixels < 1) return -1;
  glip::Launch launch = glip::make_launch(p, tile_pixels, nullptr);
  launch.in_channels = p.in_channels;  // x is read in place, whatever its layout
  for (int i = 0; i < p.num_levels; ++i) {
    launch.levels[i].x = p.levels[i].x;
    launch.levels[i].x_batch_stride = glip::with_strides(p, p.levels[i]).x_batch_stride;
  }
  std::vector<float> sums(p.out_channels);
  for (int tile = 0; tile < launch.first_tile[p.num_levels]; ++tile) {
    const int index = glip::level_of(launch, tile);
    const GlipDeformLevel& level = launch.levels[index];
    const int out = level.out_height * level.out_width, pixels = p.batch * out;
    const int first = (tile - launch.first_tile[index]) * tile_pixels;
    for (int i = first; i < first + tile_pixels && i < pixels; ++i) {
      const glip::OutPixel pixel = glip::out_pixel(level, i);
      convolve(launch, level, pixel, p.x_layout == GLIP_DEFORM_NHWC, sums.data());
      auto* y = static_cast<float*>(level.y) + pixel.image * level.y_batch_stride;
      for (int n = 0; n < p.out_channels; ++n)
        (p.y_layout == GLIP_DEFORM_NHWC ? y[static_cast<long long>(pixel.index) * p.out_channels + n]
                                        : y[static_cast<long long>(n) * out + pixel.index]) = sums[n];
    }
  }
  return 0;
}

// Returns the name of the tile that the CUDA library would choose; writes its pixels, channels, threads and bytes of
// shared memory.
GLIP_DEFORM_API const char* glip_deform_host_tile(const GlipDeformProblem* problem, int capability, int processors,
                                                  int sizes[4]) {
  const glip::TileShape& tile = glip::choose_tile(*problem, capability, processors);
  sizes[0] = tile.pixels;
  sizes[1] = tile.channels;
  sizes[2] = tile.threads;
  sizes[3] = glip::shared_bytes(tile, problem->data_type, capability);
  return tile.suffix;
}

// Writes the argument of a kernel, which a caller that launches cubins itself passes by value, and returns its size.
GLIP_DEFORM_API int glip_deform_host_launch_argument(const GlipDeformProblem* problem, int tile_pixels,
                                                     void* workspace, void* argument) {
  if (argument) *static_cast<glip::Launch*>(argument) = glip::make_launch(*problem, tile_pixels, workspace);
  return static_cast<int>(sizeof(glip::Launch));
}
}
