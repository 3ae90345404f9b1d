#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/heads.h"
#include "core/rows.h"
#include "core/scalar.h"

// From torch's tensors to what kernels take.

namespace torchops {

template <typename T>
struct type_tag {
  using type = T;
};

// Calls body(type_tag<T>{}) with the kernels' type for a floating dtype that the checks let through.
template <typename Body>
void for_dtype(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kDouble:
      return body(type_tag<double>{});
    case at::kFloat:
      return body(type_tag<float>{});
    case at::kBFloat16:
      return body(type_tag<kernels::bfloat16>{});
    case at::kHalf:
      return body(type_tag<kernels::float16>{});
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for dtype ", dtype);
  }
}

// The tensor itself where its last dimension is contiguous (other strides are free), else a copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// [batches, rows, columns], of which one of the last two dimensions is contiguous: the tensor itself, else a copy.
inline at::Tensor with_a_unit_stride(const at::Tensor& matrices) {
  return matrices.stride(1) == 1 || matrices.stride(2) == 1 ? matrices : matrices.contiguous();
}

// T: all dimensions but the last are tokens.
inline c10::SymInt num_tokens(const at::Tensor& tensor) {
  c10::SymInt count = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) {
    count *= size;
  }
  return count;
}

// [..., size] -> [T, size], contiguous: the bits of a dense product depend on the memory layout.
inline at::Tensor as_tokens(const at::Tensor& tensor) {
  return tensor.reshape({num_tokens(tensor).expect_int(), tensor.size(-1)}).contiguous();
}

// Contiguous and of the dtype; undefined where it is absent.
inline at::Tensor contiguous_or_undefined(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
  return tensor ? tensor->to(dtype).contiguous() : at::Tensor();
}

// [B, N, C] with contiguous rows.
template <typename T>
kernels::Rows<const T> rows(const at::Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
kernels::Rows<T> mutable_rows(const at::Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// [B, H, L, D] with contiguous rows; no data where the tensor is undefined.
template <typename T>
kernels::Heads<const T> heads(const at::Tensor& tensor) {
  return tensor.defined() ? kernels::Heads<const T>{static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0),
                                                    tensor.stride(1), tensor.stride(2)}
                          : kernels::Heads<const T>{};
}

// The same to write to.
template <typename T>
kernels::Heads<T> mutable_heads(const at::Tensor& tensor) {
  return tensor.defined() ? kernels::Heads<T>{static_cast<T*>(tensor.mutable_data_ptr()), tensor.stride(0),
                                              tensor.stride(1), tensor.stride(2)}
                          : kernels::Heads<T>{};
}

// A kernel's pointer is null, and its Heads and Rows have no data, where the tensor is absent.
template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? data_or_null<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace torchops
