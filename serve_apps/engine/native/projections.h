// Linear maps over packed weights, and what the adapters of a step add to them.
#pragma once

#include <vector>

#include "team.h"
#include "tile.h"

namespace openledger {

constexpr int kBand = 128;  // rows of a unit
constexpr int kProjections = 4;  // qkv, o, gate_up, down
constexpr int kMaxRank = 3 * 256 + kSlim;

// y = x W^T + bias, W packed as [panel][d_in][16] in fp32 or [panel][pair of d_in][16][2] in bf16.
struct Linear {
  const void* panels;
  const float* bias;  // padded to whole panels, or null
  int64_t d_in, d_out;
  int64_t kind;  // 0: fp32; 1: weights in bf16, multiplied in fp32; 2: inputs in bf16 too
};

// The update of one fused projection: t = x A, then each part adds t[its ranks] B to its own columns.
struct Part {
  const Half* b;  // [panel][pair of rank][16][2]
  int64_t first_rank, rank, first_column, num_columns;
};
struct Update {
  const Half* a;  // [panel][pair of d_in][8][2]; null: the adapter leaves this projection alone
  int64_t rank, num_parts;
  Part parts[3];
};
struct Segment {  // tokens start..end belong to one adapter, updates [layer][projection]
  const Update* updates;
  int64_t start, end;
};
// A matrix of an adapter's file, and its place among the rows of panels that are all zeros before.
struct Matrix {
  const Half* from;  // [num_rows][depth]
  uint32_t* panels;  // [panel][pair of depth][width], two bf16 in a word
  int64_t num_rows, depth, first_row, width;
};

// A unit is a band of rows times a few panels: its panels stay in the cache while the rows pass. While the last rows
// pass, the panels of the unit after the next are fetched; those of all maps lie one after the other in memory.
template <class X, class W>
void multiply_all(Team& team, const Linear& l, Input<X> in, int64_t num_rows, float* out, bool adds) {
  const W* panels = static_cast<const W*>(l.panels);
  const int64_t num_panels = (l.d_out + kPanel - 1) / kPanel, size = panel_size<W>(l.d_in, kPanel);
  const int64_t num_bands = (num_rows + kBand - 1) / kBand;
  const int64_t per_unit = std::max<int64_t>(4, num_panels / (16 * team.size()) / 4 * 4);
  const int64_t units_per_band = (num_panels + per_unit - 1) / per_unit;
  team.share(num_bands * units_per_band, [&](int64_t unit) {
    const int64_t band = unit / units_per_band, first = unit % units_per_band * per_unit;
    const int64_t end = (band + 1) * num_rows / num_bands;
    each_tile(band * num_rows / num_bands, end, [&](int64_t row, auto rows) {
      multiply<rows(), kPanel>(Input<X>{in.x + row * in.stride, in.stride, in.depth}, panels, size, first,
                               std::min(num_panels, first + per_unit), out + row * l.d_out, l.d_out, l.d_out, l.bias,
                               adds, row + rows() == end ? per_unit * team.size() : 0);
    });
  });
}

inline void linear(Team& team, const Linear& l, const Half* x, int64_t num_rows, float* out, bool adds) {
  multiply_all<Half, Half>(team, l, Input<Half>{x, l.d_in, l.d_in}, num_rows, out, adds);
}

inline void linear(Team& team, const Linear& l, const float* x, int64_t num_rows, float* out, bool adds) {
  const Input<float> in{x, l.d_in, l.d_in};
  if (l.kind == 1) return multiply_all<float, Half>(team, l, in, num_rows, out, adds);
  if (l.kind == 0) return multiply_all<float, float>(team, l, in, num_rows, out, adds);
  const int64_t stride = (l.d_in + 1) / 2 * 2, per_unit = 16;
  std::vector<Half> halves(size_t(stride * num_rows));
  team.share((num_rows + per_unit - 1) / per_unit, [&](int64_t unit) {
    for (int64_t r = unit * per_unit; r < std::min(num_rows, (unit + 1) * per_unit); ++r)
      convert(x + r * l.d_in, halves.data() + r * stride, l.d_in);
  });
  multiply_all<Half, Half>(team, l, Input<Half>{halves.data(), stride, l.d_in}, num_rows, out, adds);
}

// Rows of one adapter: inputs in bf16 are multiplied in bf16, and so is what lies between the factors.
template <class A>
void lora_tile(const Update& u, const A* x, int64_t d_in, int num_rows, float* out, int64_t d_out) {
  float t[kTile * kMaxRank];
  A between[kTile * kMaxRank];
  const int64_t num_panels = (u.rank + kSlim - 1) / kSlim, stride = num_panels * kSlim;
  with_rows(num_rows, [&](auto rows) {
    multiply<rows(), kSlim>(Input<A>{x, d_in, d_in}, u.a, panel_size<Half>(d_in, kSlim), 0, num_panels, t, stride,
                            stride, nullptr, false);
    convert(t, between, rows() * stride);
    for (int64_t i = 0; i < u.num_parts; ++i) {
      const Part& part = u.parts[i];
      multiply<rows(), kPanel>(Input<A>{between + part.first_rank, stride, part.rank}, part.b,
                               panel_size<Half>(part.rank, kPanel), 0, (part.num_columns + kPanel - 1) / kPanel,
                               out + part.first_column, d_out, part.num_columns, nullptr, true);
    }
  });
}

template <class A>
void lora(Team& team, const Segment* segments, int64_t num_segments, int64_t index, const A* x, int64_t d_in,
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

// Whether every value is finite: then no exponent is all ones, and one more carries into no sign.
inline bool pack(const Matrix& m) {
  const int64_t num_pairs = (m.depth + 1) / 2;
  uint32_t carries = 0;
  for (int64_t r = 0; r < m.num_rows; ++r) {
    const int64_t row = m.first_row + r;
    const Half* from = m.from + r * m.depth;
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

}  // namespace openledger
