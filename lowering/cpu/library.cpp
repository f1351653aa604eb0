// The ops for programs without Python, on the CPU and in inference: blocks.cpp behind PyTorch's
// dispatcher, and the product of a router.
//
// lowering/library.py puts before it products.h, activations.h and blocks.cpp, and what is said in
// Python, as constants: the schemas, the axes of arguments, the names of activations in the order
// of their numbers, and how many products make a thread worth its while.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <array>
#include <map>
#include <optional>
#include <string_view>

namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Order = at::OptionalIntArrayRef;

// What the ops take: the checks of lowering/arguments.py and lowering/ops/router.py.

bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

Dtype number_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return kFloat32;
    case at::kDouble: return kFloat64;
    case at::kBFloat16: return kBFloat16;
    default: return kFloat16;
  }
}

void check_dtype(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble || is_half(dtype), name, " is ", dtype,
                    ", must be Float, Double, BFloat16 or Half");
}

// Whether the sizes of tensors fit together, one tensor after the other.
class Axes {
 public:
  void add(const char* name, const at::Tensor& x, std::string_view axes) {
    TORCH_CHECK_VALUE(x.layout() == at::kStrided && !x.is_nested() && x.device().is_cpu(), name,
                      " must be a dense tensor on the CPU, got ", x.layout(), " on ", x.device());
    TORCH_CHECK_VALUE(x.dim() == static_cast<int64_t>(axes.size()), name, " must have the dimensions ",
                      axes, ", got shape ", x.sizes());
    for (int64_t i = 0; i < x.dim(); ++i) {
      const auto [known, is_new] = sizes_.try_emplace(axes[i], x.size(i));
      TORCH_CHECK_VALUE(known->second == x.size(i), name, " of shape ", x.sizes(), " has ", axes[i], "=",
                        x.size(i), " in ", axes, ", must be ", known->second, " as before");
      const bool may_be_empty = std::string_view("BLH").find(axes[i]) != std::string_view::npos;
      TORCH_CHECK_VALUE(x.size(i) > 0 || may_be_empty, name, " of shape ", x.sizes(), " has ", axes[i],
                        "=0 in ", axes, ", must be at least 1");
    }
  }
  void check_groups() const {
    TORCH_CHECK_VALUE(at('H') % at('G') == 0, "q has H=", at('H'),
                      " heads, must be a multiple of the G=", at('G'), " groups of weights");
  }
  int64_t at(char axis) const { return sizes_.at(axis); }

 private:
  std::map<char, int64_t> sizes_;
};

Call call_of(const Axes& axes) {
  axes.check_groups();
  Call call{};
  call.B = axes.at('B'), call.L = axes.at('L'), call.H = axes.at('H'), call.d = axes.at('d');
  call.G = axes.at('G'), call.E = axes.at('E');
  return call;
}

int64_t number_of_activation(std::string_view name) {
  const auto* found = std::find(std::begin(kActivations), std::end(kActivations), name);
  TORCH_CHECK_VALUE(found != std::end(kActivations), "activation must be one of ",
                    c10::ArrayRef<const char*>(kActivations), ", got ", name);
  return found - kActivations;
}

at::Tensor empty_in_order(at::IntArrayRef shape, const Order& order, at::ScalarType dtype) {
  std::array<int64_t, 4> strides, outermost_first{0, 1, 2, 3};
  if (order.has_value()) {
    TORCH_CHECK_VALUE(std::is_permutation(order->begin(), order->end(), outermost_first.begin(),
                                          outermost_first.end()),
                      "out_order must be a permutation of (0, 1, 2, 3), got ", *order);
    std::copy(order->begin(), order->end(), outermost_first.begin());
  }
  int64_t step = 1;
  for (auto dim = outermost_first.rbegin(); dim != outermost_first.rend(); ++dim) {
    strides[*dim] = step;
    step *= shape[*dim];
  }
  return at::empty_strided(shape, strides, dtype);
}

View view_of(const at::Tensor& x) {
  View view{x.data_ptr(), number_of(x.scalar_type()), {}};
  std::copy_n(x.strides().begin(), 4, view.strides);
  return view;
}

View view_of(const MaybeTensor& x) { return x.has_value() ? view_of(*x) : View{}; }

MaybeTensor unsqueezed(const MaybeTensor& x, int64_t dim) {
  return x.has_value() ? MaybeTensor(x->unsqueeze(dim)) : std::nullopt;
}

// How many threads are worth their while.
int64_t threads_of(const Call& call, int64_t products) {
  return std::clamp<int64_t>(products / kProductsOfThread, 1, at::get_num_threads());
}

// The ops.

at::Tensor multi_head_ffn(const at::Tensor& q, const at::Tensor& k, const MaybeTensor& u,
                          const at::Tensor& v, const MaybeTensor& r, const MaybeTensor& k_bias,
                          const MaybeTensor& u_bias, const MaybeTensor& v_bias,
                          std::string_view activation, double k_scale, double u_scale,
                          double out_scale, Order out_order,
                          std::optional<at::ScalarType> out_dtype) {
  const std::array<MaybeTensor, 8> tensors{q, k, u, v, r, k_bias, u_bias, v_bias};
  const at::ScalarType dtype = q.scalar_type();
  Axes axes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].has_value()) continue;
    const auto& [name, letters] = kAxes[i];
    axes.add(name, *tensors[i], letters);
    check_dtype(name, tensors[i]->scalar_type());
    const bool wide_bias = i > 4 && is_half(dtype) && tensors[i]->scalar_type() == at::kFloat;
    TORCH_CHECK_VALUE(std::string_view(name) == "r" || wide_bias || tensors[i]->scalar_type() == dtype,
                      name, " is ", tensors[i]->scalar_type(), ", must be ", dtype, " as q");
  }
  TORCH_CHECK_VALUE(u.has_value() || !u_bias.has_value(), "u_bias is given but u is None");
  check_dtype("out_dtype", out_dtype.value_or(dtype));

  Call call = call_of(axes);
  call.f = axes.at('f');
  call.dtype = dtype == at::kDouble ? kFloat64 : kFloat32;
  call.activation = number_of_activation(activation);
  call.threads = threads_of(call, q.numel() * call.E * call.f);
  call.k_scale = k_scale, call.u_scale = u_scale, call.out_scale = out_scale;
  const at::Tensor out = empty_in_order(q.sizes(), out_order, out_dtype.value_or(dtype));
  if (out.numel() == 0) return out;
  call.q = view_of(q), call.k = view_of(k), call.u = view_of(u), call.v = view_of(v);
  call.r = view_of(r);
  call.k_bias = view_of(unsqueezed(k_bias, 3)), call.u_bias = view_of(unsqueezed(u_bias, 3));
  call.v_bias = view_of(unsqueezed(v_bias, 2));
  call.out = view_of(out);
  // PyTorch aligns memory at 64 bytes, as the vectors want it.
  const at::Tensor memory = at::empty({multi_head_ffn_forward(&call, nullptr)}, at::kByte);
  multi_head_ffn_forward(&call, memory.data_ptr());
  return out;
}

at::Tensor router_product(const at::Tensor& q, const at::Tensor& weight, Order out_order) {
  Axes axes;
  axes.add("q", q, "BLHd");
  axes.add("weight", weight, "GdE");
  TORCH_CHECK_VALUE(is_half(q.scalar_type()), "q is ", q.scalar_type(), ", must be BFloat16 or Half");
  TORCH_CHECK_VALUE(is_half(weight.scalar_type()) || weight.scalar_type() == at::kFloat, "weight is ",
                    weight.scalar_type(), ", must be Float, BFloat16 or Half");
  Call call = call_of(axes);
  const at::Tensor out = empty_in_order({call.B, call.L, call.H, call.E}, out_order, at::kFloat);
  if (out.numel() == 0) return out;
  call.q = view_of(q), call.out = view_of(out);
  call.k = view_of(weight.transpose(1, 2).unsqueeze(1));  // as of one network of E units
  call.threads = threads_of(call, q.numel() * call.E);

  const Cut cut = cut_tokens<float>(call, 2);
  const int64_t tokens = call.B * call.L, blocks = ceil_div(tokens, cut.block());
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<float> columns(cut.block() * call.d), sums(cut.block() * call.E);
    std::vector<float> packed(call.E * call.d);
#pragma omp for
    for (int64_t task = 0; task < call.H * blocks; ++task) {
      const int64_t first = task % blocks * cut.block(), head = task / blocks;
      const Tokens some{first, std::min(cut.block(), tokens - first), head};
      const Units all{head / (call.H / call.G), 0, 0, call.E};
      const Values<float> values = by_value(call, call.k, all, packed.data());
      pack_columns(call, call.q, some, call.d, cut.panel, 1.0f, columns.data());
      for (int64_t p = 0; p < ceil_div(some.count, cut.panel); ++p) {
        multiply<float>(call.E, cut.panel, {call.d}, values,
                        {columns.data() + p * call.d * cut.panel, cut.panel},
                        {sums.data() + p * call.E * cut.panel, cut.panel, 1, false});
      }
      unpack_columns(call, sums.data(), some, call.E, cut.panel, call.out);
    }
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mhf_compiler, m) {
  // Where Python has imported the package, the ops are there.
  if (c10::Dispatcher::singleton().findSchema({"mhf_compiler::multi_head_ffn", ""})) return;
  m.def(kMultiHeadFfn, {at::Tag::pt2_compliant_tag});
  m.def(kRouterProduct, {at::Tag::pt2_compliant_tag});
  m.impl("multi_head_ffn", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(multi_head_ffn)));
  m.impl("router_product", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(router_product)));
}
