#include "attention_launch.cuh"

namespace fastgpt::cuda {
const AttentionLaunches attention_float16_256 = attention_launches<float16, 256>;
}
