// Compiled by nvcc only, to see that it accepts every kernel here and every function of device.cuh, and
// with how many registers.

#include "samples/add_up.cuh"
#include "samples/center_rows.cuh"
#include "samples/matmul.cuh"
#include "samples/segment_sum.cuh"
#include "samples/wrappers.cuh"

namespace torchops::kernels::samples {

template __global__ void center_rows<float>(const float*, float*, int64_t);
template __global__ void center_rows<bfloat16>(const bfloat16*, bfloat16*, int64_t);
template __global__ void center_rows<float16>(const float16*, float16*, int64_t);
template __global__ void matmul<bfloat16>(const bfloat16*, const bfloat16*, float*, int, int, int);
template __global__ void matmul<float16>(const float16*, const float16*, float*, int, int, int);
template __global__ void segment_sum<float>(const float*, const int64_t*, const int64_t*, float*, int64_t, int64_t);
template __global__ void segment_sum<bfloat16>(const bfloat16*, const int64_t*, const int64_t*, bfloat16*, int64_t,
                                               int64_t);
template __global__ void add_up<>(const float*, float*, int64_t);

template __global__ void shuffles<int32_t>(const int32_t*, const int*, int32_t*, int, int);
template __global__ void shuffles<uint32_t>(const uint32_t*, const int*, uint32_t*, int, int);
template __global__ void shuffles<float>(const float*, const int*, float*, int, int);
template __global__ void shuffles<double>(const double*, const int*, double*, int, int);
template __global__ void shuffles<int64_t>(const int64_t*, const int*, int64_t*, int, int);
template __global__ void shuffles<uint64_t>(const uint64_t*, const int*, uint64_t*, int, int);
template __global__ void copies<4, 3, 0>(const unsigned char*, unsigned char*);
template __global__ void copies<8, 3, 1>(const unsigned char*, unsigned char*);
template __global__ void copies<16, 3, 2>(const unsigned char*, unsigned char*);
template __global__ void multiply<bfloat16>(const bfloat16*, const bfloat16*, float*);
template __global__ void multiply<float16>(const float16*, const float16*, float*);
template __global__ void widen_all<float>(const float*, float*, int);
template __global__ void widen_all<double>(const double*, double*, int);
template __global__ void widen_all<bfloat16>(const bfloat16*, float*, int);
template __global__ void widen_all<float16>(const float16*, float*, int);
template __global__ void narrow_all<float>(const float*, float*, int);
template __global__ void narrow_all<double>(const double*, double*, int);
template __global__ void narrow_all<bfloat16>(const float*, bfloat16*, int);
template __global__ void narrow_all<float16>(const float*, float16*, int);
template __global__ void pack_all<bfloat16>(const float*, uint32_t*, float2*, int);
template __global__ void pack_all<float16>(const float*, uint32_t*, float2*, int);
template __global__ void atomics<int32_t>(int32_t*);
template __global__ void atomics<uint32_t>(uint32_t*);
template __global__ void atomics<uint64_t>(uint64_t*);

}  // namespace torchops::kernels::samples
