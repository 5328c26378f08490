// What the CPU kernels offer to the rest: argument structs of raw pointers and strides, and one
// table of function pointers per instruction set. Nothing here knows torch.
#pragma once

#include <cstdint>

namespace fastgpt {

// The storage types, in the order of every `[kDTypes]` table below.
enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDTypes = 4 };

// Arithmetic is in float, and in double for double: the "accumulator type" of the comments below.

struct CrossEntropyForward {
  const void* logits;     // (N, classes) of the storage type, innermost stride 1
  int64_t row_stride;     // elements
  const int64_t* target;  // (N,), already checked: 0 <= target < classes, or ignore_index
  int64_t target_stride;  // elements
  int64_t classes;
  int64_t ignore_index;
  void* loss;     // (N,) accumulator type; 0 for an ignored row
  void* row_max;  // (N,) accumulator type: max_j x_j
  void* rest;     // (N,) accumulator type: sum over j != target of exp(x_j - row_max)
};

struct CrossEntropyBackward {
  const void* grad_loss;     // (N,) accumulator type
  int64_t grad_loss_stride;  // elements; 0 for an expanded scalar
  const void* logits;
  int64_t row_stride;
  const int64_t* target;
  int64_t target_stride;
  int64_t classes;
  int64_t ignore_index;
  const void* row_max;
  const void* rest;
  void* grad_logits;  // (N, classes) contiguous, of the storage type
  bool stream;        // write around the caches: the gradient is larger than they are
};

// Each kernel does the rows [begin, end) and touches no others, so any split over threads gives the
// same bits.
template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

struct Kernels {
  const char* isa;
  Kernel<CrossEntropyForward> cross_entropy_forward[kDTypes];
  Kernel<CrossEntropyBackward> cross_entropy_backward[kDTypes];
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
