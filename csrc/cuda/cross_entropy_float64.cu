#include "cross_entropy_launch.cuh"

namespace fastgpt::cuda {
const Launches float64_launches = launches<double>;
}
