// One step of a Llama-type decoder on a CPU: fp32 arithmetic over weights that are stored in bf16 (exactly) or fp32.
//
// The file is compiled once per instruction set; LANES is how many floats a register holds. Every number of a row
// is one chain of multiply-adds in one order, whatever else is in the batch: rows and columns are blocked, sums
// never are. So a row's bits depend on that row alone. What each kernel computes is written in torch in
// model_runner.py and lora.py, which the tests compare it with.
//
// Measured on AVX2 cores (Zen 3), GFLOP/s a core at 32 to 512 rows: pairs of bf16 widened in registers 90, widened
// first into an fp32 buffer 78 (dropped), torch in fp32 30 to 80. Decode attention at 64 rows of 160 tokens, which
// waits for memory: 1.6 times faster with blocks fetched ahead, in huge pages.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "team.h"

#ifndef LANES
#define LANES 4
#endif

namespace openledger {
namespace {

constexpr int kPanel = 16;  // columns that lie together in packed weights, and tokens of a block of the cache
constexpr int kSlim = 8;    // the same for the first factor of an adapter
constexpr int kTile = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;  // rows whose sums fit the registers
constexpr int kAhead = 6;    // blocks of the cache that are on their way
constexpr int kBand = 128;   // rows of a unit
constexpr int kMaxRank = 3 * 256 + kSlim;

typedef float F4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U4 __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t U8 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(2), may_alias));

template <int L> struct Types;
template <> struct Types<4> { using F = F4; using U = U4; };
template <> struct Types<8> { using F = F8; using U = U8; };
template <> struct Types<16> { using F = F16; using U = U16; };

using F = Types<LANES>::F;
using U = Types<LANES>::U;
typedef int32_t I __attribute__((vector_size(4 * LANES), may_alias));

template <int L> inline typename Types<L>::F load(const float* p) {
  return *reinterpret_cast<const typename Types<L>::F*>(p);
}

// Weights in bf16 lie in pairs, [k / 2][column][k % 2]: the upper half of a float is a bf16, so a shift and a mask
// widen both.
template <int L> inline typename Types<L>::F load_even(const uint16_t* pairs) {
  return (typename Types<L>::F)(*reinterpret_cast<const typename Types<L>::U*>(pairs) << 16);
}
template <int L> inline typename Types<L>::F load_odd(const uint16_t* pairs) {
  return (typename Types<L>::F)(*reinterpret_cast<const typename Types<L>::U*>(pairs) & 0xffff0000u);
}

// acc + even * even + odd * odd of pairs in bf16; the processor's own instruction rounds in its own way.
template <int L>
inline typename Types<L>::F dot(typename Types<L>::F acc, const uint16_t* pairs, uint32_t x) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16)
    return (F16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(pairs), (__m512bh)_mm512_set1_epi32(int(x)));
#endif
  const uint32_t even = x << 16, odd = x & 0xffff0000u;
  float x_even, x_odd;
  memcpy(&x_even, &even, 4), memcpy(&x_odd, &odd, 4);
  acc += load_even<L>(pairs) * x_even;
  acc += load_odd<L>(pairs) * x_odd;
  return acc;
}

inline F load(const float* p) { return load<LANES>(p); }
inline void store(float* p, F v) { *reinterpret_cast<F*>(p) = v; }

// f(index, load, store) for whole vectors of 0..width, then for what is left, padded with zeros.
template <class Body>
inline void each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES)
    body(i, [](const float* p) { return openledger::load(p); }, [](float* p, F v) { openledger::store(p, v); });
  const size_t rest = 4 * size_t(width - i);
  if (rest)
    body(i, [=](const float* p) { F v{}; memcpy(&v, p, rest); return v; }, [=](float* p, F v) { memcpy(p, &v, rest); });
}

inline float sum(F v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// exp to about 2 ulp between e^-87 and infinity, NaN of NaN: Cody-Waite reduction, polynomial of degree 7 as in Cephes.
inline F exp_of(F x) {
  const F high_enough = x < -87.0f ? F{} - 87.0f : x, capped = x > 88.7f ? F{} + 88.7f : high_enough;
  const F magic = F{} + 12582912.0f;
  const F n = (capped * 1.44269504f + magic) - magic;
  const F r = (capped - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I whole = __builtin_convertvector(n, I), half = whole >> 1, rest = whole - half;  // n reaches 128
  const F low = (F)((half + 127) << 23), high = (F)((rest + 127) << 23);
  return x > 88.7f ? F{} + INFINITY : p * low * high;
}

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

  // The same for inputs rounded to bf16, two in a word: `x_stride` and `depth` in words.
  inline void add(const uint32_t* x, int64_t x_stride, const W* const* panels, int64_t step, int64_t depth) {
    V a[ROWS][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) a[r][v] = acc[r][v];
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        uint32_t x_rk;
        memcpy(&x_rk, x + r * x_stride + k, 4);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          a[r][v] = dot<L>(a[r][v], panels[v * L / WIDTH] + 2 * (k * step + v * L % WIDTH), x_rk);
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

template <class X>
struct Input {
  const X* x;
  int64_t stride, depth;  // in floats, or in pairs of bf16
};

// One row tile times panels first..last of a packed matrix. `out` starts at the first column of panel `first`.
template <int ROWS, int PANELS, int WIDTH, class X, class W>
inline int64_t multiply_group(Input<X> in, const W* panels, int64_t size, int64_t first, int64_t last, float* out,
                              int64_t out_stride, int64_t num_columns, const float* bias, bool adds) {
  for (; first + PANELS <= last; first += PANELS) {
    const W* group[PANELS];
    for (int p = 0; p < PANELS; ++p) group[p] = panels + (first + p) * size;
    Tile<ROWS, PANELS, WIDTH, W> tile;
    const int64_t left = num_columns - first * WIDTH;
    if (adds) tile.read(out + first * WIDTH, out_stride, left);
    else if (bias) tile.read(bias + first * WIDTH, 0, left);
    else tile.clear();
    tile.add(in.x, in.stride, group, WIDTH, in.depth);
    tile.write(out + first * WIDTH, out_stride, left);
  }
  return first;
}

template <int ROWS, int WIDTH, class X, class W>
inline void multiply(Input<X> in, const W* panels, int64_t size, int64_t first, int64_t last, float* out,
                     int64_t out_stride, int64_t num_columns, const float* bias, bool adds) {
  constexpr int kMany = panels_for(ROWS, WIDTH);
  if constexpr (kMany > 1)
    first = multiply_group<ROWS, kMany, WIDTH>(in, panels, size, first, last, out, out_stride, num_columns, bias, adds);
  multiply_group<ROWS, 1, WIDTH>(in, panels, size, first, last, out, out_stride, num_columns, bias, adds);
}

}  // namespace

// y = x W^T + bias, W packed as [panel][d_in][16] in fp32 or [panel][pair of d_in][16][2] in bf16.
struct Linear {
  const void* panels;
  const float* bias;  // padded to whole panels, or null
  int64_t d_in, d_out;
  int64_t kind;  // 0: fp32; 1: weights in bf16, multiplied in fp32; 2: inputs rounded to bf16 too
};

namespace {

// A unit is a band of rows times a few panels: its panels stay in the cache while the rows pass.
template <class X, class W>
void multiply_all(Team& team, const Linear& l, Input<X> in, int64_t num_rows, float* out, bool adds) {
  const W* panels = static_cast<const W*>(l.panels);
  const int64_t num_panels = (l.d_out + kPanel - 1) / kPanel, size = panel_size<W>(l.d_in, kPanel);
  const int64_t num_bands = (num_rows + kBand - 1) / kBand;
  const int64_t per_unit = std::max<int64_t>(4, num_panels / (16 * team.size()) / 4 * 4);
  const int64_t units_per_band = (num_panels + per_unit - 1) / per_unit;
  team.share(num_bands * units_per_band, [&](int64_t unit) {
    const int64_t band = unit / units_per_band, first = unit % units_per_band * per_unit;
    each_tile(band * num_rows / num_bands, (band + 1) * num_rows / num_bands, [&](int64_t row, auto rows) {
      multiply<rows(), kPanel>(Input<X>{in.x + row * in.stride, in.stride, in.depth}, panels, size, first,
                               std::min(num_panels, first + per_unit), out + row * l.d_out, l.d_out, l.d_out, l.bias,
                               adds);
    });
  });
}

inline uint16_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void linear_rounded(Team& team, const Linear& l, const float* x, int64_t num_rows, float* out, bool adds) {
  static thread_local std::vector<uint16_t> rounded_x;
  const int64_t num_pairs = (l.d_in + 1) / 2;
  rounded_x.resize(std::max<size_t>(rounded_x.size(), size_t(2 * num_pairs * num_rows)));
  uint16_t* target = rounded_x.data();
  team.share((num_rows + 15) / 16, [&](int64_t unit) {
    for (int64_t r = 16 * unit; r < std::min(num_rows, 16 * unit + 16); ++r) {
      for (int64_t i = 0; i < l.d_in; ++i) target[2 * r * num_pairs + i] = rounded(x[r * l.d_in + i]);
      if (l.d_in % 2) target[2 * r * num_pairs + l.d_in] = 0;
    }
  });
  const Input<uint32_t> in{reinterpret_cast<const uint32_t*>(target), num_pairs, num_pairs};
  multiply_all<uint32_t, uint16_t>(team, l, in, num_rows, out, adds);
}

void linear(Team& team, const Linear& l, const float* x, int64_t num_rows, float* out, bool adds) {
  const Input<float> in{x, l.d_in, l.d_in};
  if (l.kind == 2) linear_rounded(team, l, x, num_rows, out, adds);
  else if (l.kind == 1) multiply_all<float, uint16_t>(team, l, in, num_rows, out, adds);
  else multiply_all<float, float>(team, l, in, num_rows, out, adds);
}

}  // namespace

// The update of one fused projection: t = x A, then each part adds t[its ranks] B to its own columns.
struct Part {
  const uint16_t* b;  // [panel][pair of rank][16][2]
  int64_t first_rank, rank, first_column, num_columns;
};
struct Update {
  const uint16_t* a;  // [panel][pair of d_in][8][2]; null: the adapter leaves this projection alone
  int64_t rank, num_parts;
  Part parts[3];
};
// A matrix of an adapter's file, and its place among the rows of panels that are all zeros before.
struct Matrix {
  const uint16_t* from;  // [num_rows][depth]
  uint32_t* panels;      // [panel][pair of depth][width], two bf16 in a word
  int64_t num_rows, depth, first_row, width;
};
struct Segment {  // tokens start..end belong to one adapter, updates [layer][projection]
  const Update* updates;
  int64_t start, end;
};

namespace {

// Whether every value is finite: then no exponent is all ones, and one more carries into no sign.
bool pack(const Matrix& m) {
  const int64_t num_pairs = (m.depth + 1) / 2;
  uint32_t carries = 0;
  for (int64_t r = 0; r < m.num_rows; ++r) {
    const int64_t row = m.first_row + r;
    const uint16_t* from = m.from + r * m.depth;
    uint32_t* to = m.panels + row / m.width * num_pairs * m.width + row % m.width;
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      uint32_t two = 0;
      memcpy(&two, from + 2 * pair, 2 * pair + 2 <= m.depth ? 4 : 2);
      carries |= (two & 0x7f807f80u) + 0x00800080u;
      to[pair * m.width] = two;
    }
  }
  return (carries & 0x80008000u) == 0;
}

constexpr int kProjections = 4;  // qkv, o, gate_up, down

void lora_tile(const Update& u, const float* x, int64_t d_in, int num_rows, float* out, int64_t d_out) {
  float t[kTile * kMaxRank];
  const int64_t num_panels = (u.rank + kSlim - 1) / kSlim, t_stride = num_panels * kSlim;
  with_rows(num_rows, [&](auto rows) {
    multiply<rows(), kSlim>(Input<float>{x, d_in, d_in}, u.a, panel_size<uint16_t>(d_in, kSlim), 0, num_panels, t,
                            t_stride, t_stride, nullptr, false);
    for (int64_t i = 0; i < u.num_parts; ++i) {
      const Part& part = u.parts[i];
      multiply<rows(), kPanel>(Input<float>{t + part.first_rank, t_stride, part.rank}, part.b,
                               panel_size<uint16_t>(part.rank, kPanel), 0,
                               (part.num_columns + kPanel - 1) / kPanel, out + part.first_column, d_out,
                               part.num_columns, nullptr, true);
    }
  });
}

void lora(Team& team, const Segment* segments, int64_t num_segments, int64_t index, const float* x, int64_t d_in,
          float* out, int64_t d_out) {
  std::vector<int64_t> first_unit{0};
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t num_rows = segments[s].updates[index].a ? segments[s].end - segments[s].start : 0;
    first_unit.push_back(first_unit.back() + (num_rows + kTile - 1) / kTile);
  }
  team.share(first_unit.back(), [&](int64_t unit) {
    int64_t s = 0;
    while (first_unit[s + 1] <= unit) ++s;
    const int64_t row = segments[s].start + (unit - first_unit[s]) * kTile;
    lora_tile(segments[s].updates[index], x + row * d_in, d_in, int(std::min<int64_t>(kTile, segments[s].end - row)),
              out + row * d_out, d_out);
  });
}

}  // namespace

// A row of the plan: tokens first..first+num_tokens of the step, at positions from `start` on.
struct Span {
  int64_t first, num_tokens, start;
  const int32_t* blocks;
};

// Keys [kv_head][block][head_dim][16], values [kv_head][block][16][head_dim], of one layer.
struct Cache {
  float *keys, *values;
};

struct Shape {
  int64_t num_layers, num_heads, num_kv_heads, head_dim, hidden, inner, vocabulary, num_blocks;
  const float *cos, *sin;  // [position][head_dim / 2]
  double norm_eps;

  int64_t heads_out() const { return num_heads * head_dim; }
  int64_t qkv_out() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

namespace {

// Rows of one span: tile t holds (token, head of the group) pairs t*kTile.. in order, for one key-value head.
struct Work {
  int64_t span, kv_head, first_row, last_row;
};

std::vector<Work> split(const Shape& shape, const Span* spans, int64_t num_spans) {
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  std::vector<Work> works;
  for (int64_t s = num_spans - 1; s >= 0; --s)  // chunks come last in a plan and take longest: they start first
    for (int64_t kv = 0; kv < shape.num_kv_heads; ++kv)
      for (int64_t row = spans[s].num_tokens * group; row > 0; row -= 8 * kTile)
        works.push_back({s, kv, std::max<int64_t>(0, row - 8 * kTile), row});
  return works;
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  each_vector(half, [=](int64_t i, auto load, auto store) {
    const F a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  });
}

// Turn queries and keys of every token to their positions, and put keys and values into the cache.
void place(Team& team, const Shape& shape, const Cache& cache, const Span* spans, int64_t num_spans, float* qkv) {
  const int64_t d = shape.head_dim, kv_heads = shape.num_kv_heads, per_unit = 16;
  std::vector<std::pair<int64_t, int64_t>> units;  // span, first token
  for (int64_t s = 0; s < num_spans; ++s)
    for (int64_t t = 0; t < spans[s].num_tokens; t += per_unit) units.push_back({s, t});
  const int64_t num_groups = std::min<int64_t>(int64_t(units.size()), 8 * team.size());
  const auto one = [&](int64_t index) {
    const Span& span = spans[units[index].first];
    const int64_t begin = units[index].second, end = std::min(span.num_tokens, begin + per_unit);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = span.start + t, block = span.blocks[position / kPanel], slot = position % kPanel;
      float* row = qkv + (span.first + t) * shape.qkv_out();
      const float *cos = shape.cos + position * d / 2, *sin = shape.sin + position * d / 2;
      for (int64_t h = 0; h < shape.num_heads + kv_heads; ++h) rotate(row + h * d, cos, sin, d / 2);
      for (int64_t kv = 0; kv < kv_heads; ++kv) {
        const int64_t at = (kv * shape.num_blocks + block) * kPanel * d;
        const float *key = row + (shape.num_heads + kv) * d, *value = key + kv_heads * d;
        for (int64_t i = 0; i < d; ++i) cache.keys[at + i * kPanel + slot] = key[i];
        memcpy(cache.values + at + slot * d, value, 4 * d);
      }
    }
  };
  const int64_t total = int64_t(units.size());
  team.share(total <= 4 ? 1 : num_groups, [&](int64_t unit) {
    const int64_t groups = total <= 4 ? 1 : num_groups;
    for (int64_t i = unit * total / groups; i < (unit + 1) * total / groups; ++i) one(i);
  });
}

// Scores of a tile's queries against whole blocks of keys.
template <int ROWS, int PANELS>
inline int64_t score(const float* query, const float* keys, const float* values, const int32_t* blocks,
                     int64_t block, int64_t num_blocks, int64_t d, float* scores, int64_t stride) {
  for (; block + PANELS <= num_blocks; block += PANELS) {
    const float *group[PANELS], *ahead[PANELS];
    for (int p = 0; p < PANELS; ++p) {
      const int64_t next = block + p + kAhead;  // after the last keys come the first values
      group[p] = keys + int64_t(blocks[block + p]) * kPanel * d;
      ahead[p] = (next < num_blocks ? keys : values) + int64_t(blocks[next % num_blocks]) * kPanel * d;
    }
    Tile<ROWS, PANELS, kPanel, float> tile;
    tile.clear();
    tile.add(query, d, group, kPanel, d, ahead);
    tile.write(scores + block * kPanel, stride, PANELS * kPanel);
  }
  return block;
}

// out[r] = sum over tokens of weight * value, in order of tokens; nothing beyond `num_keys` is read.
template <int ROWS, int PANELS>
inline int64_t blend(const float* weights, int64_t stride, const float* values, const int32_t* blocks,
                     int64_t num_keys, int64_t d, int64_t column, float* out) {
  for (; column + PANELS * kPanel <= d; column += PANELS * kPanel) {
    Tile<ROWS, PANELS, kPanel, float> tile;
    tile.clear();
    for (int64_t key = 0; key < num_keys; key += kPanel) {
      const float *group[PANELS], *ahead[PANELS];
      const int64_t block = key / kPanel, next = std::min(block + kAhead, (num_keys - 1) / kPanel);
      for (int p = 0; p < PANELS; ++p) {
        group[p] = values + int64_t(blocks[block]) * kPanel * d + column + p * kPanel;
        ahead[p] = values + int64_t(blocks[next]) * kPanel * d + column + p * kPanel;
      }
      tile.add(weights + key, stride, group, d, std::min<int64_t>(kPanel, num_keys - key), ahead);
    }
    tile.write(out + column, d, PANELS * kPanel);
  }
  return column;
}

// exp(scale * (s - max)) of one row in place, zeros from num_keys to the end of the block; gives one over the sum.
inline float weigh(float* scores, int64_t num_keys, int64_t num_padded, float scale) {
  for (int64_t i = num_keys; i < num_padded; ++i) scores[i] = -INFINITY;
  F most = load(scores);
  for (int64_t i = LANES; i < num_padded; i += LANES) {
    const F s = load(scores + i);
    most = s > most ? s : most;
  }
  float highest = most[0];
  for (int i = 1; i < LANES; ++i) highest = most[i] > highest ? most[i] : highest;
  F total{};
  for (int64_t i = 0; i < num_padded; i += LANES) {
    const F weight = exp_of((load(scores + i) - highest) * scale);
    store(scores + i, weight);
    if (i + LANES <= num_keys) {
      total += weight;
    } else {
      for (int64_t j = std::max(i, num_keys); j < i + LANES; ++j) scores[j] = 0;
      total += load(scores + i);
    }
  }
  return 1.0f / sum(total);
}

template <int ROWS>
void attend_rows(const Shape& shape, const Cache& cache, const Span& span, int64_t kv_head, int64_t first,
                 const float* qkv, float* out, std::vector<float>& scores) {
  const int64_t d = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const int64_t num_keys = span.start + (first + ROWS - 1) / group + 1;
  const int64_t num_blocks = (num_keys + kPanel - 1) / kPanel, stride = num_blocks * kPanel;
  const int64_t at = kv_head * shape.num_blocks * kPanel * d;
  const float *keys = cache.keys + at, *values = cache.values + at;
  constexpr int kMany = panels_for(ROWS, kPanel);
  float rows[ROWS * 256];  // queries, then what they see
  scores.resize(std::max<size_t>(scores.size(), size_t(ROWS * stride)));
  const auto token = [&](int r) { return span.first + (first + r) / group; };
  const auto head = [&](int r) { return kv_head * group + (first + r) % group; };
  for (int r = 0; r < ROWS; ++r) memcpy(rows + r * d, qkv + token(r) * shape.qkv_out() + head(r) * d, 4 * d);
  int64_t block = 0;
  float* weights = scores.data();
  if constexpr (kMany > 1)
    block = score<ROWS, kMany>(rows, keys, values, span.blocks, 0, num_blocks, d, weights, stride);
  score<ROWS, 1>(rows, keys, values, span.blocks, block, num_blocks, d, weights, stride);
  float shares[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t own = span.start + (first + r) / group + 1;
    shares[r] = weigh(weights + r * stride, own, stride, 1.0f / std::sqrt(float(d)));
  }
  int64_t column = 0;
  if constexpr (kMany > 1)
    column = blend<ROWS, kMany>(weights, stride, values, span.blocks, num_keys, d, 0, rows);
  blend<ROWS, 1>(weights, stride, values, span.blocks, num_keys, d, column, rows);
  for (int r = 0; r < ROWS; ++r) {
    float* target = out + token(r) * shape.heads_out() + head(r) * d;
    for (int64_t i = 0; i < d; ++i) target[i] = rows[r * d + i] * shares[r];
  }
}

void attend(Team& team, const Shape& shape, const Cache& cache, const Span* spans, const std::vector<Work>& works,
            const float* qkv, float* out) {
  team.share(int64_t(works.size()), [&](int64_t unit) {
    static thread_local std::vector<float> scores;
    const Work& work = works[unit];
    each_tile(work.first_row, work.last_row, [&](int64_t row, auto rows) {
      attend_rows<rows()>(shape, cache, spans[work.span], work.kv_head, row, qkv, out, scores);
    });
  });
}

inline void norm_row(const float* x, const float* weight, int64_t width, float eps, float* out) {
  F squares{};
  float tail = 0;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) squares += load(x + i) * load(x + i);
  for (int64_t j = i; j < width; ++j) tail += x[j] * x[j];
  const float scale = 1.0f / std::sqrt((sum(squares) + tail) / float(width) + eps);
  for (i = 0; i + LANES <= width; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
  for (; i < width; ++i) out[i] = weight[i] * (x[i] * scale);
}

inline void gate_row(const float* gate_up, int64_t inner, float* out) {
  each_vector(inner, [=](int64_t i, auto load, auto store) {
    const F gate = load(gate_up + i);
    store(out + i, gate / (1.0f + exp_of(-gate)) * load(gate_up + inner + i));
  });
}

template <class Row>
void each_row(Team& team, int64_t num_rows, const Row& row) {
  const int64_t per_unit = 8;
  team.share((num_rows + per_unit - 1) / per_unit, [&](int64_t unit) {
    for (int64_t r = unit * per_unit; r < std::min(num_rows, (unit + 1) * per_unit); ++r) row(r);
  });
}

}  // namespace

struct Layer {
  const float *attn_norm, *mlp_norm;
  Linear qkv, o, gate_up, down;
  Cache cache;
};

struct Decoder {
  Shape shape;
  const Layer* layers;
  const float* final_norm;
  Linear head;
};

struct Step {
  int64_t num_tokens, num_spans, num_segments, num_sampled;
  const Span* spans;
  const Segment* segments;
  const int64_t* sampled;
  float* hidden;  // [tokens, hidden]: embeddings, consumed
  float* logits;  // [sampled, vocabulary]
  float* buffer;  // [tokens, hidden + qkv + heads + 3 * inner]; afterwards begins with the last norm's [sampled, hidden]
};

namespace {

void run_step(Team& team, const Decoder& model, const Step& step) {
  const Shape& shape = model.shape;
  const int64_t n = step.num_tokens;
  float *x = step.buffer, *qkv = x + n * shape.hidden, *seen = qkv + n * shape.qkv_out();
  float *gate_up = seen + n * shape.heads_out(), *inner = gate_up + 2 * n * shape.inner;
  const float eps = float(shape.norm_eps);
  const std::vector<Work> works = split(shape, step.spans, step.num_spans);
  const auto project = [&](const Linear& l, int64_t layer, int projection, const float* in, float* out, bool adds) {
    linear(team, l, in, n, out, adds);
    const int64_t index = layer * kProjections + projection;
    if (step.num_segments) lora(team, step.segments, step.num_segments, index, in, l.d_in, out, l.d_out);
  };
  const auto norm = [&](const float* weight) {
    each_row(team, n, [&](int64_t r) {
      norm_row(step.hidden + r * shape.hidden, weight, shape.hidden, eps, x + r * shape.hidden);
    });
  };
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    norm(layer.attn_norm);
    project(layer.qkv, i, 0, x, qkv, false);
    place(team, shape, layer.cache, step.spans, step.num_spans, qkv);
    attend(team, shape, layer.cache, step.spans, works, qkv, seen);
    project(layer.o, i, 1, seen, step.hidden, true);
    norm(layer.mlp_norm);
    project(layer.gate_up, i, 2, x, gate_up, false);
    each_row(team, n, [&](int64_t r) {
      gate_row(gate_up + 2 * r * shape.inner, shape.inner, inner + r * shape.inner);
    });
    project(layer.down, i, 3, inner, step.hidden, true);
  }
  for (int64_t r = 0; r < step.num_sampled; ++r)
    norm_row(step.hidden + step.sampled[r] * shape.hidden, model.final_norm, shape.hidden, eps, x + r * shape.hidden);
  linear(team, model.head, x, step.num_sampled, step.logits, false);
}

}  // namespace
}  // namespace openledger

extern "C" {
using namespace openledger;

Team* openledger_team(int64_t num_threads) { return new Team(int(num_threads)); }
void openledger_disband(Team* team) { delete team; }
void openledger_step(Team* team, const Decoder* model, const Step* step) { run_step(*team, *model, *step); }

// The number of the first matrix that holds a value that is not finite; num_matrices without one.
int64_t openledger_pack(const Matrix* matrices, int64_t num_matrices) {
  for (int64_t i = 0; i < num_matrices; ++i)
    if (!pack(matrices[i])) return i;
  return num_matrices;
}

// The kernels one by one, for tests and measurements.
void openledger_linear(Team* team, const Linear* l, const float* x, int64_t num_rows, float* out, int64_t adds) {
  linear(*team, *l, x, num_rows, out, adds != 0);
}
void openledger_lora(Team* team, const Segment* segments, int64_t num_segments, int64_t index, const float* x,
                     int64_t d_in, float* out, int64_t d_out) {
  lora(*team, segments, num_segments, index, x, d_in, out, d_out);
}
void openledger_attend(Team* team, const Shape* shape, const Cache* cache, const Span* spans, int64_t num_spans,
                       float* qkv, float* out) {
  place(*team, *shape, *cache, spans, num_spans, qkv);
  attend(*team, *shape, *cache, spans, split(*shape, spans, num_spans), qkv, out);
}
void openledger_norm(const float* x, const float* weight, int64_t num_rows, int64_t width, double eps, float* out) {
  for (int64_t r = 0; r < num_rows; ++r) norm_row(x + r * width, weight, width, float(eps), out + r * width);
}
void openledger_gate(const float* gate_up, int64_t num_rows, int64_t inner, float* out) {
  for (int64_t r = 0; r < num_rows; ++r) gate_row(gate_up + 2 * r * inner, inner, out + r * inner);
}
}
