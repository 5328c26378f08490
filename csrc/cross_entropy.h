// What the cross-entropy kernels of every device are told: raw pointers and strides. Nothing here
// knows torch.
#pragma once

#include <cstdint>

namespace fastgpt {

// The storage types, in the order of every `[kDTypes]` table below.
enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDTypes = 4 };

// Arithmetic is in float, and in double for double: the "accumulator type" of the comments below.

// Strides in elements: of n and l, which make a row, and of the class.
struct Places {
  int64_t outer, inner, column;
};

// N x L rows of logits; fastgpt/ops/cross_entropy.py has the formulas.
struct CrossEntropy {
  const void* logits;  // the storage type
  Places at;
  bool by_columns;    // the positions have unit stride; else the classes
  int64_t positions;  // L
  int64_t classes;
  // Already checked: 0 <= target < classes or ignore_index, and, if `partial`, anything else for
  // the rows whose target is in another slice of the classes. Null: there are probabilities.
  const int64_t* target;
  int64_t target_outer, target_inner;
  const void* probabilities;  // the storage type, or the accumulator type
  Places probability_at;
  bool probabilities_wide;
  int64_t ignore_index;
  bool partial;
  const void* weight;   // (classes,) accumulator type, or null
  double total_weight;  // the sum of the weights, of 1 each without them; 0 without `spread`
  double hard, spread;  // the share of the target, and of each class
  double softcap;       // 0: none
};

// Results (N, L), contiguous, 0 for an ignored row.
struct CrossEntropyForward : CrossEntropy {
  void* loss;     // accumulator type; double if `partial`
  void* lse;      // the same
  void* row_max;  // accumulator type: the largest logit
  void* rest;     // accumulator type: sum over j != target of exp(y_j - row_max)
};

// An upstream gradient (N, L) of accumulator type; strides are 0 for an expanded scalar.
struct Upstream {
  const void* data;
  int64_t outer, inner;
};

struct CrossEntropyBackward : CrossEntropy {
  Upstream grad_loss, grad_lse;  // the second may be null
  const void* row_max;
  const void* rest;
  void* grad_logits;  // the storage type; may be the logits
  Places out;
  bool stream;  // write around the caches
};

}  // namespace fastgpt
