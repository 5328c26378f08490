#include "attention_launch.cuh"

namespace fastgpt::cuda {
const AttentionLaunches attention_bfloat16_64 = attention_launches<bfloat16, 64>;
}
