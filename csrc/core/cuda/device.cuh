#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/scalar.h"

// All that a CUDA kernel may use besides plain C++ and the indices of its thread. The C++ tests have a
// header of the same name and interface with which g++ compiles kernels and executes them on the host.
//
// Functions of a warp are called by every lane of `mask` at one place in the source, functions of a
// block by each of its threads.

namespace torchops::device {

using kernels::accumulate_t;
using kernels::bfloat16;
using kernels::float16;

inline constexpr int warp_size = 32;
inline constexpr uint32_t all_lanes = 0xffffffff;

// ---- assertions ---------------------------------------------------------------------------------

// In a debug build, stops the program where the condition does not hold, with the caller's line; a
// release build goes on, and what follows must be safe there too.
__device__ __forceinline__ void debug_assert(bool condition, const char* expected, const char* file = __builtin_FILE(),
                                             unsigned line = __builtin_LINE()) {
#if defined(NDEBUG)
  static_cast<void>(condition), static_cast<void>(expected), static_cast<void>(file), static_cast<void>(line);
#else
  if (!condition) {
    __assert_fail(expected, file, line, "kernel");
  }
#endif
}

// ---- warp ---------------------------------------------------------------------------------------

// The value of another lane of the caller's group of `width` lanes; the caller's own where there is no
// such lane. T has 4 or 8 bytes.
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane, int width = warp_size, uint32_t mask = all_lanes) {
  return __shfl_sync(mask, value, lane, width);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int distance, int width = warp_size, uint32_t mask = all_lanes) {
  return __shfl_up_sync(mask, value, distance, width);
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int distance, int width = warp_size, uint32_t mask = all_lanes) {
  return __shfl_down_sync(mask, value, distance, width);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int bits, int width = warp_size, uint32_t mask = all_lanes) {
  return __shfl_xor_sync(mask, value, bits, width);
}

// Bit l of the result: the predicate of lane l.
__device__ __forceinline__ uint32_t ballot(bool predicate, uint32_t mask = all_lanes) {
  return __ballot_sync(mask, predicate);
}
__device__ __forceinline__ bool any(bool predicate, uint32_t mask = all_lanes) {
  return __any_sync(mask, predicate);
}
__device__ __forceinline__ bool all(bool predicate, uint32_t mask = all_lanes) {
  return __all_sync(mask, predicate);
}

// Memory written by lanes of the mask before it is seen by them behind it. Shuffles and votes promise
// no such thing.
__device__ __forceinline__ void syncwarp(uint32_t mask = all_lanes) {
  __syncwarp(mask);
}

// ---- block --------------------------------------------------------------------------------------

__device__ __forceinline__ void syncthreads() {
  __syncthreads();
}
// syncthreads, and in how many threads the predicate holds, resp. whether in all, in any.
__device__ __forceinline__ int syncthreads_count(bool predicate) {
  return __syncthreads_count(predicate);
}
__device__ __forceinline__ bool syncthreads_and(bool predicate) {
  return __syncthreads_and(predicate);
}
__device__ __forceinline__ bool syncthreads_or(bool predicate) {
  return __syncthreads_or(predicate);
}

// Bytes that `count` elements take of a launch's shared memory: arrays begin at multiples of 16 bytes.
template <typename T>
__host__ __device__ constexpr size_t shared_size(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

// The dynamic shared memory of a block, handed out array by array. Every thread takes the same arrays
// in the same order.
class SharedMemory {
 public:
  // `count` elements, uninitialized.
  template <typename T>
  __device__ __forceinline__ T* take(size_t count) {
    extern __shared__ __align__(16) unsigned char memory[];
    T* array = reinterpret_cast<T*>(memory + taken_);
    taken_ += shared_size<T>(count);
    return array;
  }

 private:
  size_t taken_ = 0;
};

// ---- asynchronous copies from global to shared memory ---------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` (4, 8 or 16; both addresses are multiples of that); if not valid, writes zeros and
// does not read.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const auto from = __cvta_generic_to_global(from_global);
  const int read = valid ? bytes : 0;
  if constexpr (bytes == 16) {
    // .cg leaves L1 out; smaller copies have .ca only.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to_shared)), "l"(from), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(to_shared)), "l"(from), "n"(bytes), "r"(read)
                 : "memory");
  }
}

// Closes a group: the calling thread's copies since the last group.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for the calling thread's groups but the newest `pending` ones. Other threads see the copies
// after a barrier only.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- matrices -------------------------------------------------------------------------------------
// Fragments as the PTX ISA lays them out, with g = lane / 4 and t = lane % 4.

// Four (two) 8x8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8
// of matrix l / 8, a multiple of 16 bytes, and gets elements 2t and 2t + 1 of row g of each matrix.
// For two matrices the addresses of lanes 16 to 31 do not count.
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: a lane gets elements g of rows 2t and 2t + 1.
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a [16, 16] and b [16, 8] of bfloat16 or float16.
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour;
// b: (2t, g), (2t + 8, g), each with the element below; c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// c += a b for a [16, 8] and b [8, 8] of tf32.
// a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g); c as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- numbers --------------------------------------------------------------------------------------

// A storage type's value in the type it is computed in, and back: to nearest, ties to even.
__device__ __forceinline__ float widen(bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}

template <typename T>
__device__ __forceinline__ T narrow(accumulate_t<T> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<T, float16>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return value;
  }
}

// Two 16-bit elements in a word, as mma and ldmatrix have them: the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return make_float2(widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)}));
}

// The 32 bits that mma takes for a tf32: to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// To about 2 units in the last place; subnormal numbers count as 0.
__device__ __forceinline__ float fast_exp2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}
__device__ __forceinline__ float fast_log2(float value) {
  return __log2f(value);
}
// For kernels of every type: there is no fast way for double.
__device__ __forceinline__ double fast_exp2(double value) {
  return ::exp2(value);
}
__device__ __forceinline__ double fast_log2(double value) {
  return ::log2(value);
}
__device__ __forceinline__ float fast_divide(float dividend, float divisor) {
  return __fdividef(dividend, divisor);
}
__device__ __forceinline__ float reciprocal_sqrt(float value) {
  return rsqrtf(value);
}

// The first if they are equal or one of them is NaN.
template <typename T>
__device__ __forceinline__ T min(T first, T second) {
  return second < first ? second : first;
}
template <typename T>
__device__ __forceinline__ T max(T first, T second) {
  return first < second ? second : first;
}

__device__ __forceinline__ int popc(uint32_t bits) {
  return __popc(bits);
}
// One plus the position of the lowest set bit; 0 if there is none.
__device__ __forceinline__ int ffs(uint32_t bits) {
  return __ffs(static_cast<int>(bits));
}
// The number of zeros above the highest set bit.
__device__ __forceinline__ int clz(uint32_t bits) {
  return __clz(static_cast<int>(bits));
}

// ---- memory ---------------------------------------------------------------------------------------

// Through the read-only cache: nobody writes there while the kernel runs.
template <typename T>
__device__ __forceinline__ T ldg(const T* from) {
  if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>) {
    return {__ldg(&from->bits)};
  } else {
    return __ldg(from);
  }
}

// Atomic operations give the old value and order nothing else. No kernel uses them on floating-point
// results, whose bits would depend on the order. T: int32_t, uint32_t, uint64_t; float to add.
namespace detail {
template <typename T>
using native_t = std::conditional_t<std::is_same_v<T, uint64_t>, unsigned long long, T>;
template <typename T>
__device__ __forceinline__ auto* native(T* pointer) {
  return reinterpret_cast<native_t<T>*>(pointer);
}
}  // namespace detail

template <typename T>
__device__ __forceinline__ T atomic_add(T* at, std::type_identity_t<T> value) {
  return atomicAdd(detail::native(at), static_cast<detail::native_t<T>>(value));
}
template <typename T>
__device__ __forceinline__ T atomic_min(T* at, std::type_identity_t<T> value) {
  return atomicMin(detail::native(at), static_cast<detail::native_t<T>>(value));
}
template <typename T>
__device__ __forceinline__ T atomic_max(T* at, std::type_identity_t<T> value) {
  return atomicMax(detail::native(at), static_cast<detail::native_t<T>>(value));
}
template <typename T>
__device__ __forceinline__ T atomic_or(T* at, std::type_identity_t<T> value) {
  return atomicOr(detail::native(at), static_cast<detail::native_t<T>>(value));
}
template <typename T>
__device__ __forceinline__ T atomic_exchange(T* at, std::type_identity_t<T> value) {
  return atomicExch(detail::native(at), static_cast<detail::native_t<T>>(value));
}
// Writes `value` if `expected` is there.
template <typename T>
__device__ __forceinline__ T atomic_cas(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomicCAS(detail::native(at), static_cast<detail::native_t<T>>(expected),
                   static_cast<detail::native_t<T>>(value));
}

}  // namespace torchops::device
