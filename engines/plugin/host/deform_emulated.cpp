// The source of the CUDA kernels on a CPU, thread by thread, for tests. Compiled once for each GLIP_DEFORM_EMULATED:
// 600, 610, 700, 750 and 800 stand for the compute capabilities whose code differs.
#include "../deform_kernel.cuh"
#include "../deform_plan.h"

namespace {

using glip::emulation::Block;

constexpr int kGuard = 4096;  // bytes after a block's shared memory that must not be written
constexpr unsigned char kFill = 0xff;  // not a number in every data type

template <class T>
void run_preparation(Block& block, const GlipDeformProblem& p, const void* weight, void* packed, void* workspace) {
  const long long elements = static_cast<long long>(glip::packed_weight_elements(p));
  for (long long at = 0; at < elements; ++at)
    glip::pack_weight(static_cast<const T*>(weight), static_cast<T*>(packed), p.kernel_height * p.kernel_width,
                      p.in_channels, p.out_channels, at);
  if (p.x_layout == GLIP_DEFORM_NHWC) return;
  const glip::Launch launch = glip::make_launch(p, 1, workspace);
  std::vector<T> patch(32 * 33);
  for (int i = 0; i < p.num_levels; ++i) {
    const GlipDeformLevel from = glip::with_strides(p, p.levels[i]);
    const int pixels = from.height * from.width;
    for (int image = 0; image < p.batch; ++image)
      for (int x = 0; x < pixels; x += 32)
        for (int y = 0; y < launch.in_channels; y += 32)
          block.run(256, [&](int thread) {
            glip::transpose_patch(static_cast<const T*>(from.x) + image * from.x_batch_stride,
                                  static_cast<T*>(const_cast<void*>(launch.levels[i].x)) +
                                      image * launch.levels[i].x_batch_stride,
                                  pixels, p.in_channels, launch.in_channels, x, y, patch.data(), thread);
          });
  }
}

// Returns whether every block stayed within its shared memory.
template <class Kernel, class T>
bool run_kernel(Block& block, GlipDeformProblem p, const void* weight, const glip::TileShape& tile) {
  std::vector<glip::uint4> packed(glip::packed_weight_elements(p) * sizeof(T) / 16);
  std::vector<glip::uint4> workspace(glip::workspace_bytes(p) / 16 + 1);
  run_preparation<T>(block, p, weight, packed.data(), workspace.data());
  p.weight = packed.data();
  const glip::Launch launch = glip::make_launch(p, tile.pixels, workspace.data());
  const int bytes = glip::shared_bytes(tile, p.data_type, GLIP_DEFORM_EMULATED / 10);
  std::vector<glip::uint4> memory((bytes + kGuard) / 16);
  auto* shared = reinterpret_cast<unsigned char*>(memory.data());
  for (int y = 0; y < glip::ceil_div(p.out_channels, tile.channels); ++y)
    for (int x = 0; x < launch.first_tile[p.num_levels]; ++x) {
      std::memset(shared, kFill, memory.size() * 16);
      block.run(tile.threads, [&](int thread) { Kernel::run(launch, shared, thread, x, y); });
      for (int i = bytes; i < bytes + kGuard; ++i)
        if (shared[i] != kFill) return false;
    }
  return true;
}

template <class T>
bool run_tensor(Block& block, const GlipDeformProblem& p, const void* weight, int index) {
  const glip::TileShape& tile = glip::kTensorTiles[index];
  if (index == 0) return run_kernel<glip::WideBlock<T>, T>(block, p, weight, tile);
  if (index == 1) return run_kernel<glip::MediumBlock<T>, T>(block, p, weight, tile);
  return run_kernel<glip::SmallBlock<T>, T>(block, p, weight, tile);
}

}  // namespace

// What glip_deform_pack_weights and glip_deform_launch do together. `tile` is 0 to 2 (wide, medium, small) for tensor
// cores and has no effect otherwise. Returns 0, -1 for an invalid problem, or -2 if a block left its shared memory.
extern "C" GLIP_DEFORM_API int glip_deform_emulate(const GlipDeformProblem* problem, const void* weight, int tile,
                                                   int backwards, int eager_copies) {
  const GlipDeformProblem& p = *problem;
  if (glip::problem_error(p) || tile < 0 || tile > 2) return -1;
  Block block;
  block.direction = backwards ? -1 : 1;
  block.eager_copies = eager_copies;
  bool kept;
  if (p.data_type == GLIP_DEFORM_F32) {
    kept = run_kernel<glip::ScalarBlock<float, false>, float>(block, p, weight, glip::kScalarTile);
  } else if (p.data_type == GLIP_DEFORM_F16) {
#if GLIP_ARCH >= 700
    kept = run_tensor<glip::Half>(block, p, weight, tile);
#else
    using Kernel = glip::ScalarBlock<glip::Half, glip::kPairsOfHalf>;
    kept = run_kernel<Kernel, glip::Half>(block, p, weight, glip::kScalarTile);
#endif
  } else {
#if GLIP_ARCH >= 800
    kept = run_tensor<glip::Bfloat>(block, p, weight, tile);
#else
    kept = run_kernel<glip::ScalarBlock<glip::Bfloat, false>, glip::Bfloat>(block, p, weight, glip::kScalarTile);
#endif
  }
  return kept ? 0 : -2;
}
