#include "routed_ffn/route.h"

#include "core/checks.h"
#include "core/library.h"
#include "routed_ffn/routed_ffn.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def("route(Tensor index, *, SymInt num_blocks) -> (Tensor order, Tensor offsets)");
}

void check_route(const at::Tensor& index, const c10::SymInt& num_blocks) {
  const Checks check("route");
  check.rank("index", index, "[T, k]");
  check.integer_dtype("index", index);
  check.between("num_blocks", num_blocks, 1, 1 << 20);
  // A symbol would bound the batch of exported programs by this.
  if (const auto entries = index.sym_numel().maybe_as_int()) {
    check.at_most("T k", *entries, "the largest 32-bit integer", INT32_MAX);
  }
}

namespace {

std::tuple<at::Tensor, at::Tensor> route_meta(const at::Tensor& index, c10::SymInt num_blocks) {
  check_route(index, num_blocks);
  return empty_route(index, num_blocks);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("route", route_meta);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("route", torch::CppFunction::makeFallthrough());
}

std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& index, c10::SymInt num_blocks) {
  static const auto op = find_operator<decltype(route_meta)>("route");
  return op(index, num_blocks);
}

}  // namespace torchops
