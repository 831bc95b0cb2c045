// Attention over a paged cache in place, in fp32 or bf16 (``C``): whatever a row sees, its sums run in one order.
#pragma once

#include <vector>

#include "team.h"
#include "tile.h"

namespace openledger {

constexpr int kAhead = 6;  // blocks of the cache that are on their way
constexpr int kMaxHeadDim = 256;

// A row of the plan: tokens first..first+num_tokens of the step, at positions from `start` on.
struct Span {
  int64_t first, num_tokens, start;
  const int32_t* blocks;
};

// Of one layer. In fp32 keys [kv_head][block][head_dim][16], values [kv_head][block][16][head_dim]; in bf16 keys
// [kv_head][block][head_dim / 2][16][2], values [kv_head][block][8][head_dim][2]: neighbours of a sum lie together.
struct Cache {
  void *keys, *values;
};

struct Shape {
  int64_t num_layers, num_heads, num_kv_heads, head_dim, hidden, inner, vocabulary, num_blocks;
  int64_t is_half;         // the cache, and what goes into projections, in bf16
  const float *cos, *sin;  // [position][head_dim / 2]
  double norm_eps;

  int64_t heads_out() const { return num_heads * head_dim; }
  int64_t qkv_out() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// Rows of one span: tile t holds (token, head of the group) pairs t*kTile.. in order, for one key-value head.
struct Work {
  int64_t span, kv_head, first_row, last_row;
};

inline std::vector<Work> split(const Shape& shape, const Span* spans, int64_t num_spans) {
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  std::vector<Work> works;
  for (int64_t s = num_spans - 1; s >= 0; --s)  // chunks come last in a plan and take longest: they start first
    for (int64_t kv = 0; kv < shape.num_kv_heads; ++kv)
      for (int64_t row = spans[s].num_tokens * group; row > 0; row -= 8 * kTile)
        works.push_back({s, kv, std::max<int64_t>(0, row - 8 * kTile), row});
  return works;
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  each_vector(half, [=](int64_t i, int64_t n) {
    const F a = get(x + i, n), b = get(x + half + i, n), c = get(cos + i, n), s = get(sin + i, n);
    put(x + i, a * c - b * s, n);
    put(x + half + i, b * c + a * s, n);
  });
}

inline void keep_key(float* block, int64_t slot, const float* key, int64_t d) {
  for (int64_t i = 0; i < d; ++i) block[i * kPanel + slot] = key[i];
}
inline void keep_key(Half* block, int64_t slot, const float* key, int64_t d) {
  Half halves[kMaxHeadDim];
  convert(key, halves, d);
  for (int64_t i = 0; i < d; i += 2) memcpy(block + i * kPanel + 2 * slot, halves + i, 4);
}

// `next` is the value of the token after it, if that is of the same step. A token of an odd slot is kept with its
// predecessor, where that is of the same step; where a successor is yet to come, zeros keep its place.
inline void keep_value(float* block, int64_t slot, const float* value, const float*, bool, int64_t d) {
  memcpy(block + slot * d, value, 4 * size_t(d));
}
inline void keep_value(Half* block, int64_t slot, const float* value, const float* next, bool follows, int64_t d) {
  if (slot % 2 && follows) return;
  Half own[kMaxHeadDim], other[kMaxHeadDim] = {};
  convert(value, own, d);
  Half* pairs = block + slot / 2 * 2 * d;
  if (slot % 2) {
    for (int64_t i = 0; i < d; ++i) pairs[2 * i + 1] = own[i];
    return;
  }
  if (next) convert(next, other, d);
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t two = own[i] | uint32_t(other[i]) << 16;
    memcpy(pairs + 2 * i, &two, 4);
  }
}

// Turn queries and keys of every token to their positions, and put keys and values into the cache.
template <class C>
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
        keep_key(static_cast<C*>(cache.keys) + at, slot, key, d);
        keep_value(static_cast<C*>(cache.values) + at, slot, value,
                   t + 1 < span.num_tokens ? value + shape.qkv_out() : nullptr, t > 0, d);
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
template <int ROWS, int PANELS, class C>
inline int64_t score(const C* query, const C* keys, const C* values, const int32_t* blocks, int64_t block,
                     int64_t num_blocks, int64_t d, float* scores, int64_t stride) {
  for (; block + PANELS <= num_blocks; block += PANELS) {
    const C *group[PANELS], *ahead[PANELS];
    for (int p = 0; p < PANELS; ++p) {
      const int64_t next = block + p + kAhead;  // after the last keys come the first values
      group[p] = keys + int64_t(blocks[block + p]) * kPanel * d;
      ahead[p] = (next < num_blocks ? keys : values) + int64_t(blocks[next % num_blocks]) * kPanel * d;
    }
    Tile<ROWS, PANELS, kPanel, C> tile;
    tile.clear();
    tile.add(query, d, group, kPanel, d, ahead);
    tile.write(scores + block * kPanel, stride, PANELS * kPanel);
  }
  return block;
}

// out[r] = sum over tokens of weight * value, in order of tokens. Nothing beyond `num_keys` is read but, in bf16, the
// last one's partner, which is kept with it.
template <int ROWS, int PANELS, class C>
inline int64_t blend(const C* weights, int64_t stride, const C* values, const int32_t* blocks, int64_t num_keys,
                     int64_t d, int64_t column, float* out) {
  constexpr int64_t kTogether = std::is_same_v<C, float> ? 1 : 2;
  for (; column + PANELS * kPanel <= d; column += PANELS * kPanel) {
    Tile<ROWS, PANELS, kPanel, C> tile;
    tile.clear();
    for (int64_t key = 0; key < num_keys; key += kPanel) {
      const C *group[PANELS], *ahead[PANELS];
      const int64_t block = key / kPanel, next = std::min(block + kAhead, (num_keys - 1) / kPanel);
      for (int p = 0; p < PANELS; ++p) {
        const int64_t at = kTogether * (column + p * kPanel);
        group[p] = values + int64_t(blocks[block]) * kPanel * d + at;
        ahead[p] = values + int64_t(blocks[next]) * kPanel * d + at;
      }
      tile.add(weights + key, stride, group, d, std::min<int64_t>(kPanel, num_keys - key), ahead);
    }
    tile.write(out + column, d, PANELS * kPanel);
  }
  return column;
}

// Weights exp(scale * (s - max)) of one row, zeros from num_keys to the end of the block; gives one over their sum.
template <class C>
inline float weigh(float* scores, int64_t num_keys, int64_t num_padded, float scale, C* weights) {
  for (int64_t i = num_keys; i < num_padded; ++i) scores[i] = -INFINITY;
  F most = get(scores);
  for (int64_t i = LANES; i < num_padded; i += LANES) {
    const F s = get(scores + i);
    most = s > most ? s : most;
  }
  float highest = most[0];
  for (int i = 1; i < LANES; ++i) highest = most[i] > highest ? most[i] : highest;
  F total{};
  for (int64_t i = 0; i < num_padded; i += LANES) {
    F weight = exp_of((get(scores + i) - highest) * scale);
    for (int64_t j = std::max(i, num_keys); j < i + LANES; ++j) weight[j - i] = 0;
    total += weight;
    put(weights + i, weight);
  }
  return 1.0f / sum(total);
}

template <int ROWS, class C>
void attend_rows(const Shape& shape, const Cache& cache, const Span& span, int64_t kv_head, int64_t first,
                 const float* qkv, C* out) {
  static thread_local std::vector<float> scores;
  static thread_local std::vector<C> weights;
  const int64_t d = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const int64_t num_keys = span.start + (first + ROWS - 1) / group + 1;
  const int64_t num_blocks = (num_keys + kPanel - 1) / kPanel, stride = num_blocks * kPanel;
  const int64_t at = kv_head * shape.num_blocks * kPanel * d;
  const C *keys = static_cast<const C*>(cache.keys) + at, *values = static_cast<const C*>(cache.values) + at;
  constexpr int kMany = panels_for(ROWS, kPanel);
  C queries[ROWS * kMaxHeadDim];
  float seen[ROWS * kMaxHeadDim], shares[ROWS];
  scores.resize(std::max(scores.size(), size_t(ROWS * stride)));
  weights.resize(std::max(weights.size(), size_t(ROWS * stride)));
  const auto token = [&](int r) { return span.first + (first + r) / group; };
  const auto head = [&](int r) { return kv_head * group + (first + r) % group; };
  for (int r = 0; r < ROWS; ++r) convert(qkv + token(r) * shape.qkv_out() + head(r) * d, queries + r * d, d);
  int64_t block = 0;
  if constexpr (kMany > 1)
    block = score<ROWS, kMany>(queries, keys, values, span.blocks, 0, num_blocks, d, scores.data(), stride);
  score<ROWS, 1>(queries, keys, values, span.blocks, block, num_blocks, d, scores.data(), stride);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t own = span.start + (first + r) / group + 1;
    const float scale = 1.0f / std::sqrt(float(d));
    shares[r] = weigh(scores.data() + r * stride, own, stride, scale, weights.data() + r * stride);
  }
  int64_t column = 0;
  if constexpr (kMany > 1)
    column = blend<ROWS, kMany>(weights.data(), stride, values, span.blocks, num_keys, d, 0, seen);
  blend<ROWS, 1>(weights.data(), stride, values, span.blocks, num_keys, d, column, seen);
  for (int r = 0; r < ROWS; ++r) {
    C* target = out + token(r) * shape.heads_out() + head(r) * d;
    each_vector(d, [&](int64_t i, int64_t n) { put(target + i, get(seen + r * d + i, n) * shares[r], n); });
  }
}

template <class C>
void attend(Team& team, const Shape& shape, const Cache& cache, const Span* spans, const std::vector<Work>& works,
            const float* qkv, C* out) {
  team.share(int64_t(works.size()), [&](int64_t unit) {
    const Work& work = works[unit];
    each_tile(work.first_row, work.last_row, [&](int64_t row, auto rows) {
      attend_rows<rows()>(shape, cache, spans[work.span], work.kv_head, row, qkv, out);
    });
  });
}

}  // namespace openledger
