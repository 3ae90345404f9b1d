#pragma once

#include "core/cuda/device.cuh"

// One kernel for each kind of wrapper in device.cuh, that shows what it does.

namespace torchops::kernels::samples {

// One warp. output: what shuffle, shuffle_up, shuffle_down and shuffle_xor give for each lane's arguments.
template <typename T>
__global__ void shuffles(const T* input,        // [32]
                         const int* arguments,  // [A, 32]
                         T* output,             // [A, 4, 32]
                         int num_arguments, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < num_arguments; ++i) {
    const int argument = arguments[i * 32 + lane];
    T* results = output + i * 4 * 32 + lane;
    results[0] = device::shuffle(input[lane], argument, width);
    results[32] = device::shuffle_up(input[lane], argument, width);
    results[64] = device::shuffle_down(input[lane], argument, width);
    results[96] = device::shuffle_xor(input[lane], argument, width);
  }
}

// Groups of 8 lanes, each with as many steps as it likes.
__global__ void masked_votes(const int* steps,  // [4]
                             uint32_t* output)  // [32]: ballots of all steps, added up
{
  const int lane = static_cast<int>(threadIdx.x);
  const int group = lane / 8;
  const uint32_t mask = 0xffU << group * 8;
  uint32_t sum = 0;
  for (int step = 0; step < steps[group]; ++step) {
    sum += device::ballot(lane % 8 <= step, mask) >> group * 8;
    device::syncwarp(mask);
  }
  output[lane] = sum + device::shuffle(sum, 0, 8, mask);
}

__global__ void votes(const int* input,  // [32]
                      uint32_t* output)  // [3, 32]: ballot, any, all
{
  const int lane = static_cast<int>(threadIdx.x);
  output[lane] = device::ballot(input[lane]);
  output[32 + lane] = device::any(input[lane]);
  output[64 + lane] = device::all(input[lane]);
}

__global__ void block_votes(const int* input,  // [T]
                            int* output)       // [3, T]: count, and, or
{
  const unsigned thread = threadIdx.x;
  output[thread] = device::syncthreads_count(input[thread]);
  output[blockDim.x + thread] = device::syncthreads_and(input[thread]);
  output[2 * blockDim.x + thread] = device::syncthreads_or(input[thread]);
}

__global__ void assert_that_all_hold(const int* input)  // [T]
{
  device::debug_assert(input[threadIdx.x], "every number is other than 0");
}

// Passes a value from thread to thread, `rounds` places on, through shared memory.
__global__ void pass_on(const int* input,  // [T]
                        int* output,       // [T]
                        int rounds) {
  device::SharedMemory shared;
  int* values = shared.take<int>(blockDim.x);
  const unsigned thread = threadIdx.x + blockDim.x * threadIdx.y;
  const unsigned num_threads = blockDim.x * blockDim.y;
  int* more_values = shared.take<int>(num_threads - blockDim.x);
  const auto place = [&](unsigned i) { return i < blockDim.x ? values + i : more_values + i - blockDim.x; };
  int value = input[thread];
  for (int round = 0; round < rounds; ++round) {
    *place(thread) = value;
    device::syncthreads();
    value = *place((thread + num_threads - 1) % num_threads);
    device::syncthreads();
  }
  output[thread] = value;
}

// Each thread copies `groups` groups of two, the second of each not valid, and waits for all groups but
// the newest `pending`.
template <int bytes, int groups, int pending>
__global__ void copies(const unsigned char* input,  // [T, groups, 2, bytes]
                       unsigned char* output)       // [T, groups, 2, bytes]
{
  constexpr int bytes_of_thread = groups * 2 * bytes;
  device::SharedMemory shared;
  auto* copied = shared.take<unsigned char>(blockDim.x * bytes_of_thread) + threadIdx.x * bytes_of_thread;
  input += threadIdx.x * bytes_of_thread;
  output += threadIdx.x * bytes_of_thread;
  for (int group = 0; group < groups; ++group) {
    for (int i = 0; i < 2; ++i) {
      device::copy_async<bytes>(copied + (group * 2 + i) * bytes, input + (group * 2 + i) * bytes, i == 0);
    }
    device::copy_async_commit();
  }
  device::copy_async_wait<pending>();
  for (int i = 0; i < bytes_of_thread; ++i) {
    output[i] = copied[i];
  }
}

// One warp. output: the fragments of 4 matrices, of 4 transposed, of 2, of 2 transposed.
__global__ void fragments(const uint16_t* input,  // [4, 8, 8]
                          uint32_t* output)       // [12, 32]
{
  device::SharedMemory shared;
  auto* matrices = shared.take<uint16_t>(256);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    matrices[i] = input[i];
  }
  device::syncwarp();
  uint32_t four[4];
  uint32_t two[2];
  device::ldmatrix(four, matrices + lane * 8);
  for (int i = 0; i < 4; ++i) {
    output[i * 32 + lane] = four[i];
  }
  device::ldmatrix_trans(four, matrices + lane * 8);
  for (int i = 0; i < 4; ++i) {
    output[(4 + i) * 32 + lane] = four[i];
  }
  device::ldmatrix(two, lane < 16 ? matrices + lane * 8 : matrices);
  for (int i = 0; i < 2; ++i) {
    output[(8 + i) * 32 + lane] = two[i];
  }
  device::ldmatrix_trans(two, lane < 16 ? matrices + lane * 8 : matrices);
  for (int i = 0; i < 2; ++i) {
    output[(10 + i) * 32 + lane] = two[i];
  }
}

// One warp: c += a b.
template <typename T>
__global__ void multiply(const T* a,  // [16, 16]
                         const T* b,  // [16, 8]
                         float* c)    // [16, 8]
{
  const int group = static_cast<int>(threadIdx.x) / 4;
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
  const auto two = [](T first, T second) { return first.bits | static_cast<uint32_t>(second.bits) << 16; };
  uint32_t a_fragment[4];
  for (int i = 0; i < 4; ++i) {
    const T* from = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    a_fragment[i] = two(from[0], from[1]);
  }
  uint32_t b_fragment[2];
  for (int i = 0; i < 2; ++i) {
    const T* from = b + (pair + i * 8) * 8 + group;
    b_fragment[i] = two(from[0], from[8]);
  }
  float* const rows[2] = {c + group * 8 + pair, c + (group + 8) * 8 + pair};
  float sum[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  device::mma_m16n8k16<T>(sum, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) {
    rows[i / 2][i % 2] = sum[i];
  }
}

// One warp: c += a b, with a and b rounded to tf32.
__global__ void multiply_tf32(const float* a,  // [16, 8]
                              const float* b,  // [8, 8]
                              float* c)        // [16, 8]
{
  const int group = static_cast<int>(threadIdx.x) / 4;
  const int in_group = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_fragment[4];
  for (int i = 0; i < 4; ++i) {
    a_fragment[i] = device::to_tf32(a[(group + i % 2 * 8) * 8 + in_group + i / 2 * 4]);
  }
  uint32_t b_fragment[2];
  for (int i = 0; i < 2; ++i) {
    b_fragment[i] = device::to_tf32(b[(in_group + i * 4) * 8 + group]);
  }
  float* const rows[2] = {c + group * 8 + in_group * 2, c + (group + 8) * 8 + in_group * 2};
  float sum[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  device::mma_m16n8k8_tf32(sum, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) {
    rows[i / 2][i % 2] = sum[i];
  }
}

// One block each.
template <typename T>
__global__ void widen_all(const T* input, accumulate_t<T>* output, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    output[i] = device::widen(device::ldg(input + i));
  }
}

template <typename T>
__global__ void narrow_all(const accumulate_t<T>* input, T* output, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    output[i] = device::narrow<T>(input[i]);
  }
}

// Pairs of neighbours, and the smaller and the larger of each.
template <typename T>
__global__ void pack_all(const float* input,  // [N, 2]
                         uint32_t* output,    // [N]
                         float2* sorted,      // [N]
                         int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const uint32_t pair = device::pack<T>(input[2 * i], input[2 * i + 1]);
    const float2 numbers = device::unpack<T>(pair);
    output[i] = pair;
    sorted[i] = make_float2(device::min(numbers.x, numbers.y), device::max(numbers.x, numbers.y));
  }
}

// output: exp2, log2, 3 divided by, and one over the square root.
__global__ void functions(const float* input,  // [32]
                          float* output)       // [4, 32]
{
  const unsigned i = threadIdx.x;
  output[i] = device::fast_exp2(input[i]);
  output[32 + i] = device::fast_log2(input[i]);
  output[64 + i] = device::fast_divide(3, input[i]);
  output[96 + i] = device::reciprocal_sqrt(input[i]);
}

// output: exp2, log2.
__global__ void functions_of_doubles(const double* input,  // [32]
                                     double* output)       // [2, 32]
{
  const unsigned i = threadIdx.x;
  output[i] = device::fast_exp2(input[i]);
  output[32 + i] = device::fast_log2(input[i]);
}

// output: popc, ffs, clz.
__global__ void bits(const uint32_t* input,  // [32]
                     int* output)            // [3, 32]
{
  const unsigned i = threadIdx.x;
  output[i] = device::popc(input[i]);
  output[32 + i] = device::ffs(input[i]);
  output[64 + i] = device::clz(input[i]);
}

// Every thread does every operation on state: sum, minimum, maximum, bits, a flag that one thread finds
// unset, and one that is moved on by those who find their own number.
template <typename T>
__global__ void atomics(T* state)  // [6]
{
  const auto number = static_cast<T>(blockIdx.x * blockDim.x + threadIdx.x);
  device::atomic_add(state, number);
  device::atomic_min(state + 1, number);
  device::atomic_max(state + 2, number);
  device::atomic_or(state + 3, static_cast<T>(1) << number % 31);
  if (device::atomic_exchange(state + 4, 1) == 0) {
    device::atomic_cas(state + 5, 7, 8);
  } else {
    device::atomic_cas(state + 5, 9, 10);
  }
}

}  // namespace torchops::kernels::samples
