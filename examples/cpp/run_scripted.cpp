// Runs a model saved by torch.jit.save, without Python, and compares its output with a saved one:
//
//   run_scripted model.pt input.pt output.pt
//
// input.pt and output.pt are single tensors saved by torch.save. Exits with 1 when outputs differ by
// more than rounding.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor load_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return torch::jit::pickle_load(bytes).toTensor();
}

// Whether the outputs are equal, at least up to rounding.
bool compare(const std::string& model_path, const std::string& input_path, const std::string& output_path) {
  const c10::InferenceMode no_gradients;
  torch::jit::Module model = torch::jit::load(model_path);
  model.eval();
  const at::Tensor expected = load_tensor(output_path);
  const at::Tensor output = model.forward({load_tensor(input_path)}).toTensor();

  if (output.equal(expected)) {
    std::cout << "output of shape " << output.sizes() << ": equal bit for bit\n";
    return true;
  }
  std::cout << "output of shape " << output.sizes() << ": largest difference "
            << (output - expected).abs().max().item<double>() << '\n';
  return output.allclose(expected, /*rtol=*/1e-4, /*atol=*/1e-4);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_scripted model.pt input.pt output.pt\n";
    return 2;
  }
  try {
    return compare(argv[1], argv[2], argv[3]) ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "run_scripted: " << error.what() << '\n';
    return 2;
  }
}
