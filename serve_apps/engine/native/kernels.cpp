// One step of a Llama-type decoder on a CPU, over weights that are stored in bf16 (exactly) or fp32. A model in fp32 is
// computed in fp32; of one in bf16 what enters a product is rounded to bf16, all sums and the residual stream are fp32.
//
// The files are compiled once per instruction set; LANES is how many floats a register holds. Every number of a row
// is one chain of multiply-adds in one order, whatever else is in the batch: rows and columns are blocked, sums
// never are. So a row's bits depend on that row alone. What each kernel computes is written in torch in
// model_runner.py and lora.py, which the tests compare it with.
//
// Measured on AVX2 cores (Zen 3), GFLOP/s a core at 32 to 512 rows: pairs of bf16 widened in registers 90, widened
// first into an fp32 buffer 78 (dropped), torch in fp32 30 to 80. Decode attention at 64 rows of 160 tokens, which
// waits for memory: 1.6 times faster with blocks fetched ahead, in huge pages.
//
// Measured once, by a scratch script that timed the parts of a step, on two AVX-512 cores that multiply bf16 (Zen 5)
// beside other work, good for the order of things and no more: SmolLM2-135M, a step of 64 rows of 160 tokens over 16
// adapters, ms: 54 as first run; 46 with the cache and all inputs of products in bf16; 42 with the weights of all maps
// in one piece and fetched ahead (products of 32 to 64 rows 1.1 to 1.2 times faster); 40 with adapters and gate added
// where a product still lies in the cache. One of 512 prompt tokens: 181, 188, 161, 144. Panels as the outer loop, 14
// rows in a tile, bands of 256 rows and units of whole bands first made no difference or were slower.

#include <cstdint>
#include <vector>

#include "attention.h"
#include "projections.h"
#include "team.h"

namespace openledger {

template <class A>
inline void norm_row(const float* x, const float* weight, int64_t width, float eps, A* out) {
  F squares{};
  float tail = 0;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) squares += get(x + i) * get(x + i);
  for (; i < width; ++i) tail += x[i] * x[i];
  const float scale = 1.0f / std::sqrt((sum(squares) + tail) / float(width) + eps);
  each_vector(width, [=](int64_t i, int64_t n) { put(out + i, get(weight + i, n) * (get(x + i, n) * scale), n); });
}

// The greatest of a row and the first place where it stands; NaN if there is one.
inline void find_best(const float* row, int64_t width, int64_t* best, float* highest) {
  F most = F{} - INFINITY;
  I is_bad{};
  each_vector(width, [&](int64_t i, int64_t n) {
    F v = get(row + i, n);
    for (int64_t j = n; j < LANES; ++j) v[j] = -INFINITY;
    most = v > most ? v : most;
    is_bad |= v != v;
  });
  float found = most[0];
  bool has_nan = false;
  for (int i = 0; i < LANES; ++i) {
    found = most[i] > found ? most[i] : found;
    has_nan |= is_bad[i] != 0;
  }
  *highest = has_nan ? NAN : found;
  *best = has_nan ? 0 : std::find(row, row + width, found) - row;
}

template <class Row>
void each_row(Team& team, int64_t num_rows, const Row& row) {
  const int64_t per_unit = 8;
  team.share((num_rows + per_unit - 1) / per_unit, [&](int64_t unit) {
    for (int64_t r = unit * per_unit; r < std::min(num_rows, (unit + 1) * per_unit); ++r) row(r);
  });
}

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
  float* hidden;   // [tokens, hidden]: embeddings, consumed
  float* logits;   // [sampled, vocabulary]
  int64_t* best;   // [sampled]: each row's likeliest token
  float* highest;  // [sampled]: its logit
  float* buffer;   // [tokens, hidden + qkv + max(heads, hidden) + inner]; afterwards begins with the last norm's [sampled, hidden]
};

template <class A>
void run_step(Team& team, const Decoder& model, const Step& step) {
  const Shape& shape = model.shape;
  const int64_t n = step.num_tokens;
  float *last = step.buffer, *qkv = last + n * shape.hidden;
  A *x = reinterpret_cast<A*>(last), *seen = reinterpret_cast<A*>(qkv + n * shape.qkv_out());
  A* inner = seen + n * shape.heads_out();
  const float eps = float(shape.norm_eps);
  const std::vector<Work> works = split(shape, step.spans, step.num_spans);
  const auto adapted = [&](const Linear& l, int64_t layer, int projection, const A* in) {
    Adapted<A> found(step.segments, step.num_segments, layer * kProjections + projection);
    found.shrink(team, in, l.d_in);
    return found;
  };
  const auto project = [&](const Linear& l, int64_t layer, int projection, const A* in, float* out, bool adds) {
    linear(team, l, in, adapted(l, layer, projection, in), n, out, adds);
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
    place<A>(team, shape, layer.cache, step.spans, step.num_spans, qkv);
    attend(team, shape, layer.cache, step.spans, works, qkv, seen);
    project(layer.o, i, 1, seen, step.hidden, true);
    norm(layer.mlp_norm);
    gated(team, layer.gate_up, x, adapted(layer.gate_up, i, 2, x), n, inner);
    project(layer.down, i, 3, inner, step.hidden, true);
  }
  for (int64_t r = 0; r < step.num_sampled; ++r) {
    const float* row = step.hidden + step.sampled[r] * shape.hidden;
    norm_row(row, model.final_norm, shape.hidden, eps, last + r * shape.hidden);
    norm_row(row, model.final_norm, shape.hidden, eps, seen + r * shape.hidden);
  }
  linear(team, model.head, seen, Adapted<A>(nullptr, 0, 0), step.num_sampled, step.logits, false);
  each_row(team, step.num_sampled, [&](int64_t r) {
    find_best(step.logits + r * shape.vocabulary, shape.vocabulary, step.best + r, step.highest + r);
  });
}

}  // namespace openledger

extern "C" {
using namespace openledger;

Team* openledger_team(int64_t num_threads) { return new Team(int(num_threads)); }
void openledger_disband(Team* team) { delete team; }
void openledger_step(Team* team, const Decoder* model, const Step* step) {
  if (model->shape.is_half) run_step<Half>(*team, *model, *step);
  else run_step<float>(*team, *model, *step);
}

// The number of the first matrix that holds a value that is not finite; num_matrices without one.
int64_t openledger_pack(const Matrix* matrices, int64_t num_matrices) {
  for (int64_t i = 0; i < num_matrices; ++i)
    if (!pack(matrices[i])) return i;
  return num_matrices;
}

// The kernels one by one, for tests and measurements. Inputs are in bf16 where the map's `kind` is 2.
void openledger_linear(Team* team, const Linear* l, const void* x, int64_t num_rows, float* out, int64_t adds,
                       const Segment* segments, int64_t num_segments, int64_t index) {
  const auto run = [&](auto* in) {
    Adapted<std::remove_const_t<std::remove_pointer_t<decltype(in)>>> adapted(segments, num_segments, index);
    adapted.shrink(*team, in, l->d_in);
    linear(*team, *l, in, adapted, num_rows, out, adds != 0);
  };
  if (l->kind == 2) run(static_cast<const Half*>(x));
  else run(static_cast<const float*>(x));
}
void openledger_gated(Team* team, const Linear* l, const void* x, int64_t num_rows, void* out, const Segment* segments,
                      int64_t num_segments, int64_t index) {
  const auto run = [&](auto* in) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
    Adapted<X> adapted(segments, num_segments, index);
    adapted.shrink(*team, in, l->d_in);
    gated(*team, *l, in, adapted, num_rows, static_cast<X*>(out));
  };
  if (l->kind == 2) run(static_cast<const Half*>(x));
  else run(static_cast<const float*>(x));
}
void openledger_attend(Team* team, const Shape* shape, const Cache* cache, const Span* spans, int64_t num_spans,
                       float* qkv, void* out) {
  const auto run = [&](auto* seen) {
    using C = std::remove_pointer_t<decltype(seen)>;
    place<C>(*team, *shape, *cache, spans, num_spans, qkv);
    attend(*team, *shape, *cache, spans, split(*shape, spans, num_spans), qkv, seen);
  };
  if (shape->is_half) run(static_cast<Half*>(out));
  else run(static_cast<float*>(out));
}
void openledger_norm(const float* x, const float* weight, int64_t num_rows, int64_t width, double eps, float* out) {
  for (int64_t r = 0; r < num_rows; ++r) norm_row(x + r * width, weight, width, float(eps), out + r * width);
}
void openledger_best(const float* rows, int64_t num_rows, int64_t width, int64_t* best, float* highest) {
  for (int64_t r = 0; r < num_rows; ++r) find_best(rows + r * width, width, best + r, highest + r);
}
}
