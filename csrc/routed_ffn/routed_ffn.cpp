#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "core/tensors.h"
#include "routed_ffn/arguments.h"
#include "routed_ffn/routed_ffn.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "routed_ffn(Tensor input, Tensor index, Tensor? gate, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None,"
      " Tensor? w_gate=None, Tensor? lora_a1=None, Tensor? lora_b1=None, Tensor? lora_a2=None, Tensor? lora_b2=None, *,"
      " str activation='relu', str glu='none', float alpha=1.0, float? limit=None, float up_offset=0.0,"
      " str gate_at='output', float lora_scale=1.0, bool recompute=False) -> Tensor");
  // What the backward needs beside: W1 x + b1 by entry of the index, sorted by block.
  m.def(
      "_routed_ffn_forward(Tensor input, Tensor index, Tensor? gate, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2,"
      " Tensor? w_gate, Tensor? lora_a1, Tensor? lora_b1, Tensor? lora_a2, Tensor? lora_b2, *, str activation, str glu,"
      " float alpha, float? limit, float up_offset, str gate_at, float lora_scale, bool recompute)"
      " -> (Tensor output, Tensor preactivation)");
  m.def(
      "_routed_ffn_backward(Tensor grad_output, Tensor? input, Tensor index, Tensor? gate, Tensor w1, Tensor w2,"
      " Tensor? b1, Tensor? b2, Tensor? w_gate, Tensor? lora_a1, Tensor? lora_b1, Tensor? lora_a2, Tensor? lora_b2,"
      " Tensor? preactivation, *, str activation, str glu, float alpha, float? limit, float up_offset, str gate_at,"
      " float lora_scale, bool recompute, bool[11] output_mask) -> (Tensor grad_input, Tensor grad_gate,"
      " Tensor grad_w1, Tensor grad_w2, Tensor grad_b1, Tensor grad_b2, Tensor grad_w_gate, Tensor grad_lora_a1,"
      " Tensor grad_lora_b1, Tensor grad_lora_a2, Tensor grad_lora_b2)");
}

// ---- options ----------------------------------------------------------------------------------

namespace {

using kernels::routed_ffn::ActivationKind;
using kernels::routed_ffn::GatedUnits;

const std::vector<std::pair<std::string_view, ActivationKind>> activations = {{"relu", ActivationKind::relu},
                                                                              {"relu2", ActivationKind::relu2},
                                                                              {"gelu", ActivationKind::gelu},
                                                                              {"gelu_tanh", ActivationKind::gelu_tanh},
                                                                              {"silu", ActivationKind::silu}};
const std::vector<std::pair<std::string_view, GatedUnits>> glus = {{"none", GatedUnits::none},
                                                                   {"split", GatedUnits::side_by_side},
                                                                   {"concat", GatedUnits::side_by_side},
                                                                   {"interleaved", GatedUnits::interleaved}};

template <typename Value>
Value value_of(const std::vector<std::pair<std::string_view, Value>>& known, std::string_view name) {
  for (const auto& [known_name, value] : known) {
    if (known_name == name) {
      return value;
    }
  }
  TORCH_INTERNAL_ASSERT(false, "the checks let ", name, " through");
}

template <typename Value>
void check_name(const Checks& check, const char* argument, std::string_view name,
                const std::vector<std::pair<std::string_view, Value>>& known) {
  std::vector<std::string_view> names;
  names.reserve(known.size());
  for (const auto& entry : known) {
    names.push_back(entry.first);
  }
  check.one_of(argument, name, names);
}

}  // namespace

kernels::routed_ffn::Activation FeedForwardOptions::kernel_activation() const {
  return {value_of(activations, activation), value_of(glus, glu), alpha,
          limit.value_or(std::numeric_limits<double>::infinity()), up_offset};
}

// ---- checks -----------------------------------------------------------------------------------

namespace {

c10::SymInt preactivation_size(const FeedForwardWeights& weights) {
  return weights.w_gate ? weights.w1.sym_size(1) + weights.w_gate->sym_size(1) : weights.w1.sym_size(1);
}

void check_low_rank(const Checks& check, const char* a_name, const std::optional<at::Tensor>& a, const char* b_name,
                    const std::optional<at::Tensor>& b, const at::Tensor& weight, const c10::SymInt& in,
                    const c10::SymInt& out, bool shares_a) {
  if (a || b) {
    check.given(a_name, a, "the other factor is given");
    check.given(b_name, b, "the other factor is given");
    const auto blocks_of = [&](const at::Tensor& factor, bool may_be_shared) {
      return may_be_shared && factor.dim() == 3 && factor.sym_size(0) == 1 ? c10::SymInt(1) : weight.sym_size(0);
    };
    check.rank(a_name, *a, "[G, r, in]");
    check.shape(a_name, *a, "[G, r, in]", {{blocks_of(*a, shares_a), a->sym_size(1), in}});
    check.shape(b_name, *b, "[G, out, r]", {{blocks_of(*b, !shares_a), out, a->sym_size(1)}});
  }
}

// `like` has the dtype and device that all weights must have.
void check_weights(const Checks& check, const FeedForwardWeights& weights, const FeedForwardOptions& options,
                   const char* like_name, const at::Tensor& like) {
  check_name(check, "activation", options.activation, activations);
  check_name(check, "glu", options.glu, glus);
  check.one_of("gate_at", options.gate_at, {"output", "input", "both"});
  const auto& [w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2] = weights;
  const auto hidden_size = like.sym_size(-1);
  check.rank("w1", w1, "[G, N1, d]");
  check.rank("w2", w2, "[G, d, N]");
  const auto &num_blocks = w1.sym_size(0), &size = w2.sym_size(2);
  const bool is_split = options.glu == "split";
  check.shape("w1", w1, "[G, N1, d]", {{num_blocks, options.is_gated() && !is_split ? size * 2 : size, hidden_size}});
  check.shape("w2", w2, "[G, d, N]", {{num_blocks, hidden_size, size}});
  check.between("G", num_blocks, 1, 1 << 20);
  if (is_split) {
    check.given("w_gate", w_gate, "glu is split");
    check.shape("w_gate", *w_gate, "[G, N, d]", {{num_blocks, size, hidden_size}});
  } else {
    check.absent("w_gate", w_gate, "glu is not split");
  }
  if (b1) {
    check.shape("b1", *b1, "[G, preactivations]", {{num_blocks, preactivation_size(weights)}});
  }
  if (b2 && b2->dim() == 1) {
    check.shape("b2", *b2, "[d]", {{hidden_size}});
  } else if (b2) {
    check.shape("b2", *b2, "[G, d]", {{num_blocks, hidden_size}});
  }
  check_low_rank(check, "lora_a1", lora_a1, "lora_b1", lora_b1, w1, hidden_size, preactivation_size(weights), true);
  check_low_rank(check, "lora_a2", lora_a2, "lora_b2", lora_b2, w1, size, hidden_size, false);
  for (const auto& [name, weight] : {std::pair{"w1", optional_tensor(w1)},
                                     {"w2", w2},
                                     {"b1", b1},
                                     {"b2", b2},
                                     {"w_gate", w_gate},
                                     {"lora_a1", lora_a1},
                                     {"lora_b1", lora_b1},
                                     {"lora_a2", lora_a2},
                                     {"lora_b2", lora_b2}}) {
    if (weight) {
      check.same_dtype(name, *weight, like_name, like);
      check.same_device(name, *weight, like_name, like);
    }
  }
  if (!options.is_gated()) {
    check.absent("limit", options.limit.has_value(), "glu is none");
    check.absent("up_offset", options.up_offset != 0, "glu is none");
  }
}

void check_choice(const Checks& check, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                  const char* like_name, const at::Tensor& like) {
  check.not_scalar("index", index, "[..., k]");
  check.integer_dtype("index", index);
  c10::SymDimVector sizes(like.sym_sizes());
  sizes.back() = index.sym_size(-1);
  check.sizes("index", index, sizes);
  check.same_device("index", index, like_name, like);
  if (gate) {
    check.sizes("gate", *gate, sizes);
    check.floating("gate", *gate);
    check.same_device("gate", *gate, like_name, like);
  }
  if (const auto entries = index.sym_numel().maybe_as_int()) {
    check.at_most("index's entries", *entries, "the largest 32-bit integer", INT32_MAX);
  }
}

}  // namespace

void check_routed_ffn(const char* op, const at::Tensor& input, const at::Tensor& index,
                      const std::optional<at::Tensor>& gate, const FeedForwardWeights& weights,
                      const FeedForwardOptions& options) {
  const Checks check(op);
  check.not_scalar("input", input, "[..., d]");
  check.floating("input", input);
  check_weights(check, weights, options, "input", input);
  check_choice(check, index, gate, "input", input);
}

void check_routed_ffn_backward(const FeedForwardBackward& args) {
  const Checks check("_routed_ffn_backward");
  check.not_scalar("grad_output", args.grad_output, "[..., d]");
  check.floating("grad_output", args.grad_output);
  check_weights(check, args.weights, args.options, "grad_output", args.grad_output);
  check_choice(check, args.index, args.gate, "grad_output", args.grad_output);
  if (needs_input(args.mask(), args.gate, args.options)) {
    check.given("input", args.input, "a gradient that is asked for takes it");
  }
  if (args.input) {
    check.sizes("input", *args.input, args.grad_output.sym_sizes());
    check.same_dtype("input", *args.input, "grad_output", args.grad_output);
    check.same_device("input", *args.input, "grad_output", args.grad_output);
  }
  if (!args.options.recompute) {
    check.given("preactivation", args.preactivation, "it is not computed again");
    check.shape("preactivation", *args.preactivation, "[T k, preactivations]",
                {{args.index.sym_numel(), preactivation_size(args.weights)}});
    check.same_dtype("preactivation", *args.preactivation, "grad_output", args.grad_output);
    check.same_device("preactivation", *args.preactivation, "grad_output", args.grad_output);
  }
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor routed_ffn_meta(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                           const FeedForwardWeights& weights, const FeedForwardOptions& options) {
  check_routed_ffn("routed_ffn", input, index, gate, weights, options);
  return at::empty_symint(input.sym_sizes(), input.options());
}

std::tuple<at::Tensor, at::Tensor> routed_ffn_forward_meta(const at::Tensor& input, const at::Tensor& index,
                                                           const std::optional<at::Tensor>& gate,
                                                           const FeedForwardWeights& weights,
                                                           const FeedForwardOptions& options) {
  check_routed_ffn("_routed_ffn_forward", input, index, gate, weights, options);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty_symint({num_tokens(input) * index.sym_size(-1), preactivation_size(weights)}, input.options())};
}

FeedForwardGradients routed_ffn_backward_meta(const FeedForwardBackward& args) {
  check_routed_ffn_backward(args);
  const auto mask = args.mask();
  const auto& [w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2] = args.weights;
  const auto contiguous = [](bool wanted, const std::optional<at::Tensor>& tensor) {
    return wanted && tensor ? at::empty_symint(tensor->sym_sizes(), tensor->options()) : at::Tensor();
  };
  const auto as_it_lies = [](bool wanted, const std::optional<at::Tensor>& tensor) {
    return wanted && tensor ? at::empty_like(*tensor) : at::Tensor();
  };
  return {contiguous(mask.input(), args.grad_output),
          contiguous(mask.gate(), args.gate),
          as_it_lies(mask.w1(), w1),
          as_it_lies(mask.w2(), w2),
          contiguous(mask.b1(), b1),
          contiguous(mask.b2(), b2),
          as_it_lies(mask.w_gate(), w_gate),
          as_it_lies(mask.lora_a1(), lora_a1),
          as_it_lies(mask.lora_b1(), lora_b1),
          as_it_lies(mask.lora_a2(), lora_a2),
          as_it_lies(mask.lora_b2(), lora_b2)};
}

at::Tensor call_routed_ffn(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                           const FeedForwardWeights& weights, const FeedForwardOptions& options) {
  static const auto op = find_operator<decltype(routed_ffn_meta)>("routed_ffn");
  return op(input, index, gate, weights, options);
}

// ---- gradient ---------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In the order of the schema, absent ones undefined.
variable_list all_tensors(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                          const FeedForwardWeights& weights) {
  variable_list tensors = {input, index, value_or_undefined(gate)};
  std::apply([&](const auto&... weight) { (tensors.push_back(value_or_undefined(weight)), ...); }, weights.members());
  return tensors;
}

// Positions of the tensors with a gradient among all of them, in the order of the mask: index has none.
constexpr std::array<int, 11> positions = {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

struct RoutedFfn : torch::autograd::Function<RoutedFfn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& index,
                            const std::optional<at::Tensor>& gate, const at::Tensor& w1, const at::Tensor& w2,
                            const std::optional<at::Tensor>& b1, const std::optional<at::Tensor>& b2,
                            const std::optional<at::Tensor>& w_gate, const std::optional<at::Tensor>& lora_a1,
                            const std::optional<at::Tensor>& lora_b1, const std::optional<at::Tensor>& lora_a2,
                            const std::optional<at::Tensor>& lora_b2, const FeedForwardOptions& options) {
    static const auto op = find_operator<decltype(routed_ffn_forward_meta)>("_routed_ffn_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const FeedForwardWeights weights{w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2};
    auto saved = all_tensors(input, index, gate, weights);
    GivenTensors::save(ctx, saved);
    FeedForwardMask mask{};
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto& tensor = saved[static_cast<size_t>(positions[i])];
      mask.wanted[i] = tensor.defined() && tensor.requires_grad();
    }
    at::Tensor output, preactivation;
    if (options.recompute) {
      output = call_routed_ffn(input, index, gate, weights, options);
    } else {
      std::tie(output, preactivation) = op(input, index, gate, weights, options);
    }
    if (!needs_input(mask, gate, options)) {
      saved[0] = at::Tensor();
    }
    saved.push_back(preactivation);
    ctx->save_for_backward(saved);
    ctx->set_materialize_grads(false);
    ctx->saved_data["activation"] = std::string(options.activation);
    ctx->saved_data["glu"] = std::string(options.glu);
    ctx->saved_data["alpha"] = options.alpha;
    ctx->saved_data["limit"] = options.limit;
    ctx->saved_data["up_offset"] = options.up_offset;
    ctx->saved_data["gate_at"] = std::string(options.gate_at);
    ctx->saved_data["lora_scale"] = options.lora_scale;
    ctx->saved_data["recompute"] = options.recompute;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_operator<decltype(routed_ffn_backward_meta)>("_routed_ffn_backward");
    variable_list result(13);
    if (!grads[0].defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    std::vector<std::optional<at::Tensor>> given;
    given.reserve(saved.size());
    for (const auto& tensor : saved) {
      given.push_back(optional_tensor(tensor));
    }
    auto& data = ctx->saved_data;
    const FeedForwardOptions options{data["activation"].toStringView(), data["glu"].toStringView(),
                                     data["alpha"].toDouble(),          data["limit"].toOptional<double>(),
                                     data["up_offset"].toDouble(),      data["gate_at"].toStringView(),
                                     data["lora_scale"].toDouble(),     data["recompute"].toBool()};
    std::array<bool, 11> mask{};
    for (size_t i = 0; i < positions.size(); ++i) {
      mask[i] = GivenTensors::needs_grad(ctx, positions[i]);
    }
    const auto computed = op(FeedForwardBackward{
        grads[0],
        given[0],
        saved[1],
        given[2],
        {saved[3], saved[4], given[5], given[6], given[7], given[8], given[9], given[10], given[11]},
        given[12],
        options,
        mask});
    std::apply(
        [&](const auto&... grad) {
          size_t i = 0;
          ((result[static_cast<size_t>(positions[i++])] = grad), ...);
        },
        computed);
    return result;
  }
};

at::Tensor routed_ffn_autograd(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                               const FeedForwardWeights& weights, const FeedForwardOptions& options) {
  const auto tensors = all_tensors(input, index, gate, weights);
  refuse_tangents("routed_ffn", tensors);
  if (any_requires_grad(tensors)) {
    check_routed_ffn("routed_ffn", input, index, gate, weights, options);
    const auto& [w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2] = weights;
    return RoutedFfn::apply(input, index, gate, w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2, options);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_routed_ffn(input, index, gate, weights, options);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor routed_ffn_autocast(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                               const FeedForwardWeights& weights, const FeedForwardOptions& options) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  const auto lower_given = [&](const std::optional<at::Tensor>& tensor) {
    return tensor ? std::optional(lower(*tensor)) : std::nullopt;
  };
  const auto w1 = lower(weights.w1), w2 = lower(weights.w2);
  const auto b1 = lower_given(weights.b1), b2 = lower_given(weights.b2), w_gate = lower_given(weights.w_gate),
             lora_a1 = lower_given(weights.lora_a1), lora_b1 = lower_given(weights.lora_b1),
             lora_a2 = lower_given(weights.lora_a2), lora_b2 = lower_given(weights.lora_b2);
  return call_routed_ffn(lower(input), index, gate, {w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2},
                         options);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("routed_ffn", flattened<routed_ffn_meta>);
  m.impl("_routed_ffn_forward", flattened<routed_ffn_forward_meta>);
  m.impl("_routed_ffn_backward", flattened<routed_ffn_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("routed_ffn", flattened<routed_ffn_autograd>);
  m.impl("_routed_ffn_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_routed_ffn_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("routed_ffn", flattened<routed_ffn_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("routed_ffn", flattened<routed_ffn_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor routed_ffn(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                      const at::Tensor& w1, const at::Tensor& w2, const std::optional<at::Tensor>& b1,
                      const std::optional<at::Tensor>& b2, const std::optional<at::Tensor>& w_gate,
                      const std::optional<at::Tensor>& lora_a1, const std::optional<at::Tensor>& lora_b1,
                      const std::optional<at::Tensor>& lora_a2, const std::optional<at::Tensor>& lora_b2,
                      std::string_view activation, std::string_view glu, double alpha, std::optional<double> limit,
                      double up_offset, std::string_view gate_at, double lora_scale, bool recompute) {
  return call_routed_ffn(input, index, gate, {w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2},
                         {activation, glu, alpha, limit, up_offset, gate_at, lora_scale, recompute});
}

}  // namespace torchops
