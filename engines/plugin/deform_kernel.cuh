// Modulated deformable convolution as one implicit matrix product: outputs (pixels x channels) = samples (pixels x
// taps and input channels) times packed weights. The samples are never written to global memory: a block blends a slice
// of them into shared memory while it multiplies the slice before.
//
// A step is `depth` input channels of one tap. Steps go through all taps before the next channels: the taps of a pixel
// overlap, so that the features a block reads are few enough to stay in the L1 cache.
//
// Compiles under nvcc and NVRTC, for 6.0 and up, and on a CPU under host/emulate.h.
#pragma once

#include "deform_math.h"
#if defined(GLIP_DEFORM_EMULATED)
#include "host/emulate.h"
#else
#include "deform_ptx.cuh"
#endif

namespace glip {

// 6.0 multiplies fp16 in pairs at twice the rate of fp32; 6.1 has the instruction too, at a sixty-fourth.
constexpr bool kPairsOfHalf = GLIP_ARCH == 600;
constexpr bool kTensorHalf = GLIP_ARCH >= 700;
constexpr bool kTensorBfloat = GLIP_ARCH >= 800;
constexpr int kStages = weight_stages(GLIP_ARCH / 10);

struct ReadPosition {
  int type;
  GLIP_DEVICE float operator()(const void* buffer, long long index) const {
    if (type == GLIP_DEFORM_F32) return static_cast<const float*>(buffer)[index];
    if (type == GLIP_DEFORM_F16) return widen(static_cast<const Half*>(buffer)[index]);
    return widen(static_cast<const Bfloat*>(buffer)[index]);
  }
};

template <int kPixels_, int kChannels_, int kDepth_, int kThreads_>
struct Shape {
  static constexpr int kPixels = kPixels_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kThreads = kThreads_;
};

// Where a block's pixels lie.
struct Place {
  const GlipDeformLevel* level;
  int first;   // pixel, numbered through the level's batch
  int pixels;  // in the level's batch
};

GLIP_DEVICE Place find_place(const Launch& launch, int tile, int tile_pixels) {
  const int index = level_of(launch, tile);
  Place place;
  place.level = &launch.levels[index];
  place.first = (tile - launch.first_tile[index]) * tile_pixels;
  place.pixels = launch.batch * place.level->out_height * place.level->out_width;
  return place;
}

// The corners of every tap of a block's pixels, computed once. Ordered by tap, so that neighboring threads read
// neighboring offsets.
template <int kPixels>
struct Table {
  float4* weights;
  int2* places;  // x: the top left corner's element in its image; y: bit 0, right corners differ, bit 1, lower ones

  static constexpr int kBytes = GLIP_DEFORM_MAX_TAPS * kPixels * 24;

  GLIP_DEVICE explicit Table(unsigned char* memory)
      : weights(reinterpret_cast<float4*>(memory)),
        places(reinterpret_cast<int2*>(memory + GLIP_DEFORM_MAX_TAPS * kPixels * 16)) {}

  GLIP_DEVICE void fill(const Launch& launch, const Place& place, int thread, int threads) {
    const ReadPosition read{launch.position_type};
    for (int i = thread; i < launch.taps * kPixels; i += threads) {
      const int tap = i / kPixels, row = i - tap * kPixels;
      Corners corners = {{0.0f, 0.0f, 0.0f, 0.0f}, 0, 0, 0};
      if (place.first + row < place.pixels)
        corners = tap_corners(launch, *place.level, out_pixel(*place.level, place.first + row), tap, read);
      weights[i] = float4{corners.weight[0], corners.weight[1], corners.weight[2], corners.weight[3]};
      places[i] = int2{corners.first * launch.in_channels, corners.right | corners.down << 1};
    }
  }
};

// Step by step: all taps of the first channels, then of the next.
struct Step {
  int tap = 0;
  int channel = 0;
  GLIP_DEVICE void advance(int taps, int depth) {
    if (++tap == taps) tap = 0, channel += depth;
  }
};

// -- samples --------------------------------------------------------------------------------------------------------

// Eight channels of one pixel, as they lie in memory.
template <class T>
struct Vector {
  static constexpr int kWords = sizeof(T) * kVector / 16;
  uint4 words[kWords];

  GLIP_DEVICE void clear() {
    for (int i = 0; i < kWords; ++i) words[i] = uint4{0u, 0u, 0u, 0u};
  }
  GLIP_DEVICE void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load16(reinterpret_cast<const uint4*>(from) + i);
  }
  // sums += weight * values
  GLIP_DEVICE void add_to(float (&sums)[kVector], float weight) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned parts[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 4) {
          sums[4 * i + k] += weight * as_float(parts[k]);
        } else {
          sums[2 * k] += weight * low_half<T>(parts[k]);
          sums[2 * k + 1] += weight * high_half<T>(parts[k]);
        }
      }
    }
  }
};

// A thread's share of a step's samples. `load` starts reading the corners early; `blend` uses them a step later.
template <class T, class Shape>
struct Sampler {
  static constexpr int kGroups = Shape::kDepth / kVector;
  static constexpr int kCount = Shape::kPixels * kGroups / Shape::kThreads;
  static_assert(kCount * Shape::kThreads == Shape::kPixels * kGroups, "threads share the samples evenly");

  Vector<T> corners[kCount][4];
  int image[kCount];  // of the pixels this thread samples

  GLIP_DEVICE static int pixel(int thread, int i) { return (thread + i * Shape::kThreads) / kGroups; }
  GLIP_DEVICE static int group(int thread, int i) { return (thread + i * Shape::kThreads) % kGroups; }

  GLIP_DEVICE Sampler(const Place& place, int thread) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = place.first + pixel(thread, i);
      image[i] = at < place.pixels ? out_pixel(*place.level, at).image : 0;
    }
  }

  GLIP_DEVICE void load(const Launch& launch, const Place& place, const Table<Shape::kPixels>& table, Step step,
                        int thread) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int channel = step.channel + group(thread, i) * kVector;
      if (channel < launch.in_channels) {
        const int2 at = table.places[step.tap * Shape::kPixels + pixel(thread, i)];
        const int right = at.y & 1 ? launch.in_channels : 0;
        const int down = at.y & 2 ? launch.in_channels * place.level->width : 0;
        const T* first = static_cast<const T*>(place.level->x) + image[i] * place.level->x_batch_stride;
        first += at.x + channel;
        corners[i][0].load(first);
        corners[i][1].load(first + right);
        corners[i][2].load(first + down);
        corners[i][3].load(first + down + right);
      } else {  // past the last channel: weights are zero there, but zero times infinity would not be
#pragma unroll
        for (int k = 0; k < 4; ++k) corners[i][k].clear();
      }
    }
  }

  // Calls store(pixel, first channel of the step, eight samples).
  template <class Store>
  GLIP_DEVICE void blend(const Table<Shape::kPixels>& table, int tap, int thread, Store store) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 weights = table.weights[tap * Shape::kPixels + pixel(thread, i)];
      float sums[kVector] = {};
      corners[i][0].add_to(sums, weights.x);
      corners[i][1].add_to(sums, weights.y);
      corners[i][2].add_to(sums, weights.z);
      corners[i][3].add_to(sums, weights.w);
      store(pixel(thread, i), group(thread, i) * kVector, sums);
    }
  }
};

// -- results --------------------------------------------------------------------------------------------------------

// A block's outputs in shared memory, laid out so that they can be written in the order of the result's layout.
template <class T, class Shape>
struct Results {
  static constexpr int kByPixel = Shape::kChannels + 8, kByChannel = Shape::kPixels + 8;
  static constexpr int kBytes = (Shape::kPixels * kByPixel > Shape::kChannels * kByChannel
                                     ? Shape::kPixels * kByPixel
                                     : Shape::kChannels * kByChannel) *
                                static_cast<int>(sizeof(T));

  T* memory;
  bool channels_last;
  const Launch& launch;
  int first_channel;

  GLIP_DEVICE Results(unsigned char* memory, const Launch& launch, int first_channel)
      : memory(reinterpret_cast<T*>(memory)),
        channels_last(launch.y_layout == GLIP_DEFORM_NHWC),
        launch(launch),
        first_channel(first_channel) {}

  GLIP_DEVICE void put(int pixel, int channel, float sum) {
    const int n = first_channel + channel;
    if (launch.bias && n < launch.out_channels) sum += widen(static_cast<const T*>(launch.bias)[n]);
    memory[channels_last ? pixel * kByPixel + channel : channel * kByChannel + pixel] = narrow<T>(sum);
  }

  // Called after all threads have called `put`.
  GLIP_DEVICE void write(const Place& place, int thread) const {
    const GlipDeformLevel& level = *place.level;
    T* y = static_cast<T*>(level.y);
    const bool wide = launch.out_channels % kVector == 0 && level.y_batch_stride % kVector == 0;
    if (channels_last && wide) {
      constexpr int kGroups = Shape::kChannels / kVector;
      for (int i = thread; i < Shape::kPixels * kGroups; i += Shape::kThreads) {
        const int pixel = i / kGroups, channel = (i - pixel * kGroups) * kVector, n = first_channel + channel;
        if (place.first + pixel >= place.pixels || n >= launch.out_channels) continue;
        const OutPixel at = out_pixel(level, place.first + pixel);
        T* to = y + at.image * level.y_batch_stride + static_cast<long long>(at.index) * launch.out_channels + n;
        const auto* from = reinterpret_cast<const uint4*>(memory + pixel * kByPixel + channel);
#pragma unroll
        for (int k = 0; k < Vector<T>::kWords; ++k) reinterpret_cast<uint4*>(to)[k] = from[k];
      }
    } else if (channels_last) {
      for (int i = thread; i < Shape::kPixels * Shape::kChannels; i += Shape::kThreads) {
        const int pixel = i / Shape::kChannels, channel = i - pixel * Shape::kChannels, n = first_channel + channel;
        if (place.first + pixel >= place.pixels || n >= launch.out_channels) continue;
        const OutPixel at = out_pixel(level, place.first + pixel);
        y[at.image * level.y_batch_stride + static_cast<long long>(at.index) * launch.out_channels + n] =
            memory[pixel * kByPixel + channel];
      }
    } else {
      static_assert(Shape::kThreads % Shape::kPixels == 0, "a thread stays with its pixel");
      const int pixel = thread % Shape::kPixels;
      if (place.first + pixel >= place.pixels) return;
      const OutPixel at = out_pixel(level, place.first + pixel);
      const long long plane = static_cast<long long>(level.out_height) * level.out_width;
      T* to = y + at.image * level.y_batch_stride + at.index;
      for (int channel = thread / Shape::kPixels; channel < Shape::kChannels;
           channel += Shape::kThreads / Shape::kPixels) {
        if (first_channel + channel < launch.out_channels)
          to[(first_channel + channel) * plane] = memory[channel * kByChannel + pixel];
      }
    }
  }
};

// -- tensor cores ---------------------------------------------------------------------------------------------------

// A step's weights on their way to shared memory: `begin` starts reading them, `end` is called within the same step.
template <class T, class Shape>
struct WeightCopy {
  static constexpr int kPitch = Shape::kChannels + 8;  // rows 16 bytes apart in banks: no conflicts for ldmatrix
  static constexpr int kGroups = Shape::kChannels / kVector;
  static constexpr int kCount = Shape::kDepth * kGroups / Shape::kThreads;
  static_assert(kCount * Shape::kThreads == Shape::kDepth * kGroups, "threads share the weights evenly");

  const T* weight;
  int padded_in, padded_out, first_channel;
#if GLIP_ARCH < 800
  uint4 held[kCount];
#endif

  GLIP_DEVICE WeightCopy(const Launch& launch, int first_channel)
      : weight(static_cast<const T*>(launch.weight)),
        padded_in(round_up(launch.in_channels, kChannelStep)),
        padded_out(round_up(launch.out_channels, kOutputStep)),
        first_channel(first_channel) {}

  GLIP_DEVICE void begin([[maybe_unused]] T* stage, Step step, bool wanted, int thread) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = thread + i * Shape::kThreads, row = at / kGroups, channel = (at - row * kGroups) * kVector;
      const bool inside = wanted && first_channel + channel < padded_out;
      const T* from = weight;
      if (inside)
        from += packed_weight_index(step.tap, step.channel + row, padded_in, padded_out) + first_channel + channel;
#if GLIP_ARCH >= 800
      copy16_async(stage + row * kPitch + channel, from, inside);
#else
      held[i] = inside ? load16(from) : uint4{0u, 0u, 0u, 0u};
#endif
    }
#if GLIP_ARCH >= 800
    commit_copies();
#endif
  }

  GLIP_DEVICE void end([[maybe_unused]] T* stage, [[maybe_unused]] int thread) {
#if GLIP_ARCH < 800
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = thread + i * Shape::kThreads, row = at / kGroups, channel = (at - row * kGroups) * kVector;
      *reinterpret_cast<uint4*>(stage + row * kPitch + channel) = held[i];
    }
#endif
  }
};

// A warp's part of the outputs, in registers.
template <class T, int kRows, int kColumns>
struct WarpProduct {
#if GLIP_ARCH >= 750
  float sums[kRows / 16][kColumns / 8][4] = {};
#else
  float sums[kRows / 16][kColumns / 16][8] = {};
#endif

  // += a (kRows x depth) times b (depth x kColumns), both row-major in shared memory.
  template <int kDepth>
  GLIP_DEVICE void multiply(const T* a, int a_pitch, const T* b, int b_pitch,
                            [[maybe_unused]] int lane) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
#if GLIP_ARCH >= 750
      unsigned rows[kRows / 16][4], columns[kColumns / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
        load_matrices(rows[i], a + (16 * i + lane % 16) * a_pitch + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j)
        load_matrices_transposed(columns[j], b + (k + lane % 16) * b_pitch + 16 * j + lane / 16 * 8);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) {
          multiply_16x8x16<T>(sums[i][2 * j], rows[i], columns[j][0], columns[j][1]);
          multiply_16x8x16<T>(sums[i][2 * j + 1], rows[i], columns[j][2], columns[j][3]);
        }
#elif GLIP_ARCH >= 700
      unsigned rows[8], columns[kColumns / 16][8];
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) load_b_16x16(columns[j], b + k * b_pitch + 16 * j, b_pitch);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        load_a_16x16(rows, a + 16 * i * a_pitch + k, a_pitch);
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) multiply_16x16x16(sums[i][j], rows, columns[j]);
      }
#endif
    }
  }

  // Calls put(row, column, sum) for every element; `patch` is 16x16 floats of the warp's own where fragments are
  // opaque.
  template <class Put>
  GLIP_DEVICE void for_each([[maybe_unused]] float* patch, int lane, Put put) const {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#if GLIP_ARCH >= 750
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          put(16 * i + lane / 4 + k / 2 * 8, 8 * j + lane % 4 * 2 + k % 2, sums[i][j][k]);
#elif GLIP_ARCH >= 700
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        store_16x16(patch, sums[i][j], 16);
        warp_sync();
        for (int k = lane; k < 256; k += 32) put(16 * i + k / 16, 16 * j + k % 16, patch[k]);
        warp_sync();
      }
#else
      ;
#endif
  }
};

template <class T, class Shape, int kWarpPixels, int kWarpChannels>
struct TensorBlock {
  static constexpr int kWarpColumns = Shape::kChannels / kWarpChannels;
  static_assert(Shape::kPixels / kWarpPixels * kWarpColumns * 32 == Shape::kThreads, "warps cover the outputs");
  static constexpr int kSamplePitch = Shape::kDepth + 8;  // odd in units of 16 bytes: no conflicts for ldmatrix
  static constexpr int kSampleElements = Shape::kPixels * kSamplePitch;
  static constexpr int kWeightElements = Shape::kDepth * WeightCopy<T, Shape>::kPitch;

  GLIP_DEVICE static void run(const Launch& launch, unsigned char* memory, int thread, int tile, int channel_tile) {
    const Place place = find_place(launch, tile, Shape::kPixels);
    const int warp = thread / 32, lane = thread % 32;
    const int warp_pixel = warp / kWarpColumns * kWarpPixels, warp_channel = warp % kWarpColumns * kWarpChannels;
    const int first_channel = channel_tile * Shape::kChannels;
    const int steps = launch.taps * ceil_div(launch.in_channels, Shape::kDepth);

    Table<Shape::kPixels> table(memory);
    T* samples = reinterpret_cast<T*>(memory + Table<Shape::kPixels>::kBytes);  // two slices
    T* weights = samples + 2 * kSampleElements;                                 // kStages slices
    WeightCopy<T, Shape> copy(launch, first_channel);
    Sampler<T, Shape> sampler(place, thread);
    WarpProduct<T, kWarpPixels, kWarpChannels> product;

    Step fetched, sampled;  // the next steps whose weights and samples are asked for
    for (int stage = 0; stage < kStages - 1; ++stage) {
      T* to = weights + stage * kWeightElements;
      copy.begin(to, fetched, stage < steps, thread);
      copy.end(to, thread);
      fetched.advance(launch.taps, Shape::kDepth);
    }
    table.fill(launch, place, thread, Shape::kThreads);
    block_sync();
    sampler.load(launch, place, table, sampled, thread);
    store_samples(sampler, table, sampled, samples, thread);

    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      sampled.advance(launch.taps, Shape::kDepth);
      if (more) sampler.load(launch, place, table, sampled, thread);
#if GLIP_ARCH >= 800
      await_copies<kStages - 2>();
#endif
      // Now this step's samples and weights are complete, and no thread reads those of the step before any longer.
      block_sync();
      const int ahead = step + kStages - 1;
      T* to = weights + ahead % kStages * kWeightElements;
      copy.begin(to, fetched, ahead < steps, thread);
      fetched.advance(launch.taps, Shape::kDepth);
      product.template multiply<Shape::kDepth>(
          samples + step % 2 * kSampleElements + warp_pixel * kSamplePitch, kSamplePitch,
          weights + step % kStages * kWeightElements + warp_channel, WeightCopy<T, Shape>::kPitch, lane);
      copy.end(to, thread);
      if (more) store_samples(sampler, table, sampled, samples + (step + 1) % 2 * kSampleElements, thread);
    }
#if GLIP_ARCH >= 800
    await_copies<0>();
#endif
    block_sync();  // the results overwrite everything else

    Results<T, Shape> results(memory, launch, first_channel);
    auto* patch = reinterpret_cast<float*>(memory + Results<T, Shape>::kBytes) + warp * 256;
    product.for_each(patch, lane, [&](int row, int column, float sum) {
      results.put(warp_pixel + row, warp_channel + column, sum);
    });
    block_sync();
    results.write(place, thread);
  }

  GLIP_DEVICE static void store_samples(const Sampler<T, Shape>& sampler, const Table<Shape::kPixels>& table, Step step,
                                        T* to, int thread) {
    sampler.blend(table, step.tap, thread, [&](int pixel, int channel, const float(&s)[kVector]) {
      *reinterpret_cast<uint4*>(to + pixel * kSamplePitch + channel) =
          uint4{pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]), pack<T>(s[6], s[7])};
    });
  }
};

// -- no tensor cores ------------------------------------------------------------------------------------------------

// Eight pixels by four channels a thread, without tensor cores: for fp32 data everywhere, for other types where tensor
// cores do not multiply them. fp16 data on 6.0 are multiplied in pairs; one step (16 products) is summed in fp16, the
// steps in fp32.
template <class T, bool kPairs>
struct ScalarBlock {
  using Size = Shape<64, 64, 16, 128>;
  static constexpr int kPixelPitch = Size::kPixels + 4;

  GLIP_DEVICE static void run(const Launch& launch, unsigned char* memory, int thread, int tile, int channel_tile) {
    const Place place = find_place(launch, tile, Size::kPixels);
    const int first_channel = channel_tile * Size::kChannels;
    const int padded_in = round_up(launch.in_channels, kChannelStep);
    const int padded_out = round_up(launch.out_channels, kOutputStep);
    const int steps = launch.taps * ceil_div(launch.in_channels, Size::kDepth);
    const int pixel = thread / 16 * 8, channel = thread % 16 * 4;
    const int weight_row = thread / 8, weight_channel = thread % 8 * kVector;

    Table<Size::kPixels> table(memory);
    auto* samples = reinterpret_cast<unsigned*>(memory + Table<Size::kPixels>::kBytes);  // two slices, depth by pixel
    unsigned* weights = samples + 2 * Size::kDepth * kPixelPitch;                       // two slices, depth by channel
    Sampler<T, Size> sampler(place, thread);
    Vector<T> held;
    float sums[8][4] = {};

    const auto load = [&](Step step) {
      sampler.load(launch, place, table, step, thread);
      held.load(static_cast<const T*>(launch.weight) +
                packed_weight_index(step.tap, step.channel + weight_row, padded_in, padded_out) + first_channel +
                weight_channel);
    };
    const auto store = [&](Step step, int slice) {
      sampler.blend(table, step.tap, thread, [&](int row, int first, const float(&s)[kVector]) {
        unsigned* to = samples + slice * Size::kDepth * kPixelPitch + row;
#pragma unroll
        for (int k = 0; k < kVector; ++k) to[(first + k) * kPixelPitch] = twice_or_whole(s[k]);
      });
      store_weights(held, weights + (slice * Size::kDepth + weight_row) * Size::kChannels + weight_channel);
    };

    table.fill(launch, place, thread, Size::kThreads);
    block_sync();
    Step next;
    load(next);
    store(next, 0);
    for (int step = 0; step < steps; ++step) {
      const bool more = step + 1 < steps;
      next.advance(launch.taps, Size::kDepth);
      if (more) load(next);
      block_sync();  // this step's slices are written, those of the step before are read
      const int slice = step % 2;
      multiply(sums, samples + slice * Size::kDepth * kPixelPitch + pixel,
               weights + slice * Size::kDepth * Size::kChannels + channel);
      if (more) store(next, 1 - slice);
    }
    block_sync();

    Results<T, Size> results(memory, launch, first_channel);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) results.put(pixel + i, channel + j, sums[i][j]);
    block_sync();
    results.write(place, thread);
  }

  // A sample as the product needs it: as it is, or in both halves of a word.
  GLIP_DEVICE static unsigned twice_or_whole(float value) {
    if constexpr (kPairs) return pack<T>(value, value);
    else return as_bits(value);
  }

  // Eight weights: as floats, or in pairs that leave every other word empty.
  GLIP_DEVICE static void store_weights(const Vector<T>& held, unsigned* to) {
    if constexpr (kPairs) {
      to[0] = held.words[0].x, to[2] = held.words[0].y, to[4] = held.words[0].z, to[6] = held.words[0].w;
    } else {
      float values[kVector] = {};
      held.add_to(values, 1.0f);
#pragma unroll
      for (int k = 0; k < kVector; ++k) to[k] = as_bits(values[k]);
    }
  }

  GLIP_DEVICE static void multiply(float (&sums)[8][4], const unsigned* samples, const unsigned* weights) {
    unsigned pairs[8][2] = {};
#pragma unroll
    for (int k = 0; k < Size::kDepth; ++k) {
      const uint4 a = *reinterpret_cast<const uint4*>(samples + k * kPixelPitch);
      const uint4 b = *reinterpret_cast<const uint4*>(samples + k * kPixelPitch + 4);
      const uint4 w = *reinterpret_cast<const uint4*>(weights + k * Size::kChannels);
      const unsigned s[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (kPairs) {
          pairs[i][0] = fma_half2(s[i], w.x, pairs[i][0]);
          pairs[i][1] = fma_half2(s[i], w.z, pairs[i][1]);
        } else {
          const float value = as_float(s[i]);
          sums[i][0] += value * as_float(w.x);
          sums[i][1] += value * as_float(w.y);
          sums[i][2] += value * as_float(w.z);
          sums[i][3] += value * as_float(w.w);
        }
      }
    }
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          sums[i][2 * j] += low_half<T>(pairs[i][j]);
          sums[i][2 * j + 1] += high_half<T>(pairs[i][j]);
        }
    }
  }
};

// -- preparation ----------------------------------------------------------------------------------------------------

// Computes element `at` of packed weights from (out, in, kernel height, kernel width) weights.
template <class T>
GLIP_DEVICE void pack_weight(const T* weight, T* packed, int taps, int in_channels, int out_channels, long long at) {
  const int padded_in = round_up(in_channels, kChannelStep), padded_out = round_up(out_channels, kOutputStep);
  if (at >= static_cast<long long>(taps) * padded_in * padded_out) return;
  const int n = static_cast<int>(at % padded_out), row = static_cast<int>(at / padded_out);
  const int tap = row / padded_in, channel = row - tap * padded_in;
  T value = {};
  if (channel < in_channels && n < out_channels)
    value = weight[(static_cast<long long>(n) * in_channels + channel) * taps + tap];
  packed[at] = value;
}

// Transposes one 32x32 patch of an image from (channels, pixels) to (pixels, padded channels), with 256 threads.
template <class T>
GLIP_DEVICE void transpose_patch(const T* from, T* to, int pixels, int channels, int padded, int first_pixel,
                                 int first_channel, T* patch, int thread) {
  const int column = thread % 32;
  for (int row = thread / 32; row < 32; row += 8) {
    const int pixel = first_pixel + column, channel = first_channel + row;
    T value = {};
    if (pixel < pixels && channel < channels) value = from[static_cast<long long>(channel) * pixels + pixel];
    patch[row * 33 + column] = value;
  }
  block_sync();
  for (int row = thread / 32; row < 32; row += 8) {
    const int pixel = first_pixel + row, channel = first_channel + column;
    if (pixel < pixels && channel < padded)
      to[static_cast<long long>(pixel) * padded + channel] = patch[column * 33 + row];
  }
}

template <class T>
using WideBlock = TensorBlock<T, Shape<128, 256, 32, 256>, 64, 64>;
template <class T>
using MediumBlock = TensorBlock<T, Shape<64, 128, 32, 128>, 32, 64>;
template <class T>
using SmallBlock = TensorBlock<T, Shape<32, 64, 32, 64>, 32, 32>;

}  // namespace glip

// -- entry points ---------------------------------------------------------------------------------------------------

#if !defined(GLIP_DEFORM_EMULATED)

namespace glip {
template <class Block, bool kWanted>
GLIP_DEVICE void run_block(const Launch& launch, uint4* memory) {
  if constexpr (kWanted)
    Block::run(launch, reinterpret_cast<unsigned char*>(memory), static_cast<int>(threadIdx.x),
               static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
}
}  // namespace glip

// Every entry point exists for every architecture; where it has no use it is empty and never launched.
#define GLIP_KERNEL(name, threads, blocks, wanted, ...)                                                         \
  extern "C" __global__ void __launch_bounds__(threads, blocks) glip_deform_##name(const glip::Launch launch) { \
    extern __shared__ uint4 memory[];                                                                           \
    glip::run_block<glip::__VA_ARGS__, wanted>(launch, memory);                                                 \
  }

GLIP_KERNEL(f16_wide, 256, 1, (GLIP_ARCH >= 800), WideBlock<glip::Half>)
GLIP_KERNEL(f16_medium, 128, 2, glip::kTensorHalf, MediumBlock<glip::Half>)
GLIP_KERNEL(f16_small, 64, 4, glip::kTensorHalf, SmallBlock<glip::Half>)
GLIP_KERNEL(bf16_wide, 256, 1, glip::kTensorBfloat, WideBlock<glip::Bfloat>)
GLIP_KERNEL(bf16_medium, 128, 2, glip::kTensorBfloat, MediumBlock<glip::Bfloat>)
GLIP_KERNEL(bf16_small, 64, 4, glip::kTensorBfloat, SmallBlock<glip::Bfloat>)
GLIP_KERNEL(f16_scalar, 128, 3, !glip::kTensorHalf, ScalarBlock<glip::Half, glip::kPairsOfHalf>)
GLIP_KERNEL(bf16_scalar, 128, 3, !glip::kTensorBfloat, ScalarBlock<glip::Bfloat, false>)
GLIP_KERNEL(f32_scalar, 128, 3, true, ScalarBlock<float, false>)

#define GLIP_PREPARE(suffix, T)                                                                                      \
  extern "C" __global__ void glip_deform_pack_##suffix(const void* weight, void* packed, int taps, int in_channels, \
                                                       int out_channels) {                                          \
    glip::pack_weight(static_cast<const T*>(weight), static_cast<T*>(packed), taps, in_channels, out_channels,      \
                      static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x);                               \
  }                                                                                                                  \
  extern "C" __global__ void glip_deform_transpose_##suffix(const void* x, long long x_batch_stride, void* y,       \
                                                            int pixels, int channels, int padded) {                 \
    __shared__ T patch[32 * 33];                                                                                     \
    glip::transpose_patch(static_cast<const T*>(x) + blockIdx.z * x_batch_stride,                                   \
                          static_cast<T*>(y) + static_cast<long long>(blockIdx.z) * pixels * padded, pixels,        \
                          channels, padded, static_cast<int>(blockIdx.x) * 32, static_cast<int>(blockIdx.y) * 32,   \
                          patch, static_cast<int>(threadIdx.x));                                                     \
  }

GLIP_PREPARE(f32, float)
GLIP_PREPARE(f16, glip::Half)
GLIP_PREPARE(bf16, glip::Bfloat)

#endif
