#include "core/cpu/dense_product.h"

#include "core/cpu/product_list.h"
#include "core/tensors.h"

namespace torchops {
namespace {

template <typename T>
kernels::core::Matrices<T> matrices(const at::Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace

void dense_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& output,
                   const std::optional<at::Tensor>& bias) {
  // A single column lies along the depth, whatever its strides say.
  const bool one_column = right.size(2) == 1;
  const auto l = with_a_unit_stride(left);
  const auto r = one_column ? right.transpose(1, 2).contiguous().transpose(1, 2) : with_a_unit_stride(right);
  const auto b = bias ? with_contiguous_rows(*bias) : at::Tensor();
  for_dtype(left.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::core::DenseProduct<T> args{left.size(0),
                                        left.size(1),
                                        right.size(2),
                                        left.size(2),
                                        matrices<T>(l),
                                        matrices<T>(r),
                                        data_or_null<T>(b),
                                        b.defined() ? b.stride(0) : 0,
                                        static_cast<T*>(output.mutable_data_ptr()),
                                        output.stride(0),
                                        output.stride(1)};
    if (one_column) {
      args.right.row_stride = 1;
      args.right.column_stride = 0;
    }
    ProductList<T> products;
    products.add(args);
    products.run();
  });
}

}  // namespace torchops
