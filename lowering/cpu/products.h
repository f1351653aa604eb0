// Sums of products in registers: the matrix products of blocks.cpp.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kVectors = 3;  // that a tile is wide, at most

// How many terms a sum has: `blocks` times `steps`.
struct Terms {
  int64_t steps, blocks = 1;
};

// A matrix [rows, terms] that is read value by value, so it may lie in memory in any way.
template <typename T>
struct Values {
  const T* data;
  int64_t row, step, block = 0;  // distances of rows, and of terms within a block and across blocks
};

// A matrix [terms, columns] of whole vectors.
template <typename T>
struct Rows {
  const T* data;
  int64_t row;
};

// Where alpha times the product goes, [rows, columns]: it is added to what is there, or replaces it.
template <typename T>
struct Target {
  T* data;
  int64_t row;
  T alpha;
  bool add;
};

// M rows of N vectors.
template <typename T, int M, int N>
void multiply_tile(Terms terms, Values<T> a, Rows<T> b, Target<T> out) {
  Vec<T> sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = Vec<T>(T(0));
  }
  for (int64_t block = 0; block < terms.blocks; ++block) {
    const T* values = a.data + block * a.block;
    for (int64_t step = 0; step < terms.steps; ++step) {
      Vec<T> row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = Vec<T>::loadu(b.data + n * Vec<T>::size());
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec<T> value(values[m * a.row]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = at::vec::fmadd(value, row[n], sums[m][n]);
      }
      values += a.step;
      b.data += b.row;
    }
  }
  const Vec<T> alpha(out.alpha);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* place = out.data + m * out.row + n * Vec<T>::size();
      const Vec<T> product = sums[m][n] * alpha;
      (out.add ? Vec<T>::loadu(place) + product : product).store(place);
    }
  }
}

template <typename T, int N>
void multiply_rows(int64_t rows, Terms terms, Values<T> a, Rows<T> b, Target<T> out) {
  // As many rows as leave registers for b's vectors and for one value of a.
  constexpr int most = kRegisters == 32 ? (N == 3 ? 8 : 12) : (N == 3 ? 4 : 6);
  auto tiles_of = [&](auto size) {
    constexpr int M = decltype(size)::value;
    for (; rows >= M; rows -= M) {
      multiply_tile<T, M, N>(terms, a, b, out);
      a.data += M * a.row;
      out.data += M * out.row;
    }
  };
  tiles_of(std::integral_constant<int, most>{});
  tiles_of(std::integral_constant<int, most / 2>{});
  tiles_of(std::integral_constant<int, 2>{});
  tiles_of(std::integral_constant<int, 1>{});
}

// out [rows, columns] = or += alpha a b; columns fill whole vectors.
template <typename T>
void multiply(int64_t rows, int64_t columns, Terms terms, Values<T> a, Rows<T> b, Target<T> out) {
  constexpr int64_t size = Vec<T>::size();
  while (columns > 0) {
    const int64_t n = std::min<int64_t>(columns / size, kVectors);
    auto run = n == 3 ? multiply_rows<T, 3> : n == 2 ? multiply_rows<T, 2> : multiply_rows<T, 1>;
    run(rows, terms, a, b, out);
    b.data += n * size;
    out.data += n * size;
    columns -= n * size;
  }
}

}  // namespace
