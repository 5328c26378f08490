// Which kernel does a call, on how many blocks. Included by a file for each storage type, so that
// they are compiled at once.
#pragma once

#include <type_traits>

#include "cross_entropy.cuh"
#include "launch.h"

namespace fastgpt::cuda {

// Rows up to this length are a warp's.
constexpr int64_t kWarpClasses = 1024;
// What a block should read of a row before another one joins it; and, in columns, a thread.
constexpr int64_t kBlockBytes = 64 * 1024, kThreadClasses = 128;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Teams of `layout` for so many rows, and blocks for each: by the shape of a row alone, so that its
// bits do not depend on the rows beside it.
template <class T, Layout layout, class Arguments>
Grid grid_of(const Arguments& a, int largest_cluster) {
  if (a.rows == 0) return {0, kThreads, 1};
  if (layout == kWarpRows) return {ceil_div(a.rows, kWarps), kThreads, 1};
  const int64_t wanted = layout == kColumns ? a.classes / (kWarps * kThreadClasses)
                                            : ceil_div(a.classes * int64_t(sizeof(T)), kBlockBytes);
  int cluster = 1;
  while (2 * cluster <= largest_cluster && cluster < wanted) cluster *= 2;
  const int64_t outer = a.rows / a.positions;
  const int64_t teams = layout == kColumns ? outer * ceil_div(a.positions, kWarp) : a.rows;
  return {teams * cluster, kThreads, cluster};
}

// Calls f with the kind and the layout of a call, as types.
template <class T, class Arguments, class F>
void with_kernel(const Arguments& a, const F& f) {
  const auto with_layout = [&](auto kind) {
    if (a.by_columns) {
      f(kind, std::integral_constant<Layout, kColumns>{});
    } else if (a.classes <= kWarpClasses) {
      f(kind, std::integral_constant<Layout, kWarpRows>{});
    } else {
      f(kind, std::integral_constant<Layout, kBlockRows>{});
    }
  };
  if (a.probabilities) {
    with_layout(std::integral_constant<Kind, kProbabilities>{});
  } else if (a.spread != 0 || a.softcap != 0) {
    with_layout(std::integral_constant<Kind, kClasses>{});
  } else {
    with_layout(std::integral_constant<Kind, kPlain>{});
  }
}

template <class T>
void launch_forward(const ForwardArguments& a, void* stream) {
  with_kernel<T>(a, [&](auto kind, auto layout) {
    const auto kernel = &forward<T, decltype(kind)::value, decltype(layout)::value>;
    const Grid grid = grid_of<T, decltype(layout)::value>(a, largest_cluster(kernel));
    launch(kernel, grid, Stream(stream), a);
  });
}

template <class T>
void launch_backward(const BackwardArguments& a, void* stream) {
  with_kernel<T>(a, [&](auto kind, auto layout) {
    const auto kernel = &backward<T, decltype(kind)::value, decltype(layout)::value>;
    const Grid grid = grid_of<T, decltype(layout)::value>(a, largest_cluster(kernel));
    launch(kernel, grid, Stream(stream), a);
  });
}

template <class T>
constexpr Launches launches{&launch_forward<T>, &launch_backward<T>};

}  // namespace fastgpt::cuda
