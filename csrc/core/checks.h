#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torchops {

// Input checks of one operator. Every message reads
//   <op>: expected <argument> <what it should be>, got <what it is>
// and is raised as a ValueError. The checks look at metadata only, never at data, so a fake tensor
// and a real one raise the same error.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  // dims names the dimensions and thereby counts them: "[B, N, C]".
  void rank(const char* name, const at::Tensor& tensor, const char* dims) const;
  // Of at least one dimension: "[..., in]".
  void not_scalar(const char* name, const at::Tensor& tensor, const char* dims) const;
  void shape(const char* name, const at::Tensor& tensor, const char* dims, c10::SymIntArrayRef expected) const;
  void dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected) const;
  // float64, float32, bfloat16 or float16.
  void floating(const char* name, const at::Tensor& tensor) const;
  void same_device(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) const;
  void same_dtype(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) const;
  // An optional tensor that is needed because of `reason`.
  void given(const char* name, const std::optional<at::Tensor>& tensor, const char* reason) const;
  // An optional argument that means nothing because of `reason`.
  void absent(const char* name, bool is_given, const char* reason) const;
  void absent(const char* name, const std::optional<at::Tensor>& tensor, const char* reason) const;
  void one_of(const char* name, std::string_view value, const std::vector<std::string_view>& allowed) const;
  // Sizes that have no names of their own.
  void sizes(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected) const;
  // uint8 or int16.
  void index_dtype(const char* name, const at::Tensor& tensor) const;
  // int64 or int32.
  void integer_dtype(const char* name, const at::Tensor& tensor) const;
  void at_least(const char* name, const c10::SymInt& value, int64_t lowest) const;
  // 0 <= value <= highest, where highest_name says what the bound is.
  void at_most(const char* name, const c10::SymInt& value, const char* highest_name, const c10::SymInt& highest) const;
  void equal(const char* name, const c10::SymInt& value, const char* expected_name, const c10::SymInt& expected) const;
  void between(const char* name, const c10::SymInt& value, int64_t lowest, int64_t highest) const;
  void multiple_of(const char* name, const c10::SymInt& value, const char* unit_name, const c10::SymInt& unit) const;

 private:
  const char* op_;
};

// Sizes as messages show them: "[2, 197, 768]".
std::string shape_string(c10::SymIntArrayRef sizes);

}  // namespace torchops
