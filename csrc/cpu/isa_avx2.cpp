// AVX2 with FMA and F16C: x86-64 since 2013.
//
// The target is switched for this file alone, after the last include of a shared header: no inline
// function that another file also emits may be compiled with these instructions.
#if defined(__x86_64__)

#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTGPT_AVX2
#define FASTGPT_ISA_NAME "avx2"

namespace fastgpt {
namespace avx2 {
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
}  // namespace avx2
}  // namespace fastgpt

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
