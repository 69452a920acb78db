// The GPU instructions that the kernels use: conversions, asynchronous copies, matrix fragments.
//
// Written in PTX instead of through CUDA's headers, so that NVRTC needs none of them. host/emulate.h has the same
// functions for a CPU; keep the two equal.
#pragma once

#define GLIP_DEVICE __device__ __forceinline__

#if defined(__CUDA_ARCH__)
#define GLIP_ARCH __CUDA_ARCH__
#else
#define GLIP_ARCH 800  // nvcc's host pass, which only parses
#endif

namespace glip {

struct Half {
  unsigned short bits;
};
struct Bfloat {
  unsigned short bits;
};

// -- conversions ----------------------------------------------------------------------------------------------------

GLIP_DEVICE float widen(float value) { return value; }
GLIP_DEVICE float widen(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
GLIP_DEVICE float widen(Bfloat value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

template <class T>
GLIP_DEVICE T narrow(float value);
template <>
GLIP_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
GLIP_DEVICE Half narrow<Half>(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
GLIP_DEVICE Bfloat narrow<Bfloat>(float value) {
  Bfloat result;
#if GLIP_ARCH >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const unsigned bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result.bits = static_cast<unsigned short>(is_nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  return result;
}

// Two values in one register, the first in its low half.
template <class T>
GLIP_DEVICE unsigned pack(float low, float high) {
  return narrow<T>(low).bits | static_cast<unsigned>(narrow<T>(high).bits) << 16;
}
#if GLIP_ARCH >= 800
template <>
GLIP_DEVICE unsigned pack<Half>(float low, float high) {
  unsigned result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
GLIP_DEVICE unsigned pack<Bfloat>(float low, float high) {
  unsigned result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
#endif

template <class T>
GLIP_DEVICE float low_half(unsigned packed) {
  return widen(T{static_cast<unsigned short>(packed)});
}
template <class T>
GLIP_DEVICE float high_half(unsigned packed) {
  return widen(T{static_cast<unsigned short>(packed >> 16)});
}

// Two fp16 products and sums at once, at twice the rate of fp32 on 6.0.
GLIP_DEVICE unsigned fma_half2(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

GLIP_DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }
GLIP_DEVICE unsigned as_bits(float value) { return __float_as_uint(value); }

// -- memory ---------------------------------------------------------------------------------------------------------

GLIP_DEVICE void block_sync() { __syncthreads(); }
GLIP_DEVICE void warp_sync() {
#if GLIP_ARCH >= 700
  __syncwarp();
#endif
}

GLIP_DEVICE uint4 load16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }

GLIP_DEVICE unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

#if GLIP_ARCH >= 800
// Copies 16 bytes from global to shared memory, or writes zeros.
GLIP_DEVICE void copy16_async(void* to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
GLIP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kUnderWay latest groups of copies are incomplete.
template <int kUnderWay>
GLIP_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}
#endif

// -- matrix fragments -----------------------------------------------------------------------------------------------

#if GLIP_ARCH >= 750
// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
GLIP_DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
GLIP_DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16x8, fp32) += a (16x16) b (16x8). A lane holds of c: row lane / 4, columns 2 * (lane % 4) and one more; then the
// same eight rows below.
template <class T>
GLIP_DEVICE void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
GLIP_DEVICE void multiply_16x8x16<Half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if GLIP_ARCH >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // The instruction of 7.5 is half as deep; its fragments are the two halves of those of 8.0.
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
#if GLIP_ARCH >= 800
template <>
GLIP_DEVICE void multiply_16x8x16<Bfloat>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
#elif GLIP_ARCH >= 700
// 16x16x16 products with fragments of an unspecified layout. All matrices are row-major; strides are in elements.
GLIP_DEVICE void load_a_16x16(unsigned (&r)[8], const void* at, int stride) {
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(shared_address(at)), "r"(stride)
               : "memory");
}
GLIP_DEVICE void load_b_16x16(unsigned (&r)[8], const void* at, int stride) {
  asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(shared_address(at)), "r"(stride)
               : "memory");
}
GLIP_DEVICE void multiply_16x16x16(float (&c)[8], const unsigned (&a)[8], const unsigned (&b)[8]) {
  asm("wmma.mma.sync.aligned.row.row.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]), "r"(b[0]), "r"(b[1]),
        "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]), "r"(b[6]), "r"(b[7]));
}
GLIP_DEVICE void store_16x16(float* at, const float (&c)[8], int stride) {
  asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(
                   shared_address(at)),
               "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "f"(c[4]), "f"(c[5]), "f"(c[6]), "f"(c[7]), "r"(stride)
               : "memory");
}
#endif

}  // namespace glip
