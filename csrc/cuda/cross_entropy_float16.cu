#include "cross_entropy_launch.cuh"

namespace fastgpt::cuda {
const Launches float16_launches = launches<float16>;
}
