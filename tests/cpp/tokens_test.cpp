// The tokens family from C++, without Python.

#include <torch/script.h>
#include <torch/torch.h>

#include <filesystem>

#include "catch.h"
#include "torchops.h"

namespace {

const auto float_dtypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

// Row by row in float64: the sum of each group's weighted rows, and its total.
std::pair<at::Tensor, at::Tensor> sums_of_groups(const at::Tensor& input, const at::Tensor& assign, int64_t num_groups,
                                                 const at::Tensor& weight) {
  auto sums = torch::zeros({input.size(0), num_groups, input.size(2)}, at::kDouble);
  auto totals = torch::zeros({input.size(0), num_groups}, at::kDouble);
  for (int64_t b = 0; b < input.size(0); ++b) {
    for (int64_t i = 0; i < input.size(1); ++i) {
      const auto group = assign[b][i].item<int64_t>();
      if (group >= 0) {
        sums[b][group] += weight[b][i].to(at::kDouble) * input[b][i].to(at::kDouble);
        totals[b][group] += weight[b][i].to(at::kDouble);
      }
    }
  }
  return {sums, totals};
}

// Lets TorchScript source in C++ call operators as torchops.<name>.
struct TorchopsResolver : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name, torch::jit::GraphFunction& function,
                                                         const torch::jit::SourceRange& range) override {
    return name == "torchops" ? std::make_shared<torch::jit::BuiltinModule>("torchops")
                              : torch::jit::nativeResolver()->resolveValue(name, function, range);
  }
};

}  // namespace

TEST_CASE("merge_tokens and its gradients agree with row-by-row sums over awkward shapes") {
  torch::manual_seed(0);
  for (const auto dtype : float_dtypes) {
    for (const auto& [batch, tokens, channels, groups] : {std::array<int64_t, 4>{2, 7, 5, 4},
                                                          {1, 33, 67, 9},
                                                          {3, 1, 1, 1},
                                                          {2, 4, 130, 20},
                                                          {2, 6, 3, 1},
                                                          {0, 3, 4, 2},
                                                          {2, 0, 4, 2},
                                                          {2, 3, 0, 2},
                                                          {2, 3, 4, 0}}) {
      CAPTURE(dtype, batch, tokens, channels, groups);
      auto input = torch::randn({batch, tokens, channels}, dtype).requires_grad_();
      const auto assign = torch::randint(-1, std::max<int64_t>(groups, 0), {batch, tokens}, at::kLong);
      auto weight = (torch::rand({batch, tokens}) + 0.5).requires_grad_();
      const double tolerance = dtype == at::kBFloat16 ? 2e-2 : dtype == at::kHalf ? 3e-3 : 1e-5;

      const auto [merged, total] = torchops::merge_tokens(input, assign, groups, weight, /*normalize=*/false);
      const auto [sums, totals] = sums_of_groups(input.detach(), assign, groups, weight.detach());
      CHECK(merged.scalar_type() == dtype);
      CHECK(torch::allclose(merged.to(at::kDouble), sums, tolerance, tolerance));
      CHECK(torch::allclose(total.to(at::kDouble), totals, 1e-6, 1e-6));

      merged.sum().backward();
      const auto kept = (assign >= 0).to(at::kDouble).unsqueeze(-1);
      const auto expected = (kept * weight.detach().unsqueeze(-1)).expand({batch, tokens, channels});
      CHECK(torch::allclose(input.grad().to(at::kDouble), expected.to(at::kDouble), tolerance, tolerance));
      const auto row_sums = (kept * input.detach().to(at::kDouble)).sum(-1);
      CHECK(torch::allclose(weight.grad().to(at::kDouble), row_sums, 1e-4, 1e-4));
    }
  }
}

TEST_CASE("a normalised group of one member is a copy") {
  torch::manual_seed(0);
  const auto input = torch::randn({2, 50, 19});
  const auto weight = torch::full({2, 50}, 3.0);
  const auto [merged, total] = torchops::merge_tokens(input, torch::arange(50).expand({2, 50}), 50, weight);
  CHECK(torch::equal(merged, input));
  CHECK(torch::equal(total, weight));
}

TEST_CASE("unmerge_tokens gathers, and its gradient is the segmented sum") {
  torch::manual_seed(0);
  for (const auto dtype : float_dtypes) {
    auto merged = torch::randn({2, 5, 37}, dtype).requires_grad_();
    auto residual = torch::randn({2, 11, 37}, dtype).requires_grad_();
    const auto assign = torch::randint(-1, 5, {2, 11}, at::kLong);
    const auto output = torchops::unmerge_tokens(merged, assign, residual);
    const auto index = assign.clamp_min(0).unsqueeze(-1).expand({2, 11, 37});
    const auto kept = (assign >= 0).unsqueeze(-1);
    CHECK(torch::equal(output, torch::where(kept, merged.gather(1, index) + residual, residual)));

    output.sum().backward();
    const auto [sums, totals] = sums_of_groups(torch::ones({2, 11, 37}), assign, 5, torch::ones({2, 11}));
    CHECK(torch::equal(merged.grad().to(at::kDouble), sums));
    CHECK(torch::equal(residual.grad(), torch::ones_like(residual)));
  }
}

TEST_CASE("assignments stay in range and keep the protected prefix, whatever the sizes") {
  torch::manual_seed(0);
  for (const auto dtype : float_dtypes) {
    for (int64_t tokens = 0; tokens <= 70; tokens += tokens < 8 ? 1 : 21) {
      for (const int64_t num_protected : {0, 1, 2, 5}) {
        if (num_protected > tokens) {
          continue;
        }
        for (const int64_t r : {0, 1, 3, 1000}) {
          CAPTURE(dtype, tokens, num_protected, r);
          const auto metric = torch::randn({2, tokens, 13}, dtype);
          auto padding = torch::rand({2, tokens}) < 0.5;
          padding.narrow(1, 0, num_protected).fill_(false);
          const auto groups = torchops::num_groups(tokens, r, num_protected).expect_int();
          for (const auto& mask : {std::optional<at::Tensor>(), std::optional<at::Tensor>(padding)}) {
            const auto assign = torchops::bipartite_assignment(metric, r, num_protected, mask);
            CHECK((assign >= -1).all().item<bool>());
            CHECK((assign < groups).all().item<bool>());
            CHECK(torch::equal(assign.narrow(1, 0, num_protected),
                               torch::arange(num_protected).expand({2, num_protected})));
            const auto [sources, destinations] = torchops::bipartite_pairs(metric, r, num_protected, mask);
            const auto group_of = [&](const at::Tensor& position) { return assign.gather(1, position.clamp_min(0)); };
            CHECK(((group_of(sources) == group_of(destinations)) | (destinations < 0)).all().item<bool>());
            // Every group has a member, so merging by it leaves no row empty.
            const auto [merged, total] = torchops::merge_tokens(metric, assign, groups);
            CHECK((total > 0).all().item<bool>());
            for (const bool fuse : {false, true}) {
              const auto top = torchops::topk_assignment(metric.sum(-1), r, num_protected, fuse, mask);
              CHECK((top >= -1).all().item<bool>());
              CHECK((top < num_protected + std::min(r, tokens - num_protected) + (fuse ? 1 : 0)).all().item<bool>());
            }
          }
        }
      }
    }
  }
}

TEST_CASE("bad input is a c10::ValueError that names op, argument, expected and actual") {
  const auto input = torch::zeros({2, 3, 4});
  CHECK_THROWS_AS(torchops::merge_tokens(input, torch::zeros({2, 2}, at::kLong), 2), c10::ValueError);
  try {
    torchops::merge_tokens(input, torch::full({2, 3}, 7, at::kLong), 2);
    FAIL("no error");
  } catch (const c10::ValueError& error) {
    CHECK(std::string(error.what_without_backtrace()) ==
          "merge_tokens: expected assign values in -1..1, got 7 at [0, 0]");
  }
}

TEST_CASE("a scripted model is saved, loaded and trained without Python") {
  torch::jit::Module model("m");
  model.register_parameter("scale", torch::ones({1, 1, 6}).requires_grad_(), /*is_buffer=*/false);
  model.define(R"(
    def forward(self, input):
        assign = torchops.bipartite_assignment(input, 3, num_protected=1)
        merged, total = torchops.merge_tokens(input * self.scale, assign, input.size(1) - 3)
        return torchops.unmerge_tokens(merged, assign, residual=input)
  )",
               std::make_shared<TorchopsResolver>());
  const auto file = (std::filesystem::temp_directory_path() / "torchops_scripted_in_cpp.pt").string();
  model.save(file);
  auto loaded = torch::jit::load(file);
  std::filesystem::remove(file);

  torch::manual_seed(0);
  const auto input = torch::randn({2, 10, 6});
  const auto output = loaded.forward({input}).toTensor();
  const auto assign = torchops::bipartite_assignment(input, 3, 1);
  const auto [merged, total] = torchops::merge_tokens(input, assign, torchops::num_groups(10, 3, 1));
  CHECK(torch::equal(output, torchops::unmerge_tokens(merged, assign, input)));

  output.sum().backward();
  const auto gradient = loaded.attr("scale").toTensor().grad();
  const auto expected = torchops::unmerge_tokens(merged, assign).sum({0, 1});
  CHECK(torch::allclose(gradient.flatten(), expected, 1e-5, 1e-5));
}
