#include "cross_entropy_launch.cuh"

namespace fastgpt::cuda {
const Launches bfloat16_launches = launches<bfloat16>;
}
