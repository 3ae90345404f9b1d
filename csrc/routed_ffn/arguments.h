#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/autograd.h"
#include "routed_ffn/activation.h"

// The arguments of routed_ffn and of the operators behind it.

namespace torchops {

struct FeedForwardWeights {
  const at::Tensor& w1;                      // [G, N1, d]
  const at::Tensor& w2;                      // [G, d, N]
  const std::optional<at::Tensor>& b1;       // [G, preactivations]
  const std::optional<at::Tensor>& b2;       // [G, d] or [d]
  const std::optional<at::Tensor>& w_gate;   // [G, N, d]
  const std::optional<at::Tensor>& lora_a1;  // [G or 1, r, d]
  const std::optional<at::Tensor>& lora_b1;  // [G, preactivations, r]
  const std::optional<at::Tensor>& lora_a2;  // [G, r, N]
  const std::optional<at::Tensor>& lora_b2;  // [G or 1, d, r]

  auto members() const { return std::tie(w1, w2, b1, b2, w_gate, lora_a1, lora_b1, lora_a2, lora_b2); }
};

struct FeedForwardOptions {
  std::string_view activation;
  std::string_view glu;
  double alpha;
  std::optional<double> limit;
  double up_offset;
  std::string_view gate_at;
  double lora_scale;
  bool recompute;

  auto members() const { return std::tie(activation, glu, alpha, limit, up_offset, gate_at, lora_scale, recompute); }

  kernels::routed_ffn::Activation kernel_activation() const;
  bool is_gated() const { return glu != "none"; }
};

// Which gradients are asked for, in the order of the schema.
struct FeedForwardMask {
  std::array<bool, 11> wanted;

  bool input() const { return wanted[0]; }
  bool gate() const { return wanted[1]; }
  bool w1() const { return wanted[2]; }
  bool w2() const { return wanted[3]; }
  bool b1() const { return wanted[4]; }
  bool b2() const { return wanted[5]; }
  bool w_gate() const { return wanted[6]; }
  bool lora_a1() const { return wanted[7]; }
  bool lora_b1() const { return wanted[8]; }
  bool lora_a2() const { return wanted[9]; }
  bool lora_b2() const { return wanted[10]; }
};

// Gradients to input, gate, w1, w2, b1, b2, w_gate and the four factors; undefined where nobody asks for them.
using FeedForwardGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                        at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The arguments of _routed_ffn_backward. input is needed for gradients that take it, preactivation unless it is
// computed again.
struct FeedForwardBackward {
  const at::Tensor& grad_output;           // [..., d]
  const std::optional<at::Tensor>& input;  // [..., d]
  const at::Tensor& index;                 // [..., k]
  const std::optional<at::Tensor>& gate;   // [..., k]
  FeedForwardWeights weights;
  const std::optional<at::Tensor>& preactivation;  // [T k, preactivations]
  FeedForwardOptions options;
  std::array<bool, 11> output_mask;

  auto members() const {
    return std::tie(grad_output, input, index, gate, weights, preactivation, options, output_mask);
  }
  FeedForwardMask mask() const { return {output_mask}; }
};

void check_routed_ffn(const char* op, const at::Tensor& input, const at::Tensor& index,
                      const std::optional<at::Tensor>& gate, const FeedForwardWeights& weights,
                      const FeedForwardOptions& options);
void check_routed_ffn_backward(const FeedForwardBackward& args);

// Whether gradients take the input: those of what it is multiplied with, and those that are made of a new
// preactivation.
inline bool needs_input(const FeedForwardMask& mask, const std::optional<at::Tensor>& gate,
                        const FeedForwardOptions& options) {
  return mask.w1() || mask.w_gate() || mask.lora_a1() || mask.lora_b1() || options.recompute ||
         (mask.gate() && gate && options.gate_at != "output");
}

}  // namespace torchops
