// What the attention kernels of a GPU are told: raw pointers, strides in elements, and numbers that
// the host has worked out. Plain data, passed by value. The formulas stand in
// fastgpt/backends/triton/attention.py; the kernels of any generation take these arguments.
#pragma once

#include <cstdint>

namespace fastgpt::cuda {

// (B, heads, N, columns) of unit innermost stride.
template <class Void>
struct Heads {
  Void* data;
  int64_t batch, head, row;
  // Whether every row begins at a multiple of 16 bytes and is a whole number of them long: it can
  // be copied by vectors of 16 bytes.
  bool vectors;
};

// The storage type is bfloat16 or float16, "T"; everything else is float.
struct Attention {
  int batch, query_heads, heads, group;  // query_heads = heads * group
  int queries, keys;                     // L and S, fewer than 2^30
  int head_dim, value_dim;               // columns of query and key, and of value
  Heads<const void> query, key, value;

  // Query i sees the keys j, begin <= j < end, of those there are, and stands at `place` among
  // them. Without `spans`, begin = i + before, end = i + after, place = i + offset; a side without
  // an end has a `before` of -2^30 or less, or an `after` of 2^30 or more. Otherwise `spans` (3,
  // queries) holds begin, end and place, the first two of which never fall from one query to the
  // next.
  const int64_t* spans;
  int64_t before, after, offset;
  // Whether any key may be hidden from any query. If not, no number that is not finite is hidden.
  bool hides;

  // The score of a product s is x = scale s, then softcap tanh(x / softcap) unless softcap is 0,
  // less slope |place - j|; and unless it is `scaled`, the product itself, with the scale in what
  // follows. A score is `unit` of log e and `factor` of log 2, both above 0.
  bool scaled;
  float scale, unit, factor;
  double softcap;
  // A number for each query head, or null; `_batch` is the stride of a sequence.
  const float* slopes;
  const float* sinks;  // logits that join the denominator only, in units of log e
  int64_t slopes_batch, sinks_batch;

  // Dropout: (batch,) seeds, or null. A weight stays unless its 32 bits (fastgpt/ops/dropout.py)
  // are less than `drop_below`, and is multiplied by `rescale`, which is 1 without dropout.
  const int64_t* seeds;
  uint32_t drop_below;
  float rescale;

  // Heads whose tiles are done together, before those of the next ones: so many query heads, or
  // heads in the pass over the keys. What they read at once fits the second-level cache. The launch
  // says how many.
  int section;
};

// (B, query_heads, L) each. A query that sees nothing has output, row_max and row_sum 0, and an lse
// of -inf.
struct AttentionForward : Attention {
  Heads<void> output;    // T
  Heads<void> rounding;  // T: what rounding took from the output
  float* lse;            // unit row_max + log(row_sum)
  float* row_max;        // the largest score x_j, the sink among them
  float* row_sum;        // sum_j 2^(factor (x_j - row_max))
};

struct AttentionBackward : Attention {
  Heads<const void> grad_output, output, rounding;  // T
  const float* grad_lse;                            // or null
  const float *row_max, *row_sum;
  // The pass over the queries leaves these to that over the keys: <g, o> - grad_lse and 1 /
  // row_sum.
  float *row_delta, *row_inverse;
  float slope;  // by which dy k is multiplied for dq, and dy q for dk: scale, or 0 where weights
                // are certain
  Heads<void> grad_query, grad_key, grad_value;  // T
  float* grad_sinks;                             // of each row; or null
};

}  // namespace fastgpt::cuda
