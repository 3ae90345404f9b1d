#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <optional>
#include <tuple>

#include "core/attention/attention.h"
#include "core/checks.h"
#include "core/tensors.h"

// From an operator's arguments to what the kernels of every attention take. Arguments are structs as
// core/argument_structs.h has them; families derive theirs, or hold them.

namespace torchops {

// What a tile of every kernel has room for.
inline constexpr int64_t largest_head_dim = 256;

// Arguments of every attention behind query, key and value.
struct AttentionSides {
  const std::optional<at::Tensor>& key_bias;     // [B, Lk]
  const std::optional<at::Tensor>& sink;         // [Hq]
  const std::optional<at::Tensor>& query_start;  // [B]
  const std::optional<at::Tensor>& key_start;    // [B]

  auto members() const { return std::tie(key_bias, sink, query_start, key_start); }
};

// Which of query, key, value, key_bias, sink and the family's own inputs of scores have gradients, and what those are
// made of.
template <size_t count>
struct AttentionMask {
  std::array<bool, count> wanted;

  auto members() const { return std::tie(wanted); }
  bool query() const { return wanted[0]; }
  bool key() const { return wanted[1]; }
  bool value() const { return wanted[2]; }
  bool key_bias() const { return wanted[3]; }
  bool sink() const { return wanted[4]; }
  bool of_family() const {
    for (size_t i = 5; i < count; ++i) {
      if (wanted[i]) {
        return true;
      }
    }
    return false;
  }
  // Gradients to scores take probabilities, and of a gradient to the output its products with values, less delta.
  bool scores() const { return query() || key() || key_bias() || of_family(); }
  // Probabilities take queries, keys, their biases and positions.
  bool probabilities() const { return scores() || value(); }
  // Delta takes the output.
  bool delta() const { return scores() || sink(); }
  // Without side inputs.
  AttentionMask of_rows() const { return {{query(), key(), value()}}; }
};

// The first arguments of every backward; absent is what the gradients are not made of.
struct AttentionGradients {
  const std::optional<at::Tensor>& grad_output;     // [B, Hq, Lq, Dv]
  const std::optional<at::Tensor>& grad_logsumexp;  // [B, Hq, Lq]
  const std::optional<at::Tensor>& query;
  const std::optional<at::Tensor>& key;
  const std::optional<at::Tensor>& value;
  const std::optional<at::Tensor>& output;  // [B, Hq, Lq, Dv]
  const at::Tensor& normalizer;             // [B, Hq, Lq, 2]

  auto members() const { return std::tie(grad_output, grad_logsumexp, query, key, value, output, normalizer); }
  // Without a gradient to the output, values and outputs are as if they had no columns.
  int64_t value_dim() const { return grad_output ? grad_output->size(3) : 0; }
  // Those of rows of queries; the others are not looked at.
  kernels::attention::Sizes row_sizes() const {
    return {normalizer.size(0), normalizer.size(1), normalizer.size(1), normalizer.size(2), 0, 0, value_dim()};
  }
};

// Sides that go with queries and keys of any kind; the tensor of queries has a name in messages.
void check_key_bias(const Checks& check, const std::optional<at::Tensor>& key_bias, const c10::SymInt& batch,
                    const c10::SymInt& num_keys, const char* query_name, const at::Tensor& query);
void check_starts(const Checks& check, const std::optional<at::Tensor>& query_start,
                  const std::optional<at::Tensor>& key_start, const c10::SymInt& batch, const char* query_name,
                  const at::Tensor& query);
// value may be undefined: the backward does not always need it.
void check_attention(const Checks& check, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionSides& sides);
// What is given as far as it goes together; families check that what is needed is given.
void check_attention_rows(const Checks& check, const AttentionGradients& args, const AttentionSides& sides);

// That what the gradients asked for are made of is given.
template <size_t count>
void check_attention_given(const Checks& check, const AttentionGradients& args, const AttentionSides& sides,
                           const AttentionMask<count>& mask) {
  if (mask.probabilities()) {
    check.given("query", args.query, "probabilities are made of it");
    check.given("key", args.key, "probabilities are made of it");
  }
  if (mask.value()) {
    check.given("grad_output", args.grad_output, "value's gradient is asked for");
  }
  if (args.grad_output && mask.scores()) {
    check.given("value", args.value, "gradients to scores are made of it");
  }
  if (args.grad_output && mask.delta()) {
    check.given("output", args.output, "the gradients asked for are made of it");
  }
  if (mask.key_bias()) {
    check.given("key_bias", sides.key_bias, "its gradient is asked for");
  }
  if (mask.sink()) {
    check.given("sink", sides.sink, "its gradient is asked for");
  }
}

at::Tensor empty_with_layout_of(const at::Tensor& model, const c10::SymInt& last_dim);
at::Tensor empty_logsumexp(const at::Tensor& query);
at::Tensor empty_normalizer(const at::Tensor& query);
// For a gradient to a side input; undefined where it is not wanted.
at::Tensor empty_side(bool wanted, const std::optional<at::Tensor>& of);

// Of the shape and layout of gradients to query, key, value (in key's layout), key_bias and sink; undefined where they
// are not wanted.
template <size_t count>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> empty_attention_gradients(
    const AttentionGradients& args, const AttentionSides& sides, const AttentionMask<count>& mask) {
  const auto rows = [](bool wanted, const std::optional<at::Tensor>& model, const std::optional<at::Tensor>& columns) {
    return wanted ? empty_with_layout_of(*model, columns->sym_size(3)) : at::Tensor();
  };
  return {rows(mask.query(), args.query, args.query), rows(mask.key(), args.key, args.key),
          rows(mask.value(), args.key, args.grad_output), empty_side(mask.key_bias(), sides.key_bias),
          empty_side(mask.sink(), sides.sink)};
}

// The tensors as kernels read them, kept alive for as long as their arguments are used: rows are contiguous,
// side inputs contiguous and of the accumulation dtype, positions int64.
class AttentionTensors {
 public:
  // value may be undefined, where value_dim tells how many columns it would have.
  AttentionTensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t value_dim,
                   const AttentionSides& sides, std::optional<double> scale)
      : query_(with_contiguous_rows(query)),
        key_(with_contiguous_rows(key)),
        value_(value.defined() ? with_contiguous_rows(value) : value),
        value_dim_(value_dim),
        key_bias_(contiguous_or_undefined(sides.key_bias, accumulated())),
        sink_(contiguous_or_undefined(sides.sink, accumulated())),
        query_start_(contiguous_or_undefined(sides.query_start, at::kLong)),
        key_start_(contiguous_or_undefined(sides.key_start, at::kLong)),
        scale_(scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3))))) {}

  kernels::attention::Sizes sizes() const {
    return {query_.size(0), query_.size(1), key_.size(1), query_.size(2), key_.size(2), query_.size(3), value_dim_};
  }

 protected:
  at::ScalarType accumulated() const { return at::toOpMathType(query_.scalar_type()); }

  template <typename T>
  kernels::attention::Inputs<T> inputs() const {
    using A = kernels::accumulate_t<T>;
    return {heads<T>(query_),
            heads<T>(key_),
            heads<T>(value_),
            data_or_null<A>(key_bias_),
            data_or_null<A>(sink_),
            data_or_null<int64_t>(query_start_),
            data_or_null<int64_t>(key_start_),
            sizes(),
            static_cast<A>(scale_)};
  }

 private:
  at::Tensor query_, key_, value_;
  int64_t value_dim_;
  at::Tensor key_bias_, sink_, query_start_, key_start_;
  double scale_;
};

template <typename A>
kernels::attention::Normalizer<A>* normalizers(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<kernels::attention::Normalizer<A>*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace torchops
