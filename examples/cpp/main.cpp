// Runs the package that export.py has made, without Python, and compares the results with those of
// the model in Python. How to build it is said there.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

// What torch.save has written.
c10::IValue load(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return torch::jit::pickle_load(
      std::vector<char>(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()));
}

bool run(const std::filesystem::path& folder) {
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model((folder / "model.pt2").string());
  const c10::IValue samples = load(folder / "samples.pt");
  bool good = true;
  for (const c10::IValue& sample : samples.toListRef()) {
    const at::Tensor x = sample.toListRef()[0].toTensor();
    const at::Tensor expected = sample.toListRef()[1].toTensor().to(at::kDouble);
    const at::Tensor found = model.run({x}).at(0).to(at::kDouble);
    const double error = ((found - expected).abs().max() / expected.abs().max()).item<double>();
    std::cout << "input " << x.sizes() << " of " << x.dtype() << ": relative error " << error << "\n";
    good = good && error < (x.scalar_type() == at::kBFloat16 ? 1e-2 : 1e-5);
  }
  return good;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: " << argv[0] << " FOLDER\n";
    return 2;
  }
  try {
    return run(argv[1]) ? 0 : 1;
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
