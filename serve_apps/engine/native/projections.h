// Linear maps over packed weights, and what the adapters of a step add to them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "team.h"
#include "tile.h"

namespace openledger {

constexpr int kBand = 128;  // rows of a unit
constexpr int kMost = 8;  // panels of a unit
constexpr int kProjections = 4;  // qkv, o, gate_up, down
constexpr int kMaxRank = 3 * 256 + kSlim;

// y = x W^T + bias, W packed as [panel][d_in][16] in fp32 or [panel][pair of d_in][16][2] in bf16.
struct Linear {
  const void* panels;
  const float* bias;  // padded to whole panels, or null
  int64_t d_in, d_out;
  int64_t kind;  // 0: fp32; 1: weights in bf16, multiplied in fp32; 2: inputs in bf16 too

  int64_t num_panels() const { return (d_out + kPanel - 1) / kPanel; }
};

// The update of one fused projection: t = x A, then each part adds t[its ranks] B to its own columns.
struct Part {
  const Half* b;  // [panel][pair of rank][16][2]
  int64_t first_rank, rank;
  int64_t first_panel, panel_step;  // its panel p is that of number first_panel + p * panel_step of the projection
  int64_t num_columns;

  int64_t size() const { return panel_size<Half>(rank, kPanel); }
  int64_t num_panels() const { return (num_columns + kPanel - 1) / kPanel; }
  // The first of its panels that is not before panel `number` of the projection.
  int64_t from(int64_t number) const {
    return std::clamp<int64_t>((number - first_panel + panel_step - 1) / panel_step, 0, num_panels());
  }
};
struct Update {
  const Half* a;  // [panel][pair of d_in][8][2]; null: the adapter leaves this projection alone
  int64_t rank, num_parts;
  Part parts[3];

  int64_t stride() const { return (rank + kSlim - 1) / kSlim * kSlim; }
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

// What the adapters of a step add to one projection. `X` is the type of its inputs and of what lies between the
// factors: where inputs are in bf16, that is rounded to bf16, too.
template <class X>
class Adapted {
 public:
  Adapted(const Segment* segments, int64_t num_segments, int64_t index)
      : segments_(segments), num_segments_(num_segments), index_(index) {
    for (int64_t s = 0; s < num_segments; ++s)
      if (update(s).a) stride_ = std::max(stride_, update(s).stride());
  }

  // t = x A for all rows; everything else refers to it.
  void shrink(Team& team, const X* x, int64_t d_in) {
    if (!stride_) return;
    first_row_ = segments_[0].start;
    between_.resize(size_t(segments_[num_segments_ - 1].end - first_row_) * size_t(stride_));
    std::vector<std::pair<int64_t, int64_t>> units;  // segment, first row
    for (int64_t s = 0; s < num_segments_; ++s)
      for (int64_t row = segments_[s].start; update(s).a && row < segments_[s].end; row += kTile)
        units.push_back({s, row});
    const int64_t size = panel_size<Half>(d_in, kSlim);
    team.share(int64_t(units.size()), [&](int64_t unit) {
      const auto [s, row] = units[unit];
      const Update& u = update(s);
      const size_t next = size_t(unit + team.size());
      if (next < units.size() && units[next].first != s) fetch(update(units[next].first).a, kHead);
      with_rows(int(std::min<int64_t>(kTile, segments_[s].end - row)), [&](auto rows) {
        float t[rows() * kMaxRank];
        multiply<rows(), kSlim>(Input<X>{x + row * d_in, d_in, d_in}, u.a, size, 0, u.stride() / kSlim, t, stride_,
                                stride_, nullptr, false);
        for (int r = 0; r < rows(); ++r) convert(t + r * stride_, at(row + r), u.stride());
      });
    });
  }

  // Fetch what `expand` will read.
  void prefetch(int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) const {
    each_run(first_row, end_row, [&](const Update& u, int64_t, int64_t) {
      for (int64_t i = 0; i < u.num_parts; ++i) {
        const Part& part = u.parts[i];
        fetch(part.b + part.from(first_panel) * part.size(), (part.from(end_panel) - part.from(first_panel)) * part.size());
      }
    });
  }

  // out[row - first_row][column of first_panel on] += t B, for some of the projection's panels.
  void expand(int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel, float* out,
              int64_t out_stride) const {
    each_run(first_row, end_row, [&](const Update& u, int64_t begin, int64_t end) {
      for (int64_t i = 0; i < u.num_parts; ++i) {
        const Part& part = u.parts[i];
        float* target = out + (begin - first_row) * out_stride + (part.first_panel - first_panel) * kPanel;
        with_rows(int(end - begin), [&](auto rows) {
          for (int64_t p = part.from(first_panel); p < part.from(end_panel); ++p) {
            const Half* panel = part.b + p * part.size();
            float* columns = target + p * part.panel_step * kPanel;
            Tile<rows(), 1, kPanel, Half> tile;
            tile.read(columns, out_stride, part.num_columns - p * kPanel);
            tile.add(at(begin) + part.first_rank, stride_, &panel, kPanel, part.rank);
            tile.write(columns, out_stride, part.num_columns - p * kPanel);
          }
        });
      }
    });
  }

 private:
  static constexpr int64_t kHead = 4096;  // numbers; once it has begun, the processor fetches the rest by itself

  const Update& update(int64_t segment) const { return segments_[segment].updates[index_]; }
  X* at(int64_t row) { return between_.data() + (row - first_row_) * stride_; }
  const X* at(int64_t row) const { return between_.data() + (row - first_row_) * stride_; }

  static void fetch(const Half* numbers, int64_t num) {
    for (int64_t i = 0; i < num; i += 32) __builtin_prefetch(numbers + i);
  }

  // call(update, begin, end) for the rows of each adapter among first..end.
  template <class Call>
  void each_run(int64_t first, int64_t end, const Call& call) const {
    if (!stride_) return;
    const Segment* last = segments_ + num_segments_;
    const Segment* s = std::partition_point(segments_, last, [=](const Segment& each) { return each.end <= first; });
    for (; s != last && s->start < end; ++s)
      if (s->updates[index_].a) call(s->updates[index_], std::max(first, s->start), std::min(end, s->end));
  }

  const Segment* segments_;
  int64_t num_segments_, index_, stride_ = 0, first_row_ = 0;
  std::vector<X> between_;
};

// f(row, rows, first panel, end panel, panels ahead) for tiles of rows times a few panels, `rows` a constant. A unit is
// a band of rows times those panels, which stay in the cache while the rows pass. While the last rows pass, the panels
// of the unit after the next are fetched; those of all maps lie one after the other in memory.
template <class Call>
void each_piece(Team& team, int64_t num_panels, int64_t num_rows, const Call& f) {
  const int64_t num_bands = (num_rows + kBand - 1) / kBand, at_once = kMost * team.size();
  const int64_t num_units = (num_panels + at_once - 1) / at_once * team.size();  // as many for every thread
  const int64_t per_unit = ((num_panels + num_units - 1) / num_units + 1) / 2 * 2;
  const int64_t units_per_band = (num_panels + per_unit - 1) / per_unit;
  team.share(num_bands * units_per_band, [&](int64_t unit) {
    const int64_t band = unit / units_per_band, first = unit % units_per_band * per_unit;
    const int64_t end = (band + 1) * num_rows / num_bands;
    each_tile(band * num_rows / num_bands, end, [&](int64_t row, auto rows) {
      f(row, rows, first, std::min(num_panels, first + per_unit), row + rows() == end ? per_unit * team.size() : 0);
    });
  });
}

// out = x W^T + bias + what adapters add; with `adds` on top of what `out` holds.
template <class X, class W>
void multiply_all(Team& team, const Linear& l, Input<X> in, const Adapted<X>& adapted, int64_t num_rows, float* out,
                  bool adds) {
  const W* panels = static_cast<const W*>(l.panels);
  const int64_t size = panel_size<W>(l.d_in, kPanel);
  each_piece(team, l.num_panels(), num_rows, [&](int64_t row, auto rows, int64_t first, int64_t end, int64_t ahead) {
    adapted.prefetch(row, row + rows(), first, end);
    float* target = out + row * l.d_out;
    multiply<rows(), kPanel>(Input<X>{in.x + row * in.stride, in.stride, in.depth}, panels, size, first, end, target,
                             l.d_out, l.d_out, l.bias, adds, ahead);
    adapted.expand(row, row + rows(), first, end, target + first * kPanel, l.d_out);
  });
}

// silu(gate) * up of a map whose panels are those of gate and up in turn; what is between never leaves the cache.
template <class X, class W>
void multiply_gated(Team& team, const Linear& l, Input<X> in, const Adapted<X>& adapted, int64_t num_rows, X* out) {
  const W* panels = static_cast<const W*>(l.panels);
  const int64_t size = panel_size<W>(l.d_in, kPanel), inner = l.d_out / 2;
  each_piece(team, l.num_panels(), num_rows, [&](int64_t row, auto rows, int64_t first, int64_t end, int64_t ahead) {
    float both[rows() * kMost * kPanel];
    const int64_t width = (end - first) * kPanel;
    adapted.prefetch(row, row + rows(), first, end);
    multiply<rows(), kPanel>(Input<X>{in.x + row * in.stride, in.stride, in.depth}, panels + first * size, size, 0,
                             end - first, both, width, width, l.bias ? l.bias + first * kPanel : nullptr, false, ahead);
    adapted.expand(row, row + rows(), first, end, both, width);
    for (int r = 0; r < rows(); ++r)
      for (int64_t pair = 0; pair < (end - first) / 2; ++pair) {
        const float* gates = both + r * width + 2 * pair * kPanel;
        X* target = out + (row + r) * inner + (first / 2 + pair) * kPanel;
        each_vector(kPanel, [=](int64_t i, int64_t n) {
          const F gate = get(gates + i, n);
          put(target + i, gate / (1.0f + exp_of(-gate)) * get(gates + kPanel + i, n), n);
        });
      }
  });
}

// f(a number of the type of the weights), for inputs of type X.
template <class X, class Call>
void with_weights(const Linear& l, const Call& f) {
  if constexpr (std::is_same_v<X, float>) {
    if (l.kind == 0) return f(float{});
  }
  f(Half{});
}

template <class X>
void linear(Team& team, const Linear& l, const X* x, const Adapted<X>& adapted, int64_t num_rows, float* out,
            bool adds) {
  with_weights<X>(l, [&](auto weight) {
    multiply_all<X, decltype(weight)>(team, l, Input<X>{x, l.d_in, l.d_in}, adapted, num_rows, out, adds);
  });
}
template <class X>
void gated(Team& team, const Linear& l, const X* x, const Adapted<X>& adapted, int64_t num_rows, X* out) {
  with_weights<X>(l, [&](auto weight) {
    multiply_gated<X, decltype(weight)>(team, l, Input<X>{x, l.d_in, l.d_in}, adapted, num_rows, out);
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
