// The products that everything is made of: a few rows times a few panels, with all sums in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace openledger {

constexpr int kPanel = 16;  // columns that lie together in packed weights, and tokens of a block of the cache
constexpr int kSlim = 8;    // the same for the first factor of an adapter
constexpr int kTile = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;  // rows whose sums fit the registers

// ROWS x (PANELS * WIDTH) sums: acc[r][c] += x[r][k] * w[panel][k][c] for k in order, `step` numbers from one k to the
// next inside a panel.
template <int ROWS, int PANELS, int WIDTH, class W>
struct Tile {
  static constexpr int L = LANES < WIDTH ? LANES : WIDTH;
  static constexpr int kVectors = PANELS * WIDTH / L;
  using V = typename Types<L>::F;
  V acc[ROWS][kVectors];

  inline void clear() {
    for (auto& row : acc)
      for (auto& v : row) v = V{};
  }

  // `ahead`, if given, are the panels that come next: pages of the cache lie anywhere, so no processor guesses them.
  inline void add(const float* x, int64_t x_stride, const W* const* panels, int64_t step, int64_t depth,
                  const W* const* ahead = nullptr) {
    V a[ROWS][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) a[r][v] = acc[r][v];
    const auto add_one = [&](int64_t k, auto load_vector) __attribute__((always_inline)) {
      V w[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) w[v] = load_vector(panels[v * L / WIDTH], v * L % WIDTH);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const float x_rk = x[r * x_stride + k];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) a[r][v] += w[v] * x_rk;
      }
    };
    if constexpr (std::is_same_v<W, float>) {
      for (int64_t k = 0; k < depth; ++k) {
        if (ahead)
          for (int p = 0; p < PANELS; ++p) __builtin_prefetch(ahead[p] + k * step);
        add_one(k, [&](const float* panel, int column) { return load<L>(panel + k * step + column); });
      }
    } else {
      const auto even = [&](int64_t k) __attribute__((always_inline)) {
        if (ahead)
          for (int p = 0; p < PANELS; ++p) __builtin_prefetch(ahead[p] + k * step);
        add_one(k, [&](const W* panel, int column) { return load_even<L>(panel + k * step + 2 * column); });
      };
      int64_t k = 0;
      for (; k + 2 <= depth; k += 2) {
        even(k);
        add_one(k + 1, [&](const W* panel, int column) { return load_odd<L>(panel + k * step + 2 * column); });
      }
      if (k < depth) even(k);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[r][v] = a[r][v];
  }

  // The same for inputs in bf16, by pairs: of an odd depth, the last number's partner meets a weight of zero.
  inline void add(const Half* x, int64_t x_stride, const Half* const* panels, int64_t step, int64_t depth,
                  const Half* const* ahead = nullptr) {
    V a[ROWS][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) a[r][v] = acc[r][v];
    for (int64_t k = 0; k < depth; k += 2) {
      if (ahead)
        for (int p = 0; p < PANELS; ++p) __builtin_prefetch(ahead[p] + k * step);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        uint32_t x_rk;
        memcpy(&x_rk, x + r * x_stride + k, 4);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          a[r][v] = dot<L>(a[r][v], panels[v * L / WIDTH] + k * step + 2 * (v * L % WIDTH), x_rk);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[r][v] = a[r][v];
  }

  // To and from out[r][c]; columns from `num_columns` on do not exist.
  inline void read(const float* out, int64_t stride, int64_t num_columns) {
    move(out, stride, num_columns, [](V& v, const float* p, int n) { v = V{}; memcpy(&v, p, 4 * n); });
  }

  inline void write(float* out, int64_t stride, int64_t num_columns) {
    move(out, stride, num_columns, [](const V& v, float* p, int n) { memcpy(p, &v, 4 * n); });
  }

 private:
  template <class Pointer, class Move>
  inline void move(Pointer out, int64_t stride, int64_t num_columns, Move move) {
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = num_columns - v * L;
        if (left >= L) move(acc[r][v], out + r * stride + v * L, L);
        else move(acc[r][v], out + r * stride + v * L, int(std::max<int64_t>(0, left)));
      }
  }
};

// How many panels go through the registers together: few rows need more, to keep enough sums in flight.
constexpr int panels_for(int rows, int width) {
  const int registers = LANES == 16 ? 24 : 12, vectors = width / (LANES < width ? LANES : width);
  const int fitting = registers / (rows * vectors);
  return fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1;
}

// Call `f` with the number of rows as a constant.
template <int ROWS = 1, class Call>
inline void with_rows(int rows, const Call& f) {
  if constexpr (ROWS < kTile) {
    if (rows != ROWS) return with_rows<ROWS + 1>(rows, f);
  }
  f(std::integral_constant<int, ROWS>{});
}

// Numbers in a panel: pairs are whole.
template <class W> constexpr int64_t panel_size(int64_t depth, int width) {
  return (std::is_same_v<W, float> ? depth : (depth + 1) / 2 * 2) * width;
}

// f(row, rows) for tiles of about equal size, `rows` a constant.
template <class Call>
inline void each_tile(int64_t first, int64_t last, const Call& f) {
  for (int64_t left = (last - first + kTile - 1) / kTile; left > 0; --left) {
    const int64_t rows = (last - first + left - 1) / left;
    with_rows(int(rows), [&](auto constant) { f(first, constant); });
    first += rows;
  }
}

// Rows of floats, or of bf16: those have a partner for the last number of an odd depth, which must be finite.
template <class X>
struct Input {
  const X* x;
  int64_t stride, depth;
};

// One row tile times panels first..last of a packed matrix, while those that lie `ahead` of them, by so many panels,
// are fetched: 0 fetches nothing.
template <int ROWS, int PANELS, int WIDTH, class X, class W>
inline int64_t multiply_group(Input<X> in, const W* panels, int64_t size, int64_t first, int64_t last, float* out,
                              int64_t out_stride, int64_t num_columns, const float* bias, bool adds,
                              int64_t ahead) {
  for (; first + PANELS <= last; first += PANELS) {
    const W *group[PANELS], *next[PANELS];
    for (int p = 0; p < PANELS; ++p) group[p] = panels + (first + p) * size, next[p] = group[p] + ahead * size;
    Tile<ROWS, PANELS, WIDTH, W> tile;
    const int64_t left = num_columns - first * WIDTH;
    if (adds) tile.read(out + first * WIDTH, out_stride, left);
    else if (bias) tile.read(bias + first * WIDTH, 0, left);
    else tile.clear();
    tile.add(in.x, in.stride, group, WIDTH, in.depth, ahead ? next : nullptr);
    tile.write(out + first * WIDTH, out_stride, left);
  }
  return first;
}

template <int ROWS, int WIDTH, class X, class W>
inline void multiply(Input<X> in, const W* panels, int64_t size, int64_t first, int64_t last, float* out,
                     int64_t out_stride, int64_t num_columns, const float* bias, bool adds, int64_t ahead = 0) {
  constexpr int kMany = panels_for(ROWS, WIDTH);
  if constexpr (kMany > 1)
    first = multiply_group<ROWS, kMany, WIDTH>(in, panels, size, first, last, out, out_stride, num_columns, bias, adds,
                                               ahead);
  multiply_group<ROWS, 1, WIDTH>(in, panels, size, first, last, out, out_stride, num_columns, bias, adds, ahead);
}

}  // namespace openledger
