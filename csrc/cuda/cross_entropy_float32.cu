#include "cross_entropy_launch.cuh"

namespace fastgpt::cuda {
const Launches float32_launches = launches<float>;
}
