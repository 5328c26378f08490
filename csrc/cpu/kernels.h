// What the CPU kernels offer to the rest: argument structs of raw pointers and strides, and one
// table of function pointers per instruction set. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "../cross_entropy.h"

namespace fastgpt {

// ---- linear cross-entropy ----

// Cross-entropy of the logits x W^T + b, of which `logits`, `at`, `by_columns` and `positions` of
// the base mean nothing. Its rows are numbered in `row_of`.
struct LinearCrossEntropy : CrossEntropy {
  int64_t rows, depth;
  const int64_t* row_of;  // (rows,) those that are not ignored, as the tensors count them
  const void* input;      // (N, depth), storage type, of unit innermost stride
  int64_t input_row;
  const void* matrix;  // (classes, depth), likewise
  int64_t matrix_row;
  const void* bias;  // (classes,) storage type, contiguous, or null
  // (N,) accumulator type; double if `partial`
  void *loss, *lse;

  // Whether gradients are formed, and for which upstream ones of loss, lse and lse^2, each but the
  // first of which may be null.
  bool backward;
  Upstream grad_loss, grad_lse, grad_square;
  double filter_eps;  // the part of a probability below it is left out
  // Accumulator type, contiguous, or null. What is not one of the rows is left as it is.
  void *grad_input, *grad_matrix, *grad_bias;

  // The rows of one call of `run` for each phase and task: [first_row, first_row + chunk_rows).
  int64_t first_row, chunk_rows;
};

// ---- attention ----

// A tensor (B, heads, N, columns) of unit innermost stride; the others in elements.
template <class Void>
struct Heads {
  Void* data;
  int64_t batch, head, row;
};

enum MaskKind { kNoMask, kBoolMask, kStorageMask, kAccumulatorMask };

// (B, query heads, L, S), any stride may be 0: which keys a query may look at, or what is added to
// the scores, of the storage or the accumulator type.
struct AttentionMask {
  MaskKind kind;
  const void* data;
  int64_t batch, head, row, column;  // strides in elements
  int64_t sizes[4];                  // its own, each that of the scores or 1
};

struct Attention {
  int64_t batch, query_heads, heads, queries, keys, head_dim, value_dim;
  // (queries,) each: the first key that a query sees and the one behind its last, which never fall
  // from one query to the next, and the query's own place among the keys.
  const int64_t *begin, *end, *place;
  double scale;
  double softcap;  // 0: none
  AttentionMask mask;
  // A number for each head, accumulator type, or null; `_batch` is the stride of a sequence.
  const void* slopes;
  int64_t slopes_batch;
  const void* sinks;
  int64_t sinks_batch;
  // (batch,), or null: no dropout. A weight stays unless its 32 bits are less than `drop_below`,
  // and is multiplied by `rescale`, which is 1 without dropout.
  const int64_t* seeds;
  uint32_t drop_below;
  double rescale;
  Heads<const void> query, key, value;  // the storage type; query_heads is a multiple of heads
};

struct AttentionForward : Attention {
  int64_t threads;       // how many there may be: decides where keys are packed, no result
  Heads<void> output;    // the storage type
  Heads<void> rounding;  // what rounding took from it, if the accumulator type is another
  // (B, query_heads, L) accumulator type
  void* lse;      // -inf for a row that sees no key
  void* row_max;  // the largest score, in the kernel's units (attention.inl.h)
  void* row_sum;  // sum_j exp(score_j - largest); both 0 for a row that sees no key
};

struct AttentionBackward : Attention {
  Heads<const void> grad_output, output, rounding;
  const void* grad_lse;  // or null
  const void* row_max;
  const void* row_sum;
  Heads<void> grad_query, grad_key, grad_value;
  void* grad_mask;   // the sizes of the mask, accumulator type, contiguous; or null
  void* grad_sinks;  // (B, query_heads, L) accumulator type; or null
};

// What a call needs and falls into. The tasks of one phase may run in any order and at once, each
// with a scratch of its own; the phases follow one another. What a task adds up depends on the
// shape alone, so any number of threads gives the same bits.
constexpr int kPhases = 5;
struct Plan {
  int64_t workspace_bytes;  // shared by all phases
  int64_t scratch_bytes;    // of a task
  int64_t tasks[kPhases];
  // Of linear cross-entropy, whose phases are run for one chunk of its rows after another.
  int64_t chunk_rows = 0;
};

template <class Arguments>
struct PhasedKernel {
  Plan (*plan)(const Arguments&);
  void (*run)(const Arguments&, int phase, int64_t task, void* workspace, void* scratch);
};

// Each kernel does the rows [begin, end) and touches no others, so any split over threads gives the
// same bits.
template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

struct Kernels {
  const char* isa;
  Kernel<CrossEntropyForward> cross_entropy_forward[kDTypes];
  Kernel<CrossEntropyBackward> cross_entropy_backward[kDTypes];
  PhasedKernel<LinearCrossEntropy> linear_cross_entropy[kDTypes];
  PhasedKernel<AttentionForward> attention_forward[kDTypes];
  PhasedKernel<AttentionBackward> attention_backward[kDTypes];
};

// The tables, one per ISA file; those of another architecture do not exist.
namespace scalar {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

// dispatch.cpp. `isas` lists the tables that this processor can run, slowest first.
int isa_count();
const Kernels& isa_at(int index);
const Kernels& active_kernels();
// Makes the named table the active one; false if this processor cannot run it or it does not exist.
bool set_active_isa(const char* name);

}  // namespace fastgpt
