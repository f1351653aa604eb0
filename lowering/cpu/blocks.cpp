// The op on the CPU, compiled for the machine that it runs on: `forward` and `backward`.
//
// A thread takes some tokens of one head and goes through the hidden units. The tokens lie side by
// side in its vectors ("a panel" is what one, two or three of these hold), so that the weights are
// read where they are, value by value, whatever their strides:
//
//     gate, up  [units, panel]  = K, U [units, d] times Q^T [d, panel]
//     out       [panel, d]     += (r act(gate) up)^T [panel, units] times V [units, d]
//
// and every product of the backward pass alike. Units and tokens come in blocks whose values stay in
// the caches; the hidden units of all tokens never exist at once. No sum depends on which thread
// computes what, so equal inputs give equal bits for the same number of threads.
//
// What products.h and activations.h define comes before this file, in one source.
//
// Letters are the paper's: Q the queries, K, U and V the gate, up and down projections, R the weights
// of the E sub-networks of f hidden units; heads of width d, H of them in G groups that share weights.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

// What Python passes; compiled.py has the same structures.

struct View {
  void* data;  // null: not there
  int64_t dtype;
  int64_t strides[4];
};

struct Call {
  int64_t B, L, H, d, G, E, f;
  int64_t dtype;  // of the computation
  int64_t activation, threads;
  double k_scale, u_scale, out_scale;
  View q, k, u, v, r, k_bias, u_bias, v_bias;
  View out;  // in the backward pass, its gradient
  View dq, dk, du, dv, dr, dk_bias, du_bias, dv_bias;
};

enum Dtype : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t kUnits = 64;  // hidden units of a block
constexpr int64_t kPanels = 4;  // panels of a block of tokens, at most

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Strided tensors of any floating dtype.

template <typename Function>
void with_pointer(const View& view, int64_t offset, Function function) {
  switch (view.dtype) {
    case kFloat32: return function(static_cast<float*>(view.data) + offset);
    case kFloat64: return function(static_cast<double*>(view.data) + offset);
    case kBFloat16: return function(static_cast<c10::BFloat16*>(view.data) + offset);
    default: return function(static_cast<c10::Half*>(view.data) + offset);
  }
}

template <typename T>
constexpr int64_t dtype_of() {
  return std::is_same_v<T, float> ? kFloat32 : kFloat64;
}

// The part of a task's memory that is still free.
class Scratch {
 public:
  explicit Scratch(char* start) : next_(start) {}

  template <typename T>
  T* take(int64_t count) {
    char* taken = next_;
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(taken);
  }

  int64_t since(const char* start) const { return next_ - start; }

 private:
  char* next_;
};

// Tokens of one head, and how they are cut.

struct Cut {
  int64_t panel;   // tokens of a panel
  int64_t panels;  // panels of a block, at most
  int64_t width;   // of a head, filled up with zeros to whole vectors
  int64_t block() const { return panel * panels; }
};

template <typename T>
Cut cut_tokens(const Call& call, int64_t parts_per_thread) {
  constexpr int64_t size = Vec<T>::size();
  const int64_t tokens = call.B * call.L;
  Cut cut;
  cut.panel = size * std::min<int64_t>(kVectors, ceil_div(tokens, size));
  // Small blocks where that is what gives every thread something to do.
  const int64_t all = ceil_div(tokens, cut.panel) * call.H;
  cut.panels = std::clamp<int64_t>(all / (parts_per_thread * call.threads), 1, kPanels);
  cut.width = round_up(call.d, size);
  return cut;
}

struct Tokens {
  int64_t first, count;
  int64_t head;
};

int64_t offset_of(const Call& call, const View& view, int64_t token, int64_t head) {
  return token / call.L * view.strides[0] + token % call.L * view.strides[1] +
         head * view.strides[2];
}

// x [tokens, n] with tokens contiguous, panel by panel: [panels, n, panel]. Zeros after the
// last token.
template <typename T>
void pack_columns(const Call& call, const View& x, Tokens tokens, int64_t n, int64_t panel,
                  T scale, T* out) {
  const int64_t filled = round_up(tokens.count, panel);
  for (int64_t t = 0; t < filled; ++t) {
    T* column = out + t / panel * n * panel + t % panel;
    if (t >= tokens.count) {
      for (int64_t i = 0; i < n; ++i) column[i * panel] = T(0);
      continue;
    }
    const int64_t offset = offset_of(call, x, tokens.first + t, tokens.head);
    with_pointer(x, offset, [&](auto* row) {
      for (int64_t i = 0; i < n; ++i) {
        column[i * panel] = scale * static_cast<T>(row[i * x.strides[3]]);
      }
    });
  }
}

// The way back: what pack_columns would make x of.
template <typename T>
void unpack_columns(const Call& call, const T* columns, Tokens tokens, int64_t n, int64_t panel,
                    const View& x) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const T* column = columns + t / panel * n * panel + t % panel;
    const int64_t offset = offset_of(call, x, tokens.first + t, tokens.head);
    with_pointer(x, offset, [&](auto* row) {
      using Stored = std::remove_reference_t<decltype(*row)>;
      for (int64_t i = 0; i < n; ++i) {
        row[i * x.strides[3]] = static_cast<Stored>(column[i * panel]);
      }
    });
  }
}

// x [tokens, d] as rows of whole vectors [tokens of whole panels, width].
template <typename T>
void pack_rows(const Call& call, const View& x, Tokens tokens, const Cut& cut, T scale, T* out) {
  const int64_t filled = round_up(tokens.count, cut.panel);
  std::memset(out + tokens.count * cut.width, 0,
              (filled - tokens.count) * cut.width * sizeof(T));
  for (int64_t t = 0; t < tokens.count; ++t, out += cut.width) {
    const int64_t offset = offset_of(call, x, tokens.first + t, tokens.head);
    with_pointer(x, offset, [&](auto* row) {
      for (int64_t i = 0; i < call.d; ++i) out[i] = scale * static_cast<T>(row[i * x.strides[3]]);
    });
    for (int64_t i = call.d; i < cut.width; ++i) out[i] = T(0);
  }
}

template <typename T>
void unpack_rows(const Call& call, const T* rows, Tokens tokens, const Cut& cut, T scale,
                 const View& x) {
  for (int64_t t = 0; t < tokens.count; ++t, rows += cut.width) {
    const int64_t offset = offset_of(call, x, tokens.first + t, tokens.head);
    with_pointer(x, offset, [&](auto* row) {
      using Stored = std::remove_reference_t<decltype(*row)>;
      for (int64_t i = 0; i < call.d; ++i) {
        row[i * x.strides[3]] = static_cast<Stored>(scale * rows[i]);
      }
    });
  }
}

// Weights.

// Hidden units of one sub-network of one group.
struct Units {
  int64_t group, network, first, count;
};

// A weight's block [units, d] as it lies, if its values can be read one by one, or packed.
template <typename T>
Values<T> by_value(const Call& call, const View& w, const Units& units, T* packed) {
  const int64_t* s = w.strides;
  const int64_t offset = units.group * s[0] + units.network * s[1] + units.first * s[2];
  if (w.dtype == dtype_of<T>() && s[3] == 1) {
    return {static_cast<const T*>(w.data) + offset, s[2], 1};
  }
  with_pointer(w, offset, [&](auto* from) {
    // In the order in which it lies in memory.
    if (s[3] <= s[2]) {
      for (int64_t j = 0; j < units.count; ++j) {
        for (int64_t i = 0; i < call.d; ++i) {
          packed[j * call.d + i] = static_cast<T>(from[j * s[2] + i * s[3]]);
        }
      }
    } else {
      for (int64_t i = 0; i < call.d; ++i) {
        for (int64_t j = 0; j < units.count; ++j) {
          packed[j * call.d + i] = static_cast<T>(from[j * s[2] + i * s[3]]);
        }
      }
    }
  });
  return {packed, call.d, 1};
}

// The same block as rows of whole vectors.
template <typename T>
Rows<T> by_vector(const Call& call, const Cut& cut, Values<T> values, int64_t count, T* packed) {
  if (cut.width == call.d) return {values.data, values.row};
  for (int64_t j = 0; j < count; ++j) {
    T* row = packed + j * cut.width;
    std::copy_n(values.data + j * values.row, call.d, row);
    std::fill(row + call.d, row + cut.width, T(0));
  }
  return {packed, cut.width};
}

template <typename T>
void read_bias(const View& bias, const Units& units, T* out) {
  if (bias.data == nullptr) {
    std::fill_n(out, units.count, T(0));
    return;
  }
  const int64_t* s = bias.strides;
  const int64_t offset = units.group * s[0] + units.network * s[1] + units.first * s[2];
  with_pointer(bias, offset, [&](auto* from) {
    for (int64_t j = 0; j < units.count; ++j) out[j] = static_cast<T>(from[j * s[2]]);
  });
}

// The biases of the down projections of a group, [E, width].
template <typename T>
void pack_down_bias(const Call& call, int64_t group, const Cut& cut, T* out) {
  const int64_t* s = call.v_bias.strides;
  with_pointer(call.v_bias, group * s[0], [&](auto* from) {
    for (int64_t e = 0; e < call.E; ++e) {
      for (int64_t i = 0; i < cut.width; ++i) {
        out[e * cut.width + i] = i < call.d ? static_cast<T>(from[e * s[1] + i * s[3]]) : T(0);
      }
    }
  });
}

template <typename Function>
void for_units(const Call& call, int64_t group, Function function) {
  for (int64_t e = 0; e < call.E; ++e) {
    for (int64_t first = 0; first < call.f; first += kUnits) {
      function(Units{group, e, first, std::min(kUnits, call.f - first)});
    }
  }
}

// Forward.

template <typename T>
struct ForwardScratch {
  T *q, *r, *out, *gate, *up, *k, *u, *v, *v_rows, *k_bias, *u_bias, *v_bias;
  int64_t bytes;

  ForwardScratch(const Call& call, const Cut& cut, char* start) {
    Scratch scratch(start);
    q = scratch.take<T>(cut.block() * call.d);
    r = scratch.take<T>(cut.block() * call.E);
    out = scratch.take<T>(cut.block() * cut.width);
    gate = scratch.take<T>(kUnits * cut.panel);
    up = scratch.take<T>(kUnits * cut.panel);
    for (T** weight : {&k, &u, &v}) *weight = scratch.take<T>(kUnits * call.d);
    v_rows = scratch.take<T>(kUnits * cut.width);
    k_bias = scratch.take<T>(kUnits);
    u_bias = scratch.take<T>(kUnits);
    v_bias = scratch.take<T>(call.v_bias.data == nullptr ? 0 : call.E * cut.width);
    bytes = scratch.since(start);
  }
};

// Sub-networks' weights of the tokens, [panels, E, panel]: ones where there are none.
template <typename T>
void pack_router(const Call& call, Tokens tokens, int64_t panel, T* out) {
  if (call.r.data != nullptr) {
    return pack_columns(call, call.r, tokens, call.E, panel, T(1), out);
  }
  std::fill_n(out, round_up(tokens.count, panel) * call.E, T(1));
}

template <typename T>
void forward_block(const Call& call, const Cut& cut, Tokens tokens, const ForwardScratch<T>& s) {
  const Activation<T> activation = activation_of<T>(call.activation);
  const int64_t group = tokens.head / (call.H / call.G);
  const int64_t panels = ceil_div(tokens.count, cut.panel);
  const bool gated = call.u.data != nullptr;
  const T k_scale = T(call.k_scale), u_scale = T(call.u_scale);
  pack_columns(call, call.q, tokens, call.d, cut.panel, T(1), s.q);
  pack_router(call, tokens, cut.panel, s.r);
  std::fill_n(s.out, panels * cut.panel * cut.width, T(0));
  if (call.v_bias.data != nullptr) {
    pack_down_bias(call, group, cut, s.v_bias);
    for (int64_t p = 0; p < panels; ++p) {
      multiply<T>(cut.panel, cut.width, {call.E}, {s.r + p * call.E * cut.panel, 1, cut.panel},
                  {s.v_bias, cut.width}, {s.out + p * cut.panel * cut.width, cut.width, 1, true});
    }
  }
  for_units(call, group, [&](const Units& units) {
    const Values<T> k = by_value(call, call.k, units, s.k);
    const Values<T> u = gated ? by_value(call, call.u, units, s.u) : Values<T>{};
    const Values<T> v_values = by_value(call, call.v, units, s.v);
    const Rows<T> v = by_vector(call, cut, v_values, units.count, s.v_rows);
    read_bias(call.k_bias, units, s.k_bias);
    read_bias(call.u_bias, units, s.u_bias);
    for (int64_t p = 0; p < panels; ++p) {
      const Rows<T> q{s.q + p * call.d * cut.panel, cut.panel};
      const T* r = s.r + (p * call.E + units.network) * cut.panel;
      multiply<T>(units.count, cut.panel, {call.d}, k, q, {s.gate, cut.panel, k_scale, false});
      if (gated) {
        multiply<T>(units.count, cut.panel, {call.d}, u, q, {s.up, cut.panel, u_scale, false});
      }
      activation.activate({units.count, cut.panel, r, s.k_bias, s.u_bias, s.gate,
                           gated ? s.up : nullptr, nullptr, nullptr});
      multiply<T>(cut.panel, cut.width, {units.count}, {s.gate, 1, cut.panel}, v,
                  {s.out + p * cut.panel * cut.width, cut.width, 1, true});
    }
  });
  unpack_rows(call, s.out, tokens, cut, T(call.out_scale), call.out);
}

template <typename T>
int64_t forward(const Call& call, char* memory) {
  const Cut cut = cut_tokens<T>(call, 2);
  const int64_t bytes = ForwardScratch<T>(call, cut, nullptr).bytes;
  if (memory == nullptr) return bytes * call.threads;
  const int64_t tokens = call.B * call.L, blocks = ceil_div(tokens, cut.block());
#pragma omp parallel num_threads(call.threads)
  {
    const ForwardScratch<T> scratch(call, cut, memory + bytes * omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < call.H * blocks; ++task) {
      const int64_t first = task % blocks * cut.block();
      const Tokens some{first, std::min(cut.block(), tokens - first), task / blocks};
      forward_block(call, cut, some, scratch);
    }
  }
  return 0;
}

// Backward.

template <typename T>
struct BackwardScratch {
  T *q, *g, *q_rows, *g_rows, *r, *dq, *dr, *n, *dk, *du, *k, *u, *v, *k_rows, *u_rows;
  T *k_bias, *u_bias, *v_bias, *dv_bias;
  int64_t bytes;

  BackwardScratch(const Call& call, const Cut& cut, char* start) {
    Scratch scratch(start);
    for (T** columns : {&q, &g}) *columns = scratch.take<T>(cut.block() * call.d);
    for (T** rows : {&q_rows, &g_rows, &dq}) *rows = scratch.take<T>(cut.block() * cut.width);
    for (T** router : {&r, &dr}) *router = scratch.take<T>(cut.block() * call.E);
    for (T** hidden : {&n, &dk, &du}) *hidden = scratch.take<T>(cut.block() * kUnits);
    for (T** weight : {&k, &u, &v}) *weight = scratch.take<T>(kUnits * call.d);
    for (T** rows : {&k_rows, &u_rows}) *rows = scratch.take<T>(kUnits * cut.width);
    for (T** bias : {&k_bias, &u_bias}) *bias = scratch.take<T>(kUnits);
    const int64_t down = call.v_bias.data == nullptr ? 0 : call.E * cut.width;
    for (T** bias : {&v_bias, &dv_bias}) *bias = scratch.take<T>(down);
    bytes = scratch.since(start);
  }
};

// The gradients of one group's weights, summed over some of its tokens. Those of the biases are small
// and summed in double precision, since the blocks of a long call add up one after another.
template <typename T>
struct Sums {
  T *k, *u, *v;  // [E * f, width]
  double *k_bias, *u_bias, *v_bias;  // [E * f], [E * f], [E, width]
  int64_t bytes;

  Sums(const Call& call, const Cut& cut, char* start) {
    Scratch scratch(start);
    const int64_t units = call.E * call.f, down = call.E * cut.width;
    k = scratch.take<T>(call.dk.data == nullptr ? 0 : units * cut.width);
    u = scratch.take<T>(call.du.data == nullptr ? 0 : units * cut.width);
    v = scratch.take<T>(call.dv.data == nullptr ? 0 : units * cut.width);
    k_bias = scratch.take<double>(call.dk_bias.data == nullptr ? 0 : units);
    u_bias = scratch.take<double>(call.du_bias.data == nullptr ? 0 : units);
    v_bias = scratch.take<double>(call.dv_bias.data == nullptr ? 0 : down);
    bytes = scratch.since(start);
  }

  void clear() const { std::memset(static_cast<void*>(k), 0, bytes); }  // k is the first
};

// Zeros after the last token of a panel, whose hidden units may be anything: the weights' gradients
// are sums over whole panels.
template <typename T>
void clear_behind(const Panel<T>& panel, int64_t tokens) {
  for (T* hidden : {panel.gate, panel.up, panel.dn}) {
    for (int64_t j = 0; hidden != nullptr && j < panel.units; ++j) {
      std::fill(hidden + j * panel.size + tokens, hidden + (j + 1) * panel.size, T(0));
    }
  }
}

template <typename T>
void add_sums_of_tokens(const Cut& cut, int64_t panels, int64_t count, const T* hidden,
                        double* out) {
  for (int64_t j = 0; j < count; ++j) {
    Vec<T> total(T(0));
    for (int64_t p = 0; p < panels; ++p) {
      const T* row = hidden + (p * kUnits + j) * cut.panel;
      for (int64_t t = 0; t < cut.panel; t += Vec<T>::size()) total = total + Vec<T>::loadu(row + t);
    }
    T parts[Vec<T>::size()];
    total.store(parts);
    for (const T part : parts) out[j] += part;
  }
}

template <typename T>
void backward_block(const Call& call, const Cut& cut, Tokens tokens, const BackwardScratch<T>& s,
                    const Sums<T>& sums) {
  const Activation<T> activation = activation_of<T>(call.activation);
  const bool gated = call.u.data != nullptr;
  const int64_t group = tokens.head / (call.H / call.G);
  const int64_t panels = ceil_div(tokens.count, cut.panel), hidden = kUnits * cut.panel;
  const bool wants_q = call.dq.data != nullptr, wants_r = call.dr.data != nullptr;
  const T k_scale = T(call.k_scale), u_scale = T(call.u_scale);
  pack_columns(call, call.q, tokens, call.d, cut.panel, T(1), s.q);
  pack_columns(call, call.out, tokens, call.d, cut.panel, T(call.out_scale), s.g);
  pack_rows(call, call.q, tokens, cut, T(1), s.q_rows);
  pack_rows(call, call.out, tokens, cut, T(call.out_scale), s.g_rows);
  pack_router(call, tokens, cut.panel, s.r);
  std::fill_n(s.dq, panels * cut.panel * cut.width, T(0));
  std::fill_n(s.dr, panels * cut.panel * call.E, T(0));
  if (call.v_bias.data != nullptr) {
    pack_down_bias(call, group, cut, s.v_bias);
    for (int64_t p = 0; p < panels; ++p) {
      multiply<T>(call.E, cut.panel, {call.d}, {s.v_bias, cut.width, 1},
                  {s.g + p * call.d * cut.panel, cut.panel},
                  {s.dr + p * call.E * cut.panel, cut.panel, 1, true});
    }
    if (call.dv_bias.data != nullptr) {
      multiply<T>(call.E, cut.width, {cut.panel, panels},
                  {s.r, cut.panel, 1, call.E * cut.panel}, {s.g_rows, cut.width},
                  {s.dv_bias, cut.width, 1, false});
      for (int64_t i = 0; i < call.E * cut.width; ++i) sums.v_bias[i] += s.dv_bias[i];
    }
  }
  for_units(call, group, [&](const Units& units) {
    const Values<T> k = by_value(call, call.k, units, s.k), v = by_value(call, call.v, units, s.v);
    const Values<T> u = gated ? by_value(call, call.u, units, s.u) : Values<T>{};
    read_bias(call.k_bias, units, s.k_bias);
    read_bias(call.u_bias, units, s.u_bias);
    for (int64_t p = 0; p < panels; ++p) {
      const Rows<T> q{s.q + p * call.d * cut.panel, cut.panel};
      const Rows<T> g{s.g + p * call.d * cut.panel, cut.panel};
      T *n = s.n + p * hidden, *dk = s.dk + p * hidden, *du = s.du + p * hidden;
      const int64_t router = (p * call.E + units.network) * cut.panel;
      multiply<T>(units.count, cut.panel, {call.d}, k, q, {n, cut.panel, k_scale, false});
      multiply<T>(units.count, cut.panel, {call.d}, v, g, {dk, cut.panel, 1, false});
      if (gated) {
        multiply<T>(units.count, cut.panel, {call.d}, u, q, {du, cut.panel, u_scale, false});
      }
      const Panel<T> panel{units.count, cut.panel, s.r + router, s.k_bias, s.u_bias, n,
                           gated ? du : nullptr, dk, s.dr + router};
      activation.differentiate(panel);
      clear_behind(panel, std::min(cut.panel, tokens.count - p * cut.panel));
    }
    // After the activation: hidden units times tokens, and tokens times hidden units.
    const int64_t place = units.network * call.f + units.first;  // of the block in the sums
    auto add_over_tokens = [&](const T* d, const T* rows, T scale, const View& wanted, T* sum) {
      if (wanted.data == nullptr) return;
      multiply<T>(units.count, cut.width, {cut.panel, panels}, {d, cut.panel, 1, hidden},
                  {rows, cut.width}, {sum + place * cut.width, cut.width, scale, true});
    };
    auto add_over_units = [&](const T* d, const Values<T>& weight, T scale, T* packed) {
      if (!wants_q) return;
      const Rows<T> w = by_vector(call, cut, weight, units.count, packed);
      for (int64_t p = 0; p < panels; ++p) {
        multiply<T>(cut.panel, cut.width, {units.count}, {d + p * hidden, 1, cut.panel}, w,
                    {s.dq + p * cut.panel * cut.width, cut.width, scale, true});
      }
    };
    auto add_bias = [&](const T* d, const View& wanted, double* sum) {
      if (wanted.data != nullptr) add_sums_of_tokens(cut, panels, units.count, d, sum + place);
    };
    add_over_tokens(s.n, s.g_rows, 1, call.dv, sums.v);
    add_over_tokens(s.dk, s.q_rows, k_scale, call.dk, sums.k);
    add_over_units(s.dk, k, k_scale, s.k_rows);
    add_bias(s.dk, call.dk_bias, sums.k_bias);
    if (gated) {
      add_over_tokens(s.du, s.q_rows, u_scale, call.du, sums.u);
      add_over_units(s.du, u, u_scale, s.u_rows);
      add_bias(s.du, call.du_bias, sums.u_bias);
    }
  });
  if (wants_q) unpack_rows(call, s.dq, tokens, cut, T(1), call.dq);
  if (wants_r) unpack_columns(call, s.dr, tokens, call.E, cut.panel, call.dr);
}

// Writes the gradients of a group's weights, each the total of what the parts of the group's tokens
// summed up: the `share`-th of `shares` equal shares of their rows.
template <typename T>
void write_sums(const Call& call, const Cut& cut, int64_t group, const Sums<T>* parts,
                int64_t count, int64_t share, int64_t shares) {
  // Rows [E * per_network, width] of which `columns` are a gradient's.
  auto write = [&](const View& gradient, auto sum, int64_t per_network, int64_t columns,
                   int64_t width) {
    if (gradient.data == nullptr) return;
    const int64_t rows = call.E * per_network, *s = gradient.strides;
    for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; ++row) {
      const int64_t offset =
          group * s[0] + row / per_network * s[1] + row % per_network * s[2];
      with_pointer(gradient, offset, [&](auto* place) {
        using Stored = std::remove_reference_t<decltype(*place)>;
        for (int64_t i = 0; i < columns; ++i) {
          auto total = (parts[0].*sum)[row * width + i];
          for (int64_t part = 1; part < count; ++part) total += (parts[part].*sum)[row * width + i];
          place[i * s[3]] = static_cast<Stored>(total);
        }
      });
    }
  };
  write(call.dk, &Sums<T>::k, call.f, call.d, cut.width);
  write(call.du, &Sums<T>::u, call.f, call.d, cut.width);
  write(call.dv, &Sums<T>::v, call.f, call.d, cut.width);
  write(call.dk_bias, &Sums<T>::k_bias, call.f, 1, 1);
  write(call.du_bias, &Sums<T>::u_bias, call.f, 1, 1);
  write(call.dv_bias, &Sums<T>::v_bias, 1, call.d, cut.width);
}

// Threads that share a group: each sums up the weights' gradients over its part of the tokens.
// `teams` groups are at work at once.
struct Teams {
  int64_t parts, teams;
};

Teams form_teams(const Call& call, int64_t threads) {
  // A part has so many tokens that its sums, [E * f, d], take at most a quarter of what one hidden
  // activation of them would, [tokens, E * f].
  const int64_t tokens = call.B * call.L * (call.H / call.G);
  const int64_t most = std::clamp<int64_t>(tokens / (4 * call.d), 1, threads);
  Teams best{1, threads};
  auto time = [&](const Teams& t) {  // of all groups, in units of one thread's for one group
    return static_cast<double>(ceil_div(call.G, t.teams)) / static_cast<double>(t.parts);
  };
  for (int64_t parts = 2; parts <= most; ++parts) {
    const Teams teams{parts, threads / parts};
    if (time(teams) < time(best)) best = teams;
  }
  return best;
}

template <typename T>
int64_t backward(const Call& call, char* memory) {
  const Cut cut = cut_tokens<T>(call, 4);
  const int64_t tokens = call.B * call.L, blocks = ceil_div(tokens, cut.block());
  const int64_t heads = call.H / call.G, all = heads * blocks;
  const int64_t bytes = BackwardScratch<T>(call, cut, nullptr).bytes;
  const int64_t sum_bytes = Sums<T>(call, cut, nullptr).bytes;
  if (memory == nullptr) return call.threads * (bytes + sum_bytes);
  std::vector<Sums<T>> sums;
  for (int64_t id = 0; id < call.threads; ++id) {
    sums.emplace_back(call, cut, memory + call.threads * bytes + id * sum_bytes);
  }
#pragma omp parallel num_threads(call.threads)
  {
    const int64_t id = omp_get_thread_num();
    const BackwardScratch<T> scratch(call, cut, memory + id * bytes);
    const auto [parts, teams] = form_teams(call, omp_get_num_threads());
    const int64_t team = id / parts, part = id % parts;
    for (int64_t round = 0; round < call.G; round += teams) {
      const int64_t group = round + team;
      const bool works = team < teams && group < call.G;
      if (works) {
        sums[id].clear();
        for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
          const int64_t first = i % blocks * cut.block(), head = group * heads + i / blocks;
          const Tokens some{first, std::min(cut.block(), tokens - first), head};
          backward_block(call, cut, some, scratch, sums[id]);
        }
      }
#pragma omp barrier
      if (works) write_sums(call, cut, group, &sums[team * parts], parts, part, parts);
#pragma omp barrier
    }
  }
  return 0;
}

}  // namespace

// Both return how many bytes of memory they need, where they are given none.

extern "C" int64_t multi_head_ffn_forward(const Call* call, void* memory) {
  char* start = static_cast<char*>(memory);
  return call->dtype == kFloat64 ? forward<double>(*call, start) : forward<float>(*call, start);
}

extern "C" int64_t multi_head_ffn_backward(const Call* call, void* memory) {
  char* start = static_cast<char*>(memory);
  return call->dtype == kFloat64 ? backward<double>(*call, start) : backward<float>(*call, start);
}
