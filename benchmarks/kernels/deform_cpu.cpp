// A trial: modulated deformable convolution in fp32 for processors with AVX2 and FMA, for deform_cpu.py. What it showed is in
// docs/internals/deformable-convolution.md. A tile of locations is sampled tap by tap into a matrix (locations x channels),
// which stays in the second-level cache and is multiplied there by the weights of the tap; the tile of results, bias included,
// is written to the planes once, at the end.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

/// One convolution of one picture; sizes in elements. deform_cpu.py has the same.
struct DeformShape {
  std::size_t channels, height, width;         // of what is read
  std::size_t outputs, out_height, out_width;  // of what is written
  std::size_t kernel_height, kernel_width;
  std::size_t stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left;
  std::size_t offset_groups;  // divides the channels

  std::size_t taps() const { return kernel_height * kernel_width; }
};

namespace {

constexpr std::size_t kPanel = 16;  // outputs of one step of the product
constexpr std::size_t kRows = 6;    // locations of one step of the product: 12 of 16 registers hold its sums
constexpr std::size_t kTileHeight = 12, kTileWidth = 16;
constexpr std::size_t kAlignment = 64;

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(kAlignment)); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer buffer(std::size_t size) {
  Buffer memory(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(kAlignment))));
  std::memset(memory.get(), 0, size * sizeof(float));  // rows beyond a tile are multiplied too
  return memory;
}

// The compiler keeps the sums in registers only if they are variables, not elements of an array.
#define GLIP_EACH_ROW(apply) apply(0) apply(1) apply(2) apply(3) apply(4) apply(5)
#define GLIP_BEGIN(r) \
  __m256 low##r = _mm256_loadu_ps(from + (first ? 0 : r * step)), high##r = _mm256_loadu_ps(from + (first ? 0 : r * step) + 8);
#define GLIP_STEP(r)                                                                                    \
  {                                                                                                     \
    const __m256 value = _mm256_broadcast_ss((r < 3 ? a + r * channels : a3 + (r - 3) * channels) + k); \
    low##r = _mm256_fmadd_ps(value, left, low##r);                                                      \
    high##r = _mm256_fmadd_ps(value, right, high##r);                                                   \
  }
#define GLIP_END(r)                          \
  _mm256_storeu_ps(sums + r * step, low##r); \
  _mm256_storeu_ps(sums + r * step + 8, high##r);
#define GLIP_CHANNEL(offset)                                                                          \
  {                                                                                                   \
    constexpr std::size_t k = offset;                                                                 \
    const __m256 left = _mm256_loadu_ps(b + k * kPanel), right = _mm256_loadu_ps(b + k * kPanel + 8); \
    GLIP_EACH_ROW(GLIP_STEP)                                                                          \
  }

/// sums (6, 16), rows `step` apart, += a (6, channels) b (channels, 16); the first time sums start at `bias` (16).
__attribute__((noinline)) void multiply(const float* a, const float* b, std::size_t channels, float* sums, std::size_t step,
                                        const float* bias) {
  const bool first = bias != nullptr;
  const float* const from = first ? bias : sums;
  GLIP_EACH_ROW(GLIP_BEGIN)
  const float* a3 = a + 3 * channels;
  std::size_t left_over = channels;
  for (; left_over >= 4; left_over -= 4, a += 4, a3 += 4, b += 4 * kPanel) {
    GLIP_CHANNEL(0) GLIP_CHANNEL(1) GLIP_CHANNEL(2) GLIP_CHANNEL(3)
  }
  for (; left_over > 0; --left_over, ++a, ++a3, b += kPanel) {
    GLIP_CHANNEL(0)
  }
  GLIP_EACH_ROW(GLIP_END)
}

/// A corner of a sample: where its channels begin, and how much of them is taken.
struct Corner {
  const float* from;
  float weight;
};

/// Add up four corners, channel by channel.
inline void blend(const Corner (&corners)[4], std::size_t channels, float* to) {
  const __m256 w0 = _mm256_set1_ps(corners[0].weight), w1 = _mm256_set1_ps(corners[1].weight),
               w2 = _mm256_set1_ps(corners[2].weight), w3 = _mm256_set1_ps(corners[3].weight);
  const float *p0 = corners[0].from, *p1 = corners[1].from, *p2 = corners[2].from, *p3 = corners[3].from;
  std::size_t k = 0;
  for (; k + 8 <= channels; k += 8) {
    __m256 sum = _mm256_mul_ps(w0, _mm256_loadu_ps(p0 + k));
    sum = _mm256_fmadd_ps(w1, _mm256_loadu_ps(p1 + k), sum);
    sum = _mm256_fmadd_ps(w2, _mm256_loadu_ps(p2 + k), sum);
    sum = _mm256_fmadd_ps(w3, _mm256_loadu_ps(p3 + k), sum);
    _mm256_storeu_ps(to + k, sum);
  }
  for (; k < channels; ++k) {
    to[k] = corners[0].weight * p0[k] + corners[1].weight * p1[k] + corners[2].weight * p2[k] + corners[3].weight * p3[k];
  }
}

/// The locations of a tile: rows [top, bottom) and columns [left, right).
struct Tile {
  std::size_t top, bottom, left, right;
  std::size_t size() const { return (bottom - top) * (right - left); }
};

class Convolution {
 public:
  Convolution(const DeformShape& shape, const float* x, const float* offsets, const float* mask, const float* packed,
              const float* bias, float* out)
      : s_(shape),
        x_(x),
        offsets_(offsets),
        mask_(mask),
        packed_(packed),
        bias_(bias),
        out_(out),
        panels_((shape.outputs + kPanel - 1) / kPanel),
        plane_(shape.out_height * shape.out_width) {}

  void run(const Tile& tile, float* samples, float* sums) const {
    for (std::size_t tap = 0; tap < s_.taps(); ++tap) {
      sample(tile, tap, samples);
      const float* b = packed_ + tap * panels_ * kPanel * s_.channels;
      for (std::size_t panel = 0; panel < panels_; ++panel, b += kPanel * s_.channels) {
        for (std::size_t row = 0; row < tile.size(); row += kRows) {
          multiply(samples + row * s_.channels, b, s_.channels, sums + row * panels_ * kPanel + panel * kPanel,
                   panels_ * kPanel, tap == 0 ? bias_ + panel * kPanel : nullptr);
        }
      }
    }
    write(tile, sums);
  }

  std::size_t panels() const { return panels_; }

 private:
  /// Sample one tap at every location of a tile: (locations, channels).
  void sample(const Tile& tile, std::size_t tap, float* to) const {
    const std::size_t channels = s_.channels / s_.offset_groups;
    const auto dy = static_cast<float>(static_cast<std::ptrdiff_t>(tap / s_.kernel_width * s_.dilation_y) -
                                       static_cast<std::ptrdiff_t>(s_.pad_top));
    const auto dx = static_cast<float>(static_cast<std::ptrdiff_t>(tap % s_.kernel_width * s_.dilation_x) -
                                       static_cast<std::ptrdiff_t>(s_.pad_left));
    for (std::size_t y = tile.top; y < tile.bottom; ++y) {
      for (std::size_t x = tile.left; x < tile.right; ++x) {
        const std::size_t at = y * s_.out_width + x;
        for (std::size_t group = 0; group < s_.offset_groups; ++group, to += channels) {
          const std::size_t first = group * s_.taps() + tap;
          const float py = static_cast<float>(y * s_.stride_y) + dy + offsets_[2 * first * plane_ + at];
          const float px = static_cast<float>(x * s_.stride_x) + dx + offsets_[(2 * first + 1) * plane_ + at];
          const float scale = mask_ == nullptr ? 1.0F : mask_[first * plane_ + at];
          sample_one(py, px, scale, group * channels, channels, to);
        }
      }
    }
  }

  void sample_one(float y, float x, float scale, std::size_t channel, std::size_t channels, float* to) const {
    const auto height = static_cast<std::ptrdiff_t>(s_.height), width = static_cast<std::ptrdiff_t>(s_.width);
    // Not a number, too, is outside.
    if (!(y > -1 && x > -1 && y < static_cast<float>(height) && x < static_cast<float>(width))) {
      std::memset(to, 0, channels * sizeof(float));
      return;
    }
    const float floor_y = std::floor(y), floor_x = std::floor(x), ly = y - floor_y, lx = x - floor_x;
    const auto iy = static_cast<std::ptrdiff_t>(floor_y), ix = static_cast<std::ptrdiff_t>(floor_x);
    Corner corners[4];
    for (int i = 0; i < 4; ++i) {
      const std::ptrdiff_t cy = iy + i / 2, cx = ix + i % 2;
      const bool inside = cy >= 0 && cx >= 0 && cy < height && cx < width;
      const float weight = (i / 2 != 0 ? ly : 1 - ly) * (i % 2 != 0 ? lx : 1 - lx) * scale;
      const std::ptrdiff_t safe_y = std::clamp<std::ptrdiff_t>(cy, 0, height - 1),
                           safe_x = std::clamp<std::ptrdiff_t>(cx, 0, width - 1);
      corners[i] = {x_ + static_cast<std::size_t>(safe_y * width + safe_x) * s_.channels + channel, inside ? weight : 0.0F};
    }
    blend(corners, channels, to);
  }

  /// Write a tile of results (locations, outputs) to the planes of the outputs.
  void write(const Tile& tile, const float* sums) const {
    const std::size_t step = panels_ * kPanel, columns = tile.right - tile.left;
    for (std::size_t y = tile.top; y < tile.bottom; ++y, sums += columns * step) {
      float* const to = out_ + y * s_.out_width + tile.left;
      for (std::size_t output = 0; output < s_.outputs; output += 8) {
        for (std::size_t x = 0; x < columns; x += 8) {
          transpose(sums + x * step + output, step, to + output * plane_ + x, std::min<std::size_t>(8, columns - x),
                    std::min<std::size_t>(8, s_.outputs - output));
        }
      }
    }
  }

  /// Write up to eight locations, `step` apart, of up to eight outputs to as many planes. Eight of each are read.
  void transpose(const float* from, std::size_t step, float* to, std::size_t locations, std::size_t outputs) const {
    __m256 row[8], pair[8], quad[8], plane[8];
    for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + static_cast<std::size_t>(i) * step);
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
      pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
      quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
    for (int i = 0; i < 4; ++i) {
      plane[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
      plane[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
    if (locations == 8 && outputs == 8) {
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + static_cast<std::size_t>(i) * plane_, plane[i]);
      return;
    }
    alignas(32) float values[8];
    for (std::size_t i = 0; i < outputs; ++i) {
      _mm256_store_ps(values, plane[i]);
      std::copy_n(values, locations, to + i * plane_);
    }
  }

  const DeformShape& s_;
  const float *x_, *offsets_, *mask_, *packed_, *bias_;
  float* out_;
  std::size_t panels_, plane_;
};

std::size_t parts(std::size_t length, std::size_t most) { return (length + most - 1) / most; }

}  // namespace

extern "C" {

/// Floats of packed weights: outputs are filled up to whole panels.
std::size_t deform_packed_size(const DeformShape* shape) {
  return shape->taps() * parts(shape->outputs, kPanel) * kPanel * shape->channels;
}

/// Arrange weights (outputs, channels, taps) as they are read: tap, panel, channel, output within the panel. `out` is zero.
void deform_pack(const DeformShape* shape, const float* weights, float* out) {
  const std::size_t channels = shape->channels, taps = shape->taps(), panels = parts(shape->outputs, kPanel);
  for (std::size_t output = 0; output < shape->outputs; ++output) {
    for (std::size_t channel = 0; channel < channels; ++channel) {
      for (std::size_t tap = 0; tap < taps; ++tap) {
        const std::size_t panel = tap * panels + output / kPanel;
        out[(panel * channels + channel) * kPanel + output % kPanel] = weights[(output * channels + channel) * taps + tap];
      }
    }
  }
}

/// Compute one picture.
///
/// @param x (height, width, channels).
/// @param offsets (offset groups, taps, 2, out_height, out_width): y, then x.
/// @param mask (offset groups, taps, out_height, out_width), or null for ones.
/// @param packed of `deform_pack`.
/// @param bias (outputs), filled up to whole panels.
/// @param out (outputs, out_height, out_width).
void deform(const DeformShape* given, const float* x, const float* offsets, const float* mask, const float* packed,
            const float* bias, float* out, std::size_t threads) {
  const DeformShape& shape = *given;
  const Convolution convolution(shape, x, offsets, mask, packed, bias, out);
  // Small maps are divided further where there are more threads than tiles. Three rows of a tile are whole steps.
  const std::size_t columns = parts(shape.out_width, kTileWidth);
  std::size_t height = kTileHeight;
  while (height > 3 && parts(shape.out_height, height) * columns < 2 * threads) height -= 3;
  const std::size_t tiles = parts(shape.out_height, height) * columns, most = parts(height * kTileWidth + 7, kRows) * kRows;
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    const Buffer memory = buffer(most * (shape.channels + convolution.panels() * kPanel));
    for (std::size_t index; (index = next++) < tiles;) {
      const std::size_t top = index / columns * height, left = index % columns * kTileWidth;
      const Tile tile{top, std::min(top + height, shape.out_height), left, std::min(left + kTileWidth, shape.out_width)};
      convolution.run(tile, memory.get(), memory.get() + most * shape.channels);
    }
  };
  std::vector<std::thread> others;
  for (std::size_t i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // extern "C"
