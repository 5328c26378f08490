// Runs every CPU kernel on buffers of exactly the size it may touch, for test_sanitizers.py to
// build with the address and undefined-behaviour sanitizers. Knows no torch. Exits 0 if all is
// well.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/cpu/kernels.h"

using namespace fastgpt;

namespace {

constexpr int64_t kIgnore = -100;
std::mt19937 generator(0);

// One logit in each storage type, and back.
void put(DType dtype, void* data, int64_t i, double x) {
  const float f = float(x);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(data)[i] = f;
      break;
    case kFloat64:
      static_cast<double*>(data)[i] = x;
      break;
    case kBFloat16:
      static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
      break;
    default:  // the fp16 numbers 1 + k / 1024
      static_cast<uint16_t*>(data)[i] = uint16_t(0x3c00 + (uint32_t(std::fabs(x) * 64) & 0x3ff));
  }
}

double get(DType dtype, const void* data, int64_t i) {
  const uint16_t* half = static_cast<const uint16_t*>(data) + i;
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == kFloat64) return static_cast<const double*>(data)[i];
  if (dtype == kBFloat16) {
    const uint32_t bits = uint32_t(*half) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  const int exponent = (*half >> 10) & 31, fraction = *half & 0x3ff;
  const double magnitude =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return *half & 0x8000 ? -magnitude : magnitude;
}

template <class A>
bool check(const Kernels& kernels, DType dtype, int64_t rows, int64_t classes, bool stream) {
  const size_t bytes[] = {4, 8, 2, 2};
  // Each row in the middle of nothing: exact allocations, so that one element too many is caught.
  std::vector<uint8_t> logits(size_t(rows * classes) * bytes[dtype]), grad(logits.size());
  std::vector<int64_t> target(static_cast<size_t>(rows));
  std::vector<A> loss(target.size()), row_max(target.size()), rest(target.size()), g(target.size());
  std::normal_distribution<double> normal(0, 3);
  for (int64_t i = 0; i < rows * classes; ++i) put(dtype, logits.data(), i, normal(generator));
  for (int64_t r = 0; r < rows; ++r) {
    target[size_t(r)] = r % 5 == 4 ? kIgnore : int64_t(generator() % uint64_t(classes));
    g[size_t(r)] = A(normal(generator));
  }
  const CrossEntropyForward forward{logits.data(), classes,     target.data(),  1,          classes,
                                    kIgnore,       loss.data(), row_max.data(), rest.data()};
  kernels.cross_entropy_forward[dtype](forward, 0, rows);
  const CrossEntropyBackward backward{g.data(),       1,           logits.data(), classes,
                                      target.data(),  1,           classes,       kIgnore,
                                      row_max.data(), rest.data(), grad.data(),   stream};
  kernels.cross_entropy_backward[dtype](backward, 0, rows);

  const double tolerance = dtype == kFloat64 ? 1e-13 : dtype == kFloat32 ? 1e-5 : 2e-2;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = target[size_t(r)];
    double total = 0;
    for (int64_t j = 0; j < classes; ++j)
      total += std::exp(get(dtype, logits.data(), r * classes + j));
    const double expected_loss =
        t == kIgnore ? 0 : std::log(total) - get(dtype, logits.data(), r * classes + t);
    bool good = std::fabs(double(loss[size_t(r)]) - expected_loss) <= 1e-5 * (1 + expected_loss);
    for (int64_t j = 0; j < classes; ++j) {
      const double p = std::exp(get(dtype, logits.data(), r * classes + j)) / total;
      const double expected = t == kIgnore ? 0 : double(g[size_t(r)]) * (p - (j == t));
      const double got = get(dtype, grad.data(), r * classes + j);
      good = good && std::fabs(got - expected) <= tolerance * std::fabs(double(g[size_t(r)]));
    }
    if (!good) {
      std::printf("%s: dtype %d, %lld classes, row %lld is wrong\n", kernels.isa, int(dtype),
                  static_cast<long long>(classes), static_cast<long long>(r));
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const int64_t sizes[] = {1,  2,  3,  7,  8,   15,   16,   17,   31,
                           33, 63, 64, 65, 127, 1000, 2048, 2049, 4099};
  int checked = 0;
  for (int i = 0; i < isa_count(); ++i) {
    for (int dtype = 0; dtype < kDTypes; ++dtype) {
      for (int64_t classes : sizes) {
        for (bool stream : {false, true}) {
          const bool good = dtype == kFloat64
                                ? check<double>(isa_at(i), DType(dtype), 7, classes, stream)
                                : check<float>(isa_at(i), DType(dtype), 7, classes, stream);
          if (!good) return 1;
          ++checked;
        }
      }
    }
  }
  std::printf("%d cases\n", checked);
  return 0;
}
