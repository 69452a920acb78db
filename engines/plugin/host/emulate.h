// A CPU in place of a GPU: the functions of deform_ptx.cuh for blocks whose threads are fibers.
//
// Tests run the source of the kernels on it. That shows that indices, layouts, fragments as PTX documents them, and the
// order of barriers are right. It shows neither speed nor races that this order of threads hides; tests therefore run
// threads in both directions, and asynchronous copies both as early and as late as a GPU may perform them.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define GLIP_DEVICE inline
#define GLIP_ARCH GLIP_DEFORM_EMULATED

namespace glip {

struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct Half {
  unsigned short bits;
};
struct Bfloat {
  unsigned short bits;
};

namespace emulation {

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

// What a lane contributes to a collective operation of its warp.
struct Lane {
  unsigned words[8];
  float floats[8];
  const void* address;
};

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  unsigned collectives = 0;
  std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warp_barriers;
  std::vector<Lane> lanes[2];
  Barrier barrier;
  ucontext_t caller;
  std::function<void(int)> body;
  int current = 0;
  int direction = 1;
  bool eager_copies = false;

  static Block*& active() {
    static Block* block = nullptr;
    return block;
  }

  int threads() const { return static_cast<int>(fibers.size()); }
  Fiber& fiber() { return fibers[current]; }

  void switch_away() {
    const int from = current;
    do current = (current + direction + threads()) % threads();
    while (fibers[current].done && current != from);
    if (current != from) swapcontext(&fibers[from].context, &fibers[current].context);
  }

  void wait(Barrier& at, int count) {
    const int generation = at.generation;
    if (++at.arrived == count) {
      at.arrived = 0;
      ++at.generation;
      return;
    }
    while (at.generation == generation) switch_away();
  }

  static void enter() {
    Block& block = *active();
    block.body(block.current);
    block.fiber().done = true;
    int next = 0;
    while (next < block.threads() && block.fibers[next].done) ++next;
    if (next == block.threads()) {
      setcontext(&block.caller);
    } else {
      block.current = next;
      setcontext(&block.fibers[next].context);
    }
  }

  // Runs `given(thread)` in `count` threads, to the end.
  void run(int count, std::function<void(int)> given) {
    constexpr std::size_t kStack = 256 << 10;
    body = std::move(given);
    barrier = {};
    warp_barriers.assign((count + 31) / 32, {});
    for (auto& side : lanes) side.assign(count, {});
    fibers.resize(count);
    active() = this;
    for (Fiber& fiber : fibers) {
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.done = false;
      fiber.collectives = 0;
      fiber.groups.clear();
      fiber.open.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    current = direction > 0 ? 0 : count - 1;
    swapcontext(&caller, &fibers[current].context);
  }

  // Contributes to a collective operation, and returns what all lanes contributed. Two buffers alternate: a lane begins
  // operation n + 2, which overwrites the buffer of n, when all have begun n + 1 and so have done with n.
  const Lane* exchange(const Lane& mine) {
    auto& side = lanes[fiber().collectives++ % 2];
    side[current] = mine;
    wait(warp_barriers[current / 32], 32);
    return side.data() + current / 32 * 32;
  }

  void perform(const Copy& copy) {
    if (copy.inside)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
};

inline Block& block() { return *Block::active(); }
inline int lane() { return block().current % 32; }

}  // namespace emulation

inline float as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned as_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(Half value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
}
inline float widen(Bfloat value) { return as_float(static_cast<unsigned>(value.bits) << 16); }

template <class T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline Half narrow<Half>(float value) {
  const auto half = static_cast<_Float16>(value);
  Half result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}
template <>
inline Bfloat narrow<Bfloat>(float value) {
  const unsigned bits = as_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<unsigned short>(is_nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
inline unsigned pack(float low, float high) {
  return narrow<T>(low).bits | static_cast<unsigned>(narrow<T>(high).bits) << 16;
}
template <class T>
inline float low_half(unsigned packed) {
  return widen(T{static_cast<unsigned short>(packed)});
}
template <class T>
inline float high_half(unsigned packed) {
  return widen(T{static_cast<unsigned short>(packed >> 16)});
}

inline unsigned fma_half2(unsigned a, unsigned b, unsigned c) {
  // Products of halves are exact in double precision, so that there is one rounding, as in hardware.
  const auto one = [](float x, float y, float z) {
    return static_cast<float>(static_cast<_Float16>(static_cast<double>(x) * y + z));
  };
  return pack<Half>(one(low_half<Half>(a), low_half<Half>(b), low_half<Half>(c)),
                    one(high_half<Half>(a), high_half<Half>(b), high_half<Half>(c)));
}

inline void block_sync() { emulation::block().wait(emulation::block().barrier, emulation::block().threads()); }
inline void warp_sync() { emulation::block().exchange({}); }

inline uint4 load16(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16) std::abort();  // a GPU would report an error
  uint4 result;
  std::memcpy(&result, from, 16);
  return result;
}

inline void copy16_async(void* to, const void* from, bool inside) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16) std::abort();
  const emulation::Copy copy{to, from, inside};
  if (emulation::block().eager_copies)
    emulation::block().perform(copy);
  else
    emulation::block().fiber().open.push_back(copy);
}
inline void commit_copies() {
  auto& fiber = emulation::block().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kUnderWay>
inline void await_copies() {
  auto& fiber = emulation::block().fiber();
  for (; fiber.groups.size() > kUnderWay; fiber.groups.pop_front())
    for (const auto& copy : fiber.groups.front()) emulation::block().perform(copy);
}

namespace emulation {

inline unsigned short element(const Lane* lanes, int matrix, int row, int column) {
  unsigned short value;
  std::memcpy(&value, static_cast<const char*>(lanes[8 * matrix + row].address) + 2 * column, 2);
  return value;
}

// Row `lane / 4` of each 8x8 matrix (transposed, its column) is spread over four lanes, two elements each.
inline void load(unsigned (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) std::abort();
  Lane mine{};
  mine.address = row;
  const Lane* all = block().exchange(mine);
  for (int m = 0; m < 4; ++m) {
    const int major = lane() / 4, minor = lane() % 4 * 2;
    r[m] = transposed ? element(all, m, minor, major) | element(all, m, minor + 1, major) << 16
                      : element(all, m, major, minor) | element(all, m, major, minor + 1) << 16;
  }
  block().exchange({});  // a barrier: no lane may overwrite what others still read
}

template <class T>
inline float half_of(unsigned word, int index) {
  return index % 2 ? high_half<T>(word) : low_half<T>(word);
}

}  // namespace emulation

inline void load_matrices(unsigned (&r)[4], const void* row) { emulation::load(r, row, false); }
inline void load_matrices_transposed(unsigned (&r)[4], const void* row) { emulation::load(r, row, true); }

template <class T>
inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulation::Lane mine{};
  std::memcpy(mine.words, a, sizeof(a));
  mine.words[4] = b0;
  mine.words[5] = b1;
  const emulation::Lane* all = emulation::block().exchange(mine);
  for (int i = 0; i < 4; ++i) {
    const int row = emulation::lane() / 4 + i / 2 * 8, column = emulation::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned left = all[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2];
      const unsigned right = all[column * 4 + k % 8 / 2].words[4 + k / 8];
      c[i] += emulation::half_of<T>(left, k) * emulation::half_of<T>(right, k);
    }
  }
}

namespace emulation {

// A layout of our own, eight consecutive elements a lane: that of the hardware is unspecified.
inline void load_tile(unsigned (&r)[8], const void* at, int stride) {
  for (int i = 0; i < 4; ++i) {
    const int element = 8 * lane() + 2 * i;
    std::memcpy(&r[i], static_cast<const char*>(at) + 2 * (element / 16 * stride + element % 16), 4);
    r[i + 4] = 0;
  }
  block().exchange({});
}

}  // namespace emulation

inline void load_a_16x16(unsigned (&r)[8], const void* at, int stride) { emulation::load_tile(r, at, stride); }
inline void load_b_16x16(unsigned (&r)[8], const void* at, int stride) { emulation::load_tile(r, at, stride); }
inline void multiply_16x16x16(float (&c)[8], const unsigned (&a)[8], const unsigned (&b)[8]) {
  emulation::Lane left{}, right{};
  std::memcpy(left.words, a, sizeof(a));
  std::memcpy(right.words, b, sizeof(b));
  emulation::Lane lefts[32], rights[32];
  std::memcpy(lefts, emulation::block().exchange(left), sizeof(lefts));
  std::memcpy(rights, emulation::block().exchange(right), sizeof(rights));
  const auto at = [](const emulation::Lane* all, int row, int column) {
    const int element = 16 * row + column;
    return emulation::half_of<Half>(all[element / 8].words[element % 8 / 2], element);
  };
  for (int i = 0; i < 8; ++i) {
    const int element = 8 * emulation::lane() + i;
    for (int k = 0; k < 16; ++k) c[i] += at(lefts, element / 16, k) * at(rights, k, element % 16);
  }
}
inline void store_16x16(float* to, const float (&c)[8], int stride) {
  for (int i = 0; i < 8; ++i) {
    const int element = 8 * emulation::lane() + i;
    to[element / 16 * stride + element % 16] = c[i];
  }
}

}  // namespace glip
