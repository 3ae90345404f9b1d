#include "stf/cpu/nonfinite_tokens.h"

#include <ATen/ops/zeros.h>

namespace torchops {
namespace {

// An exponent of ones only.
template <typename Bits>
bool has_nonfinite(const void* numbers, int64_t count, Bits exponent) {
  const auto* const bits = static_cast<const Bits*>(numbers);
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) {
    found |= static_cast<Bits>((bits[i] & exponent) == exponent);
  }
  return found != 0;
}

bool has_nonfinite(const void* numbers, int64_t count, at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return has_nonfinite<uint64_t>(numbers, count, 0x7ff0000000000000);
    case at::kFloat:
      return has_nonfinite<uint32_t>(numbers, count, 0x7f800000);
    case at::kBFloat16:
      return has_nonfinite<uint16_t>(numbers, count, 0x7f80);
    default:
      return has_nonfinite<uint16_t>(numbers, count, 0x7c00);
  }
}

}  // namespace

at::Tensor nonfinite_tokens(const at::Tensor& atoms) {
  const auto num_blocks = atoms.size(0), num_tokens = atoms.size(1), size = atoms.size(2);
  const auto row_bytes = size * static_cast<int64_t>(atoms.element_size());
  const auto* const numbers = static_cast<const char*>(atoms.const_data_ptr());
  const auto dtype = atoms.scalar_type();
  if (!has_nonfinite(numbers, atoms.numel(), dtype)) {
    return {};
  }
  auto found = at::zeros({num_tokens}, atoms.options().dtype(at::kBool));
  auto* const flags = found.mutable_data_ptr<bool>();
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      flags[token] |= has_nonfinite(numbers + (block * num_tokens + token) * row_bytes, size, dtype);
    }
  }
  return found.nonzero().squeeze(1);
}

}  // namespace torchops
