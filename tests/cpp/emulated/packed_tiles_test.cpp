// Products with a packed factor on tiles against plain loops, without torch.

#include "stf/cpu/packed_tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bfloat16_numbers.h"
#include "catch.h"
#include "core/cpu/aligned_buffer.h"

namespace {

namespace stf = torchops::kernels::stf;
using stf::PackedTileProduct;
using stf::rows_per_group;
using torchops::kernels::bfloat16;

struct Sizes {
  int64_t tokens, blocks, basis_size, rows, nnz;
};
const std::vector<Sizes> all_sizes = {
    {64, 1, 32, 32, 16},   {70, 2, 33, 40, 5},   {100, 3, 7, 17, 3},
    {33, 1, 130, 100, 64}, {600, 1, 65, 50, 65}, {1, 2, 1, 1, 1},
};

// A factor, packed and as a matrix, and tokens whose rows lie further apart than they are long.
struct Factor {
  Sizes sizes;
  std::vector<bfloat16> values;
  std::vector<uint16_t> masks;
  std::vector<double> matrix;  // [rows][blocks][K]

  Factor(const Sizes& given, std::mt19937& generator)
      : sizes(given), matrix(static_cast<size_t>(given.rows * given.blocks * given.basis_size)) {
    std::normal_distribution<double> normal;
    const int64_t groups = (sizes.rows + rows_per_group - 1) / rows_per_group;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t block = 0; block < sizes.blocks; ++block) {
        std::vector<uint16_t> mask(static_cast<size_t>(sizes.basis_size));
        std::vector<size_t> columns(mask.size());
        std::iota(columns.begin(), columns.end(), size_t{0});
        for (int64_t row = 0; row < rows_per_group; ++row) {
          std::shuffle(columns.begin(), columns.end(), generator);
          for (int64_t e = 0; e < sizes.nnz; ++e) {
            mask[columns[static_cast<size_t>(e)]] |= static_cast<uint16_t>(1 << row);
          }
        }
        for (size_t column = 0; column < mask.size(); ++column) {
          for (int64_t r = 0; r < rows_per_group; ++r) {
            const int64_t row = group * rows_per_group + r;
            if (mask[column] >> r & 1) {
              values.push_back(row < sizes.rows ? rounded(normal(generator)) : bfloat16{0});
              if (row < sizes.rows) {
                matrix[static_cast<size_t>((row * sizes.blocks + block) * sizes.basis_size) + column] =
                    value_of(values.back());
              }
            }
          }
        }
        masks.insert(masks.end(), mask.begin(), mask.end());
      }
    }
  }
};

constexpr int64_t gap = 3;
constexpr bfloat16 unwritten{0x7fff};

bool multiply(const PackedTileProduct& args, int64_t threads) {
  const int64_t units = stf::amx::packed_tile_units(args), share = (units + threads - 1) / threads;
  const auto bytes = static_cast<size_t>(stf::amx::packed_tile_scratch_bytes(args));
  bool right = true;
  for (int64_t begin = 0; begin < units; begin += share) {
    torchops::AlignedBuffer<char> scratch(bytes);
    std::memset(scratch.data(), 0xff, bytes);
    right = stf::amx::packed_tile_product(args, scratch.data(), begin, std::min(begin + share, units)) && right;
  }
  return right;
}

}  // namespace

TEST_CASE("products with a packed factor on tiles are what plain loops compute, split among any number of threads") {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  for (const auto& sizes : all_sizes) {
    const Factor factor(sizes, generator);
    for (const bool to_atoms : {false, true}) {
      for (const bool with_bias : {false, true}) {
        if (to_atoms && with_bias) {
          continue;
        }
        CAPTURE(sizes.tokens, sizes.blocks, sizes.basis_size, sizes.rows, sizes.nnz, to_atoms, with_bias);
        const int64_t in_blocks = to_atoms ? 1 : sizes.blocks, out_blocks = to_atoms ? sizes.blocks : 1;
        const int64_t in = to_atoms ? sizes.rows : sizes.basis_size, out = to_atoms ? sizes.basis_size : sizes.rows;
        const int64_t stride = in + gap;
        std::vector<bfloat16> tokens(static_cast<size_t>(in_blocks * sizes.tokens * stride), unwritten);
        for (size_t i = 0; i < tokens.size(); ++i) {
          if (static_cast<int64_t>(i) % stride < in) {
            tokens[i] = rounded(normal(generator));
          }
        }
        std::vector<bfloat16> bias(static_cast<size_t>(sizes.rows));
        std::generate(bias.begin(), bias.end(), [&] { return rounded(normal(generator)); });
        std::vector<bfloat16> output(static_cast<size_t>(out_blocks * sizes.tokens * out), unwritten);
        PackedTileProduct args{
            {factor.values.data(), factor.masks.data(), sizes.rows, sizes.blocks, sizes.nnz, sizes.basis_size},
            to_atoms,
            tokens.data(),
            sizes.tokens * stride,
            stride,
            with_bias ? bias.data() : nullptr,
            output.data(),
            sizes.tokens};
        REQUIRE(multiply(args, 1));
        double error = 0;
        for (int64_t block = 0; block < out_blocks; ++block) {
          for (int64_t t = 0; t < sizes.tokens; ++t) {
            for (int64_t o = 0; o < out; ++o) {
              double sum = with_bias ? value_of(bias[static_cast<size_t>(o)]) : 0, magnitude = std::abs(sum);
              for (int64_t b = 0; b < in_blocks; ++b) {
                for (int64_t i = 0; i < in; ++i) {
                  const int64_t row = to_atoms ? i : o, column = to_atoms ? o : i, of = to_atoms ? block : b;
                  const double entry =
                      factor.matrix[static_cast<size_t>((row * sizes.blocks + of) * sizes.basis_size + column)];
                  const double product =
                      entry * value_of(tokens[static_cast<size_t>((b * sizes.tokens + t) * stride + i)]);
                  sum += product;
                  magnitude += std::abs(product);
                }
              }
              const double actual = value_of(output[static_cast<size_t>((block * sizes.tokens + t) * out + o)]);
              error = std::isnan(actual) ? INFINITY : std::max(error, std::abs(actual - sum) / (magnitude + 1e-30));
            }
          }
        }
        CHECK(error <= 5e-3);
        for (const int64_t threads : {2, 3, 1000}) {
          std::vector<bfloat16> again(output.size(), unwritten);
          args.output = again.data();
          REQUIRE(multiply(args, threads));
          CHECK(std::memcmp(again.data(), output.data(), output.size() * sizeof(bfloat16)) == 0);
        }
      }
    }
  }
}

TEST_CASE("a mask with another number of bits is found") {
  std::mt19937 generator(0);
  Factor factor({64, 2, 20, 50, 4}, generator);
  std::vector<bfloat16> tokens(static_cast<size_t>(2 * 64 * 50)), output(tokens.size());
  factor.masks[3 * 2 * 20 + 25] ^= 1;  // of the last group
  for (const bool to_atoms : {false, true}) {
    const PackedTileProduct args{{factor.values.data(), factor.masks.data(), 50, 2, 4, 20},
                                 to_atoms,
                                 tokens.data(),
                                 64 * 20,
                                 to_atoms ? 50 : 20,
                                 nullptr,
                                 output.data(),
                                 64};
    CHECK(!multiply(args, 1));
    CHECK(!multiply(args, 2));
  }
}
