// The activations and their slopes, and what is done to hidden units with them between the products.
//
// A new one is a structure with `value` and `with_slope`, and a line in `activation_of`; its number is
// its place in compiled.py.

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>

namespace {

template <typename T>
struct Sigmoid {
  // The fast exponential, exp_u20, is less exact, and a NaN gets lost in it.
  static Vec<T> value(Vec<T> x) {
    return Vec<T>(T(1)) / (Vec<T>(T(1)) + x.neg().exp());
  }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    const Vec<T> s = value(x);
    slope = s * (Vec<T>(T(1)) - s);
    return s;
  }
};

template <typename T>
struct Silu {
  static Vec<T> value(Vec<T> x) { return x * Sigmoid<T>::value(x); }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    const Vec<T> s = Sigmoid<T>::value(x), y = x * s;
    slope = at::vec::fmadd(y, Vec<T>(T(1)) - s, s);
    return y;
  }
};

template <typename T>
struct Gelu {
  static Vec<T> cumulative(Vec<T> x) {
    return Vec<T>(T(0.5)) * (Vec<T>(T(1)) + (x * Vec<T>(T(M_SQRT1_2))).erf());
  }
  static Vec<T> value(Vec<T> x) { return x * cumulative(x); }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    const Vec<T> c = cumulative(x);
    const Vec<T> density = (x * x * Vec<T>(T(-0.5))).exp() * Vec<T>(T(M_2_SQRTPI * M_SQRT1_2 / 2));
    slope = at::vec::fmadd(x, density, c);
    return x * c;
  }
};

template <typename T>
struct GeluTanh {
  static constexpr T kScale = T(M_SQRT2 * M_2_SQRTPI / 2), kCubic = T(0.044715);
  static Vec<T> tanh(Vec<T> x) {
    return (Vec<T>(kScale) * (x + Vec<T>(kCubic) * x * x * x)).tanh();
  }
  static Vec<T> value(Vec<T> x) { return Vec<T>(T(0.5)) * x * (Vec<T>(T(1)) + tanh(x)); }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    const Vec<T> one(T(1)), half(T(0.5)), t = tanh(x);
    const Vec<T> inner = Vec<T>(kScale) * (one + Vec<T>(3 * kCubic) * x * x);
    slope = half * (one + t) + half * x * (one - t * t) * inner;
    return half * x * (one + t);
  }
};

template <typename T>
struct Relu {
  static Vec<T> value(Vec<T> x) { return at::vec::clamp_min(x, Vec<T>(T(0))); }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    slope = Vec<T>::blendv(Vec<T>(T(1)), Vec<T>(T(0)), x <= Vec<T>(T(0)));
    return value(x);
  }
};

template <typename T>
struct Relu2 {
  static Vec<T> value(Vec<T> x) {
    const Vec<T> y = Relu<T>::value(x);
    return y * y;
  }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    const Vec<T> y = Relu<T>::value(x);
    slope = y + y;
    return y * y;
  }
};

template <typename T>
struct Tanh {
  static Vec<T> value(Vec<T> x) { return x.tanh(); }
  static Vec<T> with_slope(Vec<T> x, Vec<T>& slope) {
    const Vec<T> t = x.tanh();
    slope = Vec<T>(T(1)) - t * t;
    return t;
  }
};

// The hidden units of one panel of tokens.
template <typename T>
struct Panel {
  int64_t units, size;
  const T *r, *k_bias, *u_bias;  // [size], [units], [units]
  T *gate, *up;                  // [units, size]; up is null where there is no such projection
  T *dn, *dr;                    // [units, size], [size]; for the backward pass
};

// gate turns into n = r act(gate) up.
template <typename T, typename Activation>
void activate(const Panel<T>& panel) {
  for (int64_t t = 0; t < panel.size; t += Vec<T>::size()) {
    const Vec<T> r = Vec<T>::loadu(panel.r + t);
    for (int64_t j = 0; j < panel.units; ++j) {
      T* gate = panel.gate + j * panel.size + t;
      Vec<T> n = r * Activation::value(Vec<T>::loadu(gate) + Vec<T>(panel.k_bias[j]));
      if (panel.up != nullptr) {
        n = n * (Vec<T>::loadu(panel.up + j * panel.size + t) + Vec<T>(panel.u_bias[j]));
      }
      n.store(gate);
    }
  }
}

// gate turns into n, dn into the gradient of gate, and up into its own:
//
//     dgate = r act'(gate) up dn,   dup = r act(gate) dn,   dr += sum of act(gate) up dn
template <typename T, typename Activation>
void differentiate(const Panel<T>& panel) {
  for (int64_t t = 0; t < panel.size; t += Vec<T>::size()) {
    const Vec<T> r = Vec<T>::loadu(panel.r + t);
    Vec<T> total(T(0));
    for (int64_t j = 0; j < panel.units; ++j) {
      const int64_t at = j * panel.size + t;
      Vec<T> slope, up(T(1));
      const Vec<T> gate = Vec<T>::loadu(panel.gate + at) + Vec<T>(panel.k_bias[j]);
      const Vec<T> a = Activation::with_slope(gate, slope);
      const Vec<T> dn = Vec<T>::loadu(panel.dn + at), r_dn = r * dn;
      if (panel.up != nullptr) {
        up = Vec<T>::loadu(panel.up + at) + Vec<T>(panel.u_bias[j]);
        (a * r_dn).store(panel.up + at);
      }
      const Vec<T> product = a * up;
      total = at::vec::fmadd(product, dn, total);
      (r * product).store(panel.gate + at);
      (slope * up * r_dn).store(panel.dn + at);
    }
    (Vec<T>::loadu(panel.dr + t) + total).store(panel.dr + t);
  }
}

template <typename T>
struct Activation {
  void (*activate)(const Panel<T>&);
  void (*differentiate)(const Panel<T>&);
};

template <typename T, template <typename> class Function>
constexpr Activation<T> of{activate<T, Function<T>>, differentiate<T, Function<T>>};

template <typename T>
Activation<T> activation_of(int64_t number) {
  constexpr Activation<T> all[] = {of<T, Silu>,  of<T, Gelu>,    of<T, GeluTanh>, of<T, Relu>,
                                   of<T, Relu2>, of<T, Sigmoid>, of<T, Tanh>};
  return all[number];
}

}  // namespace
