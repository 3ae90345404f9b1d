#include "core/checks.h"

#include <algorithm>
#include <sstream>

namespace torchops {

std::string shape_string(c10::SymIntArrayRef sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i ? ", " : "") << sizes[i];
  }
  out << ']';
  return out.str();
}

void Checks::rank(const char* name, const at::Tensor& tensor, const char* dims) const {
  const std::string_view text(dims);
  const auto expected = 1 + std::count(text.begin(), text.end(), ',');
  TORCH_CHECK_VALUE(tensor.dim() == expected, op_, ": expected ", name, " of shape ", dims, ", got ",
                    shape_string(tensor.sym_sizes()));
}

void Checks::not_scalar(const char* name, const at::Tensor& tensor, const char* dims) const {
  TORCH_CHECK_VALUE(tensor.dim() >= 1, op_, ": expected ", name, " of shape ", dims, ", got []");
}

void Checks::shape(const char* name, const at::Tensor& tensor, const char* dims, c10::SymIntArrayRef expected) const {
  rank(name, tensor, dims);
  const auto sizes = tensor.sym_sizes();
  for (size_t i = 0; i < expected.size(); ++i) {
    TORCH_CHECK_VALUE(sizes[i].sym_eq(expected[i]).expect_true(__FILE__, __LINE__), op_, ": expected ", name,
                      " of shape ", dims, " = ", shape_string(expected), ", got ", shape_string(sizes));
  }
}

void Checks::dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected) const {
  TORCH_CHECK_VALUE(tensor.scalar_type() == expected, op_, ": expected ", name, " of dtype ", expected, ", got ",
                    tensor.scalar_type());
}

void Checks::floating(const char* name, const at::Tensor& tensor) const {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op_,
                    ": expected ", name, " of dtype Double, Float, BFloat16 or Half, got ", dtype);
}

void Checks::same_device(const char* name, const at::Tensor& tensor, const char* other_name,
                         const at::Tensor& other) const {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), op_, ": expected ", name, " on ", other_name, "'s device ",
                    other.device(), ", got ", tensor.device());
}

void Checks::same_dtype(const char* name, const at::Tensor& tensor, const char* other_name,
                        const at::Tensor& other) const {
  TORCH_CHECK_VALUE(tensor.scalar_type() == other.scalar_type(), op_, ": expected ", name, " of ", other_name,
                    "'s dtype ", other.scalar_type(), ", got ", tensor.scalar_type());
}

void Checks::given(const char* name, const std::optional<at::Tensor>& tensor, const char* reason) const {
  TORCH_CHECK_VALUE(tensor.has_value(), op_, ": expected ", name, " to be a tensor because ", reason, ", got None");
}

void Checks::absent(const char* name, bool is_given, const char* reason) const {
  TORCH_CHECK_VALUE(!is_given, op_, ": expected no ", name, " because ", reason, ", got one");
}

void Checks::absent(const char* name, const std::optional<at::Tensor>& tensor, const char* reason) const {
  absent(name, tensor.has_value(), reason);
}

void Checks::one_of(const char* name, std::string_view value, const std::vector<std::string_view>& allowed) const {
  if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
    std::ostringstream list;
    for (size_t i = 0; i < allowed.size(); ++i) {
      list << (i == 0 ? "" : i + 1 == allowed.size() ? " or " : ", ") << allowed[i];
    }
    TORCH_CHECK_VALUE(false, op_, ": expected ", name, " to be ", list.str(), ", got ", value);
  }
}

void Checks::sizes(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected) const {
  const auto actual = tensor.sym_sizes();
  bool same = actual.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = actual[i].sym_eq(expected[i]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(same, op_, ": expected ", name, " of shape ", shape_string(expected), ", got ",
                    shape_string(actual));
}

void Checks::index_dtype(const char* name, const at::Tensor& tensor) const {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kByte || dtype == at::kShort, op_, ": expected ", name,
                    " of dtype Byte or Short, got ", dtype);
}

void Checks::integer_dtype(const char* name, const at::Tensor& tensor) const {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kLong || dtype == at::kInt, op_, ": expected ", name, " of dtype Long or Int, got ",
                    dtype);
}

void Checks::at_least(const char* name, const c10::SymInt& value, int64_t lowest) const {
  TORCH_CHECK_VALUE(value.sym_ge(lowest).expect_true(__FILE__, __LINE__), op_, ": expected ", name, " >= ", lowest,
                    ", got ", value);
}

void Checks::at_most(const char* name, const c10::SymInt& value, const char* highest_name,
                     const c10::SymInt& highest) const {
  at_least(name, value, 0);
  TORCH_CHECK_VALUE(value.sym_le(highest).expect_true(__FILE__, __LINE__), op_, ": expected ", name,
                    " <= ", highest_name, " = ", highest, ", got ", value);
}

void Checks::equal(const char* name, const c10::SymInt& value, const char* expected_name,
                   const c10::SymInt& expected) const {
  TORCH_CHECK_VALUE(value.sym_eq(expected).expect_true(__FILE__, __LINE__), op_, ": expected ", name, " to be ",
                    expected_name, " = ", expected, ", got ", value);
}

void Checks::between(const char* name, const c10::SymInt& value, int64_t lowest, int64_t highest) const {
  TORCH_CHECK_VALUE(
      value.sym_ge(lowest).expect_true(__FILE__, __LINE__) && value.sym_le(highest).expect_true(__FILE__, __LINE__),
      op_, ": expected ", name, " in ", lowest, "..", highest, ", got ", value);
}

void Checks::multiple_of(const char* name, const c10::SymInt& value, const char* unit_name,
                         const c10::SymInt& unit) const {
  TORCH_CHECK_VALUE((value % unit).sym_eq(0).expect_true(__FILE__, __LINE__), op_, ": expected ", name,
                    " to be a multiple of ", unit_name, " = ", unit, ", got ", value);
}

}  // namespace torchops
