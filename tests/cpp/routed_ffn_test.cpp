// The routed_ffn family from C++, without Python.

#include <torch/torch.h>

#include "catch.h"
#include "torchops.h"

TEST_CASE("route from C++") {
  const auto index = torch::tensor({{2, 0}, {0, 1}, {2, -1}}, at::kLong);
  const auto [order, offsets] = torchops::route(index, 3);
  CHECK(at::equal(order, torch::tensor({1, 2, 3, 0, 4, 5}, at::kInt)));
  CHECK(at::equal(offsets, torch::tensor({0, 2, 3, 5}, at::kInt)));
}
