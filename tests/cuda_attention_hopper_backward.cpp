// Runs the two kernels of Hopper's backward of attention in the host twin, as they are and with one
// wait, fence, barrier or arrival left out, each in turn; see leave_out_each. And again with a
// number that is not finite, which they find and then go carefully.
#include <cmath>
#include <string>
#include <vector>

#include "cuda_attention_hopper_broken.h"
//
#include "../csrc/cuda/attention_hopper_backward.cuh"
#include "cuda_attention_inputs.h"

using namespace fastgpt::cuda;

namespace {

constexpr int kWidth = 64, kRows = 128, kLength = 4 * 128 - 5;
constexpr std::initializer_list<Kind> kAll = {
    kBlockBarrier,      kCopiersBarrier, kReadersBarrier, kNamedBarrier, kBarrierFence,
    kAsynchronousFence, kProductFence,   kProductWait,    kFullWait,     kFullArrival,
    kEmptyWait,         kTellersWait,    kEmptyArrival};

struct Case {
  Matrix16 q{1, kLength, kWidth}, k{2, kLength, kWidth}, v{3, kLength, kWidth},
      g{4, kLength, kWidth}, o{5, kLength, kWidth}, lost{6, kLength, kWidth},
      dq{7, kLength, kWidth}, dk{8, kLength, kWidth}, dv{9, kLength, kWidth};
  std::vector<float> row_max, row_sum, delta, inverse;
  AttentionBackward a{};

  Case(int queries, int keys)
      : row_max(queries), row_sum(queries, 1), delta(queries), inverse(queries, 1) {
    attend(a, q, k, v, queries, keys);
    a.section = 1;
    a.grad_output = g.heads<const void>();
    a.output = o.heads<const void>();
    a.rounding = lost.heads<const void>();
    a.row_max = row_max.data(), a.row_sum = row_sum.data();
    a.row_delta = delta.data(), a.row_inverse = inverse.data();
    a.slope = 1;
    a.grad_query = dq.heads<void>();
    a.grad_key = dk.heads<void>();
    a.grad_value = dv.heads<void>();
  }

  template <class Tiles, class Kernel>
  bool check(const char* name, Kernel* kernel, int query_rows, int key_rows) {
    const BackwardMaps maps = maps_of<bfloat16>(a, query_rows, key_rows);
    return leave_out_each(
        std::string(name) + " ", kAll,
        [&] { launch(kernel, Grid{1, kHopperThreads, 1, Tiles::bytes}, nullptr, a, maps); },
        [&] {
          return bytes_of(dq.memory) + bytes_of(dk.memory) + bytes_of(dv.memory) + bytes_of(delta) +
                 bytes_of(inverse);
        });
  }
};

template <bool plain>
bool check_queries(const char* name, Case& of) {
  using Tiles = HopperQueryGradientTiles<kWidth, plain>;
  return of.check<Tiles>(name, &attention_query_gradient_hopper<bfloat16, kWidth, plain>,
                         Tiles::rows, Tiles::keys);
}

template <bool plain>
bool check_keys(const char* name, Case& of) {
  using Tiles = HopperKeyGradientTiles<kWidth, true>;
  return of.check<Tiles>(name, &attention_key_gradient_hopper<bfloat16, kWidth, plain, true, true>,
                         Tiles::queries, Tiles::rows);
}

// Puts infinity in some rows. Where a score is -inf by it, its gradient is 0 times infinity.
void spoil(Matrix16& x, std::initializer_list<int> rows) {
  for (const int row : rows)
    x.memory[size_t(row * x.width / 8)].data[0] = narrow<bfloat16>(INFINITY);
}

}  // namespace

int main() {
  Case four_tiles(kRows, 4 * 128 - 5);
  bool good = check_queries<true>("query_gradient", four_tiles);
  Case with_options(kRows, 4 * 64);
  good &= check_queries<false>("query_gradient_with_options", with_options);
  // Of each tile one, which is hidden from most queries.
  Case hidden_keys(kRows, 2 * 128 + 11);
  hidden_keys.a.hides = true;
  hidden_keys.a.before = 0, hidden_keys.a.after = 140;
  spoil(hidden_keys.k, {5, 250, 266});
  good &= check_queries<true>("query_gradient_careful", hidden_keys);

  Case four_of_queries(4 * 64 - 5, kRows);
  good &= check_keys<true>("key_gradient", four_of_queries);
  Case of_queries_with_options(4 * 64, kRows);
  good &= check_keys<false>("key_gradient_with_options", of_queries_with_options);
  Case hidden_queries(2 * 64 + 20, kRows);
  hidden_queries.a.hides = true;
  hidden_queries.a.before = -20, hidden_queries.a.after = 20;
  spoil(hidden_queries.q, {5, 100, 145});
  spoil(hidden_queries.g, {6, 101, 140});
  good &= check_keys<true>("key_gradient_careful", hidden_queries);
  return good ? 0 : 1;
}
