// Portable C++: every processor runs this one.
#include "kernels.h"

#include <math.h>
#include <string.h>

#define FASTGPT_ISA_NAME "scalar"

namespace fastgpt {
namespace scalar {
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
}  // namespace scalar
}  // namespace fastgpt
