#include "attention_launch.cuh"

namespace fastgpt::cuda {
const AttentionLaunches attention_float16_96 = attention_launches<float16, 96>;
}
