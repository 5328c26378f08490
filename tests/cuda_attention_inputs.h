// What the programs that leave parts of attention out give to its kernels. Included after them.
#pragma once

#include <random>
#include <string>
#include <vector>

namespace fastgpt::cuda {

// A matrix (1, 1, rows, width) of normal numbers, on a boundary of 16 bytes.
struct Matrix16 {
  int width;
  std::vector<Vector<bfloat16>> memory;
  Matrix16(unsigned seed, int rows, int width) : width(width), memory(rows * width / 8) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (auto& vector : memory) {
      for (bfloat16& x : vector.data) x = narrow<bfloat16>(normal(generator));
    }
  }
  template <class Void>
  Heads<Void> heads() {
    return {memory.data(), 0, 0, width, true};
  }
};

template <class T>
std::string bytes_of(const std::vector<T>& x) {
  return {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(T)};
}

// One head of one sequence, without a mask.
inline void attend(Attention& a, Matrix16& query, Matrix16& key, Matrix16& value, int queries,
                   int keys) {
  a.batch = a.query_heads = a.heads = a.group = 1;
  a.queries = queries, a.keys = keys;
  a.head_dim = query.width, a.value_dim = value.width;
  a.query = query.heads<const void>();
  a.key = key.heads<const void>();
  a.value = value.heads<const void>();
  a.before = -(1 << 30), a.after = 1 << 30;
  a.scale = a.unit = 0.125f;
  a.factor = 0.125f * 1.442695f;
  a.rescale = 1;
}

}  // namespace fastgpt::cuda
