// AVX-512 with the bf16 instructions: Cooper Lake, Sapphire Rapids, Zen 4 and later.
//
// The target is switched for this file alone, after the last include of a shared header: no inline
// function that another file also emits may be compiled with these instructions.
#if defined(__x86_64__)

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own _mm512_undefined_ps() trips them (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define FASTGPT_AVX512
#define FASTGPT_AVX512_BF16
#define FASTGPT_ISA_NAME "avx512_bf16"

namespace fastgpt {
namespace avx512_bf16 {
#include "vec.h"
#include "cross_entropy.inl.h"
#include "cross_entropy_columns.inl.h"
#include "gemm.h"
#include "packing.h"
#include "linear_cross_entropy.inl.h"
#include "attention.inl.h"
#include "attention_forward.inl.h"
#include "attention_decode.inl.h"
#include "attention_backward.inl.h"
#include "table.inl.h"
}  // namespace avx512_bf16
}  // namespace fastgpt

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
