// Runs the package that export.py has made, without Python, and compares the results with those of
// the model in Python. How to build it is said there.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <array>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>

at::Tensor read(std::istream& file, at::IntArrayRef shape) {
  const at::Tensor x = at::empty(shape, at::kFloat);
  file.read(static_cast<char*>(x.data_ptr()), x.nbytes());
  return x;
}

bool run(const std::filesystem::path& folder) {
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model((folder / "model.pt2").string());
  const auto metadata = model.get_metadata();
  const bool narrow = metadata.at("dtype") == "bfloat16";
  const at::Device device(metadata.at("device") == "cuda" ? at::kCUDA : at::kCPU);
  std::ifstream samples(folder / "samples.bin", std::ios::binary);
  std::array<int64_t, 3> shape;
  int good = 0, all = 0;
  while (samples.read(reinterpret_cast<char*>(shape.data()), sizeof shape)) {
    const at::Tensor x = read(samples, shape), expected = read(samples, shape);
    const at::Tensor given = x.to(device, narrow ? at::kBFloat16 : at::kFloat);
    const at::Tensor y = model.run({given}).at(0).to(at::kCPU, at::kFloat);
    const at::Tensor error = y.sub(expected).abs().max().div(expected.abs().max());
    std::cout << "input " << at::IntArrayRef(shape) << ": relative error " << error.item<float>() << "\n";
    good += error.item<float>() < (narrow ? 2e-2 : 1e-5);
    ++all;
  }
  std::cout << good << " of " << all << " agree\n";
  return good == all && all > 0;
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
