// On how many blocks the attention kernels run. Included by a file for each storage type and width,
// so that they are compiled at once.
#pragma once

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_hopper_backward.cuh"
#include "attention_hopper_forward.cuh"
#include "attention_launch.h"
#include "launch.h"

namespace fastgpt::cuda {

// Half of the second-level cache of an A100's partition, for what the heads in flight read.
constexpr int64_t kCacheBytes = 16 << 20;

inline int section_of(int64_t heads, int64_t rows, const Attention& a) {
  const int64_t bytes = rows * (a.head_dim + a.value_dim) * 2;
  const int64_t fitting = kCacheBytes / bytes;
  return int(fitting < 1 ? 1 : fitting < heads ? fitting : heads);
}

// A block for each tile of each head.
template <class Kernel, class Arguments>
void launch_tiles(Kernel* kernel, Arguments a, int64_t length, int64_t tile, int64_t heads,
                  int section, int bytes, void* stream) {
  a.section = section;
  const int64_t blocks = heads * ((length + tile - 1) / tile);
  launch(kernel, Grid{blocks, kAttentionThreads, 1, bytes}, Stream(stream), a);
}

template <class Tiles, class Kernel, class Arguments>
void launch_over_queries(Kernel* kernel, const Arguments& a, void* stream) {
  const int64_t groups = int64_t(a.batch) * a.heads;
  launch_tiles(kernel, a, a.queries, Tiles::rows, groups * a.group,
               a.group * section_of(groups, a.keys, a), Tiles::bytes, stream);
}

template <class Tiles, class Kernel>
void launch_over_keys(Kernel* kernel, const AttentionBackward& a, void* stream) {
  const int64_t groups = int64_t(a.batch) * a.heads;
  launch_tiles(kernel, a, a.keys, Tiles::rows, groups,
               section_of(groups, int64_t(a.group) * a.queries, a), Tiles::bytes, stream);
}

template <class T, int width>
bool forward_in_boxes(const AttentionForward& a) {
  return fits_boxes(a) && hopper_passes(width).forward &&
         runs_on_hopper(&attention_forward_hopper<T, width, true>);
}

template <class T, int width>
void launch_attention_forward(const AttentionForward& a, bool in_boxes, void* stream) {
  if (in_boxes) {
    const int64_t groups = int64_t(a.batch) * a.heads;
    const int section = a.group * section_of(groups, a.keys, a);
    launch_attention_forward_hopper<T, width>(a, section, stream);
    return;
  }
  launch_over_queries<ForwardTiles<width>>(&attention_forward<T, width>, a, stream);
}

// Options have no room in registers beside rows of 256 columns.
template <class T, int width>
bool backward_in_boxes(const AttentionBackward& a) {
  return fits_boxes(a) && (width <= 128 || is_plain(a)) && hopper_passes(width).backward &&
         runs_on_hopper(&attention_query_gradient_hopper<T, width, true>);
}

template <class T, int width>
void launch_attention_backward(const AttentionBackward& a, bool in_boxes, void* stream) {
  if (in_boxes) {
    const int64_t groups = int64_t(a.batch) * a.heads;
    launch_attention_backward_hopper<T, width>(a, a.group * section_of(groups, a.keys, a),
                                               section_of(groups, int64_t(a.group) * a.queries, a),
                                               stream);
    return;
  }
  launch_over_queries<QueryGradientTiles<width>>(&attention_query_gradient<T, width>, a, stream);
  using Tiles = KeyGradientTiles<width>;
  if constexpr (width <= 128) {
    launch_over_keys<Tiles>(&attention_key_gradient<T, width, true, true>, a, stream);
  } else {
    launch_over_keys<Tiles>(&attention_key_gradient<T, width, true, false>, a, stream);
    launch_over_keys<Tiles>(&attention_key_gradient<T, width, false, true>, a, stream);
  }
}

template <class T, int width>
constexpr AttentionLaunches attention_launches{
    &forward_in_boxes<T, width>, &launch_attention_forward<T, width>, &backward_in_boxes<T, width>,
    &launch_attention_backward<T, width>};

}  // namespace fastgpt::cuda
