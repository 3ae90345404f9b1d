#pragma once

#include <cmath>
#include <limits>

#include "core/cuda/block.cuh"
#include "sparse_attention/cuda/launches.h"

namespace torchops::kernels::sparse_attention {

inline constexpr int quantization_threads = 128;

// A part, and how it weights the codewords of its subspace, as codeword_group lanes know it: a lane has every
// codeword_group-th codeword, of which there are `shares` at most. All lanes of a warp call these functions together.
template <int shares, typename T>
class WeightedCodewords {
 public:
  using A = accumulate_t<T>;

  // Where a part is not there, another one is looked at that is.
  __device__ WeightedCodewords(const Parts<T>& parts, int64_t m)
      : parts_(parts),
        lane_(device::lane_index() % static_cast<int>(codeword_group)),
        padded_(parts.padded()),
        codebook_(parts.codebook(m)) {}

  __device__ void look_at(const T* part) {
    part_ = part;
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      distances_[k] = A(0);
    }
    for (int64_t c = 0; c < parts_.subspace; ++c) {
      const A channel = device::widen(part[c]);
#pragma unroll
      for (int k = 0; k < shares; ++k) {
        if (is_padded(k)) {
          const A difference = channel - codeword(c, k);
          distances_[k] += difference < A(0) ? -difference : difference;
        }
      }
    }
    find_nearest();
    A total = 0;
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      // What stands behind the last codeword has no weight, and a distance that has no gradient.
      const bool there = number(k) < parts_.num_codewords;
      distances_[k] = there ? distances_[k] : A(0);
      weights_[k] = there ? 1 / device::max(distances_[k], static_cast<A>(least_distance)) : A(0);
      total += weights_[k];
    }
    total = sum_of_lanes(total);
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      weights_[k] /= total;
    }
  }

  // Calls body(channel, x - z, y, y - z).
  template <typename Body>
  __device__ void for_each_channel(const Body& body) const {
    for (int64_t c = 0; c < parts_.subspace; ++c) {
      A mixed = 0;
#pragma unroll
      for (int k = 0; k < shares; ++k) {
        mixed += is_padded(k) ? weights_[k] * codeword(c, k) : A(0);
      }
      mixed = sum_of_lanes(mixed);
      const A nearest = codebook_[c * padded_ + nearest_];
      body(c, device::widen(part_[c]) - nearest, mixed, mixed - nearest);
    }
  }

  // How the loss grows with the distances, given that it grows by y - z with y.
  __device__ void find_slopes() {
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      slopes_[k] = A(0);
    }
    A mean = 0;
    for_each_channel([&](int64_t c, A, A mixed, A towards) {
      mean += mixed * towards;
#pragma unroll
      for (int k = 0; k < shares; ++k) {
        slopes_[k] += is_padded(k) ? towards * codeword(c, k) : A(0);
      }
    });
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      const A slope = weights_[k] * (mean - slopes_[k]) / distances_[k];
      slopes_[k] = distances_[k] > static_cast<A>(least_distance) ? slope : A(0);
    }
  }

  // The gradient to a channel of the part, in every lane.
  __device__ A gradient(int64_t c, A residual) const {
    const A channel = device::widen(part_[c]);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      sum += is_padded(k) ? slopes_[k] * sign(channel - codeword(c, k)) : A(0);
    }
    return residual + sum_of_lanes(sum);
  }

  // Adds the gradient to a channel of codewords.
  __device__ void add_gradient(int64_t c, A residual, A towards, A* sum) const {
    const A channel = device::widen(part_[c]);
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      if (is_padded(k)) {
        const A of_weight = towards * weights_[k] - slopes_[k] * sign(channel - codeword(c, k));
        const A of_nearest = number(k) == nearest_ ? towards + residual : A(0);
        sum[c * padded_ + number(k)] += of_weight - of_nearest;
      }
    }
  }

  // Of all that a lane adds to.
  __device__ void clear(A* sum) const {
    for (int64_t i = lane_; i < parts_.subspace * padded_; i += codeword_group) {
      sum[i] = A(0);
    }
  }

  __device__ int lane() const { return lane_; }

  static __device__ A sum_of_lanes(A value) {
    for (int bits = static_cast<int>(codeword_group) / 2; bits > 0; bits /= 2) {
      value += device::shuffle_xor(value, bits);
    }
    return value;
  }

 private:
  __device__ int64_t number(int k) const { return lane_ + k * codeword_group; }
  __device__ bool is_padded(int k) const { return shares == 1 || k * codeword_group < padded_; }
  __device__ A codeword(int64_t c, int k) const { return codebook_[c * padded_ + number(k)]; }

  static __device__ A sign(A value) { return static_cast<A>(value > A(0)) - static_cast<A>(value < A(0)); }

  __device__ void find_nearest() {
    A smallest = std::numeric_limits<A>::infinity();
    int32_t code = 0;
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      if (is_padded(k) && distances_[k] < smallest) {  // false for a NaN
        smallest = distances_[k];
        code = static_cast<int32_t>(number(k));
      }
    }
    for (int bits = static_cast<int>(codeword_group) / 2; bits > 0; bits /= 2) {
      const A other = device::shuffle_xor(smallest, bits);
      const int32_t other_code = device::shuffle_xor(code, bits);
      if (other < smallest || (other == smallest && other_code < code)) {
        smallest = other;
        code = other_code;
      }
    }
    nearest_ = code;
  }

  const Parts<T>& parts_;
  int lane_;
  int64_t padded_;
  const A* codebook_;
  const T* part_ = nullptr;
  int64_t nearest_ = 0;
  A distances_[shares];
  A weights_[shares];
  A slopes_[shares];
};

// The subspace of a piece that the lanes of a group have. Those behind the last one go along with it, for all lanes of
// a warp arrive at its shuffles, and write nothing; so they do behind the last row of a piece.
struct PieceUnit {
  int64_t unit, piece, m;
  bool is_there;

  __device__ PieceUnit(int64_t num_units, int64_t num_subspaces) {
    const int64_t group = (blockIdx.x * int64_t{quantization_threads} + threadIdx.x) / codeword_group;
    is_there = group < num_units;
    unit = is_there ? group : num_units - 1;
    piece = unit / num_subspaces;
    m = unit % num_subspaces;
  }

  // Calls body(row, whether it is there).
  template <typename Body>
  __device__ void for_each_row(const RowPieces& pieces, const Body& body) const {
    for (int64_t i = 0; i < pieces.length(); ++i) {
      const int64_t row = pieces.begin(piece) + i;
      const bool row_is_there = row < pieces.end(piece);
      body(row_is_there ? row : pieces.num_rows - 1, is_there && row_is_there);
    }
  }
};

template <int shares, typename T>
__global__ void quantization_loss(QuantizationLoss<T> args) {
  using A = accumulate_t<T>;
  const PieceUnit own(args.num_units(), args.parts.num_subspaces);
  WeightedCodewords<shares, T> weighted(args.parts, own.m);
  double sum = 0;
  own.for_each_row(args.pieces, [&](int64_t row, bool is_there) {
    weighted.look_at(args.parts.part(row, own.m));
    A squares = 0;
    weighted.for_each_channel(
        [&](int64_t, A residual, A, A towards) { squares += residual * residual + towards * towards; });
    sum += is_there ? static_cast<double>(squares) : 0;
  });
  if (own.is_there && weighted.lane() == 0) {
    args.sums[own.unit] = sum;
  }
}

inline constexpr int mean_threads = 256;

// A block, which adds up the sums of pieces.
template <typename T>
__global__ void mean_of_pieces(QuantizationLoss<T> args) {
  device::SharedMemory memory;
  double* const of_warps = memory.take<double>(mean_threads / device::warp_size);
  double sum = 0;
  for (int64_t unit = threadIdx.x; unit < args.num_units(); unit += mean_threads) {
    sum += args.sums[unit];
  }
  sum = device::sum_of_warp(sum);
  if (device::lane_index() == 0) {
    of_warps[device::warp_index()] = sum;
  }
  device::syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int warp = 0; warp < mean_threads / device::warp_size; ++warp) {
      total += of_warps[warp];
    }
    *args.loss = args.mean(total);
  }
}

template <int shares, typename T>
__global__ void quantization_gradient(QuantizationGradient<T> args) {
  using A = accumulate_t<T>;
  const PieceUnit own(args.num_units(), args.parts.num_subspaces);
  WeightedCodewords<shares, T> weighted(args.parts, own.m);
  A* const sum = args.piece_gradients != nullptr && own.is_there ? args.piece_gradient(own.unit) : nullptr;
  if (sum != nullptr) {
    weighted.clear(sum);
  }
  const A factor = args.factor();
  own.for_each_row(args.pieces, [&](int64_t row, bool is_there) {
    weighted.look_at(args.parts.part(row, own.m));
    weighted.find_slopes();
    weighted.for_each_channel([&](int64_t c, A residual, A, A towards) {
      if (args.grad_input != nullptr) {
        const A gradient = factor * weighted.gradient(c, residual);
        if (is_there && c % codeword_group == weighted.lane()) {
          args.grad_input[args.parts.offset(row, own.m) + c] = device::narrow<T>(gradient);
        }
      }
      if (is_there && sum != nullptr) {
        weighted.add_gradient(c, residual, towards, sum);
      }
    });
  });
}

inline constexpr int sums_of_block = device::warp_size, warps_of_sums = 8;

// A block has sums_of_block neighbouring sums over pieces; its warps take the pieces by turns.
template <typename T>
__global__ void sum_piece_gradients(QuantizationGradient<T> args) {
  using A = accumulate_t<T>;
  device::SharedMemory memory;
  A* const of_warps = memory.take<A>(warps_of_sums * sums_of_block);
  const int64_t index = blockIdx.x * int64_t{sums_of_block} + device::lane_index();
  A sum = 0;
  if (index < args.num_sums()) {
    for (int64_t piece = device::warp_index(); piece < args.pieces.num_pieces; piece += warps_of_sums) {
      sum += args.piece_gradients[piece * args.num_sums() + index];
    }
  }
  of_warps[threadIdx.x] = sum;
  device::syncthreads();
  if (device::warp_index() == 0 && index < args.num_sums()) {
    A total = 0;
    for (int warp = 0; warp < warps_of_sums; ++warp) {
      total += of_warps[warp * sums_of_block + device::lane_index()];
    }
    args.grad_codewords[index] = args.factor() * total;
  }
}

}  // namespace torchops::kernels::sparse_attention
