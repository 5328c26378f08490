// Cases of cuda_primitives.cpp for the primitives of 9.0a.
#pragma once

#include "cuda_primitives_hopper.cuh"

namespace {

constexpr int kBoxBytes = 64 * 64 * 2;

// ---- copies of tensors ----

// (3, 2, 5, 20, 72) or its first four dimensions, and a box of (2, 1, 3, 4, 64) of it.
template <class T, int rank>
struct Boxes {
  static constexpr int sizes[5] = {72, 20, 5, 2, 3}, box[5] = {64, 4, 3, 1, 2};
  static constexpr int rows = rank == 5 ? 24 : 12;
  TensorShape shape{rank, {}, {}, {}};
  int elements = 1;

  Boxes() {
    for (int d = 0; d < rank; ++d) {
      shape.sizes[d] = sizes[d];
      shape.strides[d] = elements;
      shape.box[d] = box[d];
      elements *= sizes[d];
    }
  }

  // Calls f(place in the box, place in the tensor or -1) for a box that begins there.
  template <class F>
  void each(const int (&from)[5], const F& f) const {
    for (int n = 0; n < rows * 64; ++n) {
      int64_t place = 0;
      bool inside = true;
      for (int d = 0, rest = n; d < rank; rest /= box[d], ++d) {
        const int c = from[d] + rest % box[d];
        inside = inside && c >= 0 && c < sizes[d];
        place += c * shape.strides[d];
      }
      f(n, inside ? int(place) : -1);
    }
  }
};

constexpr int kPlaces[][5] = {
    {0, 0, 0, 0, 0}, {8, 16, 2, 1, 1}, {-8, -1, -2, 1, -1}, {32, 18, 4, 1, 2}, {72, 0, 0, 0, 0}};

template <class T, int rank>
void check_load_box() {
  const Boxes<T, rank> boxes;
  Buffer<T> tensor(boxes.elements), out(boxes.rows * 64);
  for (int i = 0; i < tensor.size; ++i) tensor[i] = T{uint16_t(i + 1)};
  const TensorMap map = make_tensor_map(tensor.data, boxes.shape);
  for (const auto& c : kPlaces) {
    run(load_box<rank, T>, {1, 64, 1, kBoxBytes}, map, out.data, boxes.rows, c[0], c[1], c[2], c[3],
        c[4]);
    boxes.each(c, [&](int n, int place) {
      check_equal(out[n].bits, place < 0 ? 0 : tensor[place].bits, "element " + std::to_string(n));
    });
  }
}

CASE(box_of_4_dimensions_is_loaded) { check_load_box<bfloat16, 4>(); }
CASE(box_of_5_dimensions_is_loaded) { check_load_box<float16, 5>(); }

template <class T, int rank>
void check_store_box() {
  const Boxes<T, rank> boxes;
  Buffer<T> tensor(boxes.elements), in(boxes.rows * 64);
  for (int i = 0; i < in.size; ++i) in[i] = T{uint16_t(i + 1)};
  const TensorMap map = make_tensor_map(tensor.data, boxes.shape);
  for (const auto& c : kPlaces) {
    std::vector<uint16_t> wanted(size_t(boxes.elements), 7);
    for (int i = 0; i < tensor.size; ++i) tensor[i] = T{7};
    run(store_box<rank, T>, {1, 64, 1, kBoxBytes}, map, in.data, boxes.rows, c[0], c[1], c[2], c[3],
        c[4]);
    boxes.each(c, [&](int n, int place) {
      if (place >= 0) wanted[size_t(place)] = in[n].bits;
    });
    for (int i = 0; i < tensor.size; ++i)
      check_equal(tensor[i].bits, wanted[size_t(i)], "element " + std::to_string(i));
  }
}

CASE(box_of_4_dimensions_is_stored) { check_store_box<float16, 4>(); }
CASE(box_of_5_dimensions_is_stored) { check_store_box<bfloat16, 5>(); }

CASE(tensor_that_cannot_be_copied_in_boxes_is_refused) {
  Buffer<bfloat16> data(64 * 64);
  const TensorShape good{4, {64, 8, 8, 1}, {1, 64, 512, 64}, {64, 8, 1, 1}};
  const auto refused = [&](const char* wanted, const bfloat16* at, auto change) {
    TensorShape shape = good;
    change(shape);
    std::string found;
    try {
      make_tensor_map(at, shape);
    } catch (const std::invalid_argument& error) {
      found = error.what();
    }
    check(std::regex_search(found, std::regex(wanted)), found + ", not " + wanted);
  };
  make_tensor_map(data.data, good);
  refused("3 to 5 dimensions, not 6", data.data, [](TensorShape& s) { s.rank = 6; });
  refused("an address of 0 modulo 16, not 2", data.data + 1, [](TensorShape&) {});
  refused("innermost stride of 1, not 2", data.data, [](TensorShape& s) { s.strides[0] = 2; });
  refused("multiples of 8, not 65", data.data, [](TensorShape& s) { s.strides[1] = 65; });
  refused("strides from 8 .*, not 0", data.data, [](TensorShape& s) { s.strides[2] = 0; });
  refused("boxes of 64 columns, not 32", data.data, [](TensorShape& s) { s.box[0] = 32; });
  refused("boxes of 1 to 256, not 257", data.data, [](TensorShape& s) { s.box[1] = 257; });
  refused("sizes of 1 to 2.32, not 0", data.data, [](TensorShape& s) { s.sizes[3] = 0; });
}

// ---- products of a warpgroup ----

template <class T>
TensorMap map_of(Buffer<T>& data, int rows, int columns) {
  return make_tensor_map(
      data.data,
      {4, {columns, rows, 1, 1}, {1, columns, rows * columns, rows * columns}, {64, 64, 1, 1}});
}

// The operands as a kernel has them, B by its columns or by its rows.
template <class T>
struct Stored {
  Buffer<T> a, b;
  Stored(const Operands<T>& from, bool across) : a(from.m * from.k), b(from.k * from.n) {
    for (int i = 0; i < a.size; ++i) a[i] = integer<T>(from.a[size_t(i)]);
    for (int i = 0; i < from.k; ++i)
      for (int j = 0; j < from.n; ++j)
        b[across ? i * from.n + j : j * from.k + i] = integer<T>(from.b[size_t(i * from.n + j)]);
  }
};

template <bool a_in_registers, bool across_b, int columns, class T>
void check_warpgroup() {
  const Operands<T> operands(64, columns, 64);
  Stored<T> stored(operands, across_b);
  Buffer<float> c(64 * columns);
  run(multiply_warpgroup<a_in_registers, across_b, columns, T>,
      {1, 128, 1, (1 + (columns + 63) / 64) * kBoxBytes}, map_of(stored.a, 64, 64),
      across_b ? map_of(stored.b, 64, columns) : map_of(stored.b, columns, 64), stored.a.data,
      c.data);
  operands.check_product(c);
}

CASE(warpgroups_product_with_64_columns) {
  check_warpgroup<false, false, 64, bfloat16>();
  check_warpgroup<false, true, 64, float16>();
}
CASE(warpgroups_product_with_80_columns) {
  check_warpgroup<false, false, 80, float16>();
  check_warpgroup<false, true, 80, bfloat16>();
}
CASE(warpgroups_product_with_96_columns) {
  check_warpgroup<false, false, 96, bfloat16>();
  check_warpgroup<false, true, 96, float16>();
}
CASE(warpgroups_product_with_128_columns) {
  check_warpgroup<false, false, 128, float16>();
  check_warpgroup<false, true, 128, bfloat16>();
}
CASE(warpgroups_product_with_256_columns) {
  check_warpgroup<false, false, 256, bfloat16>();
  check_warpgroup<false, true, 256, float16>();
}
CASE(warpgroups_product_of_registers_with_64_columns) {
  check_warpgroup<true, false, 64, float16>();
  check_warpgroup<true, true, 64, bfloat16>();
}
CASE(warpgroups_product_of_registers_with_80_columns) {
  check_warpgroup<true, false, 80, bfloat16>();
  check_warpgroup<true, true, 80, float16>();
}
CASE(warpgroups_product_of_registers_with_96_columns) {
  check_warpgroup<true, false, 96, float16>();
  check_warpgroup<true, true, 96, bfloat16>();
}
CASE(warpgroups_product_of_registers_with_128_columns) {
  check_warpgroup<true, false, 128, bfloat16>();
  check_warpgroup<true, true, 128, float16>();
}
CASE(warpgroups_product_of_registers_with_256_columns) {
  check_warpgroup<true, false, 256, float16>();
  check_warpgroup<true, true, 256, bfloat16>();
}

template <Omitted omitted = Omitted::kNothing>
void check_stream(int steps) {
  const Operands<bfloat16> operands(64, 64, 64 * steps);
  Stored<bfloat16> stored(operands, false);
  Buffer<float> c(64 * 64);
  run(stream_products<omitted, bfloat16>, {1, 384, 1, 4 * kBoxBytes},
      map_of(stored.a, 64, 64 * steps), map_of(stored.b, 64, 64 * steps), c.data, steps);
  operands.check_product(c);
}

CASE(stream_of_one_product) { check_stream(1); }
CASE(stream_of_seven_products) { check_stream(7); }

template <Omitted omitted = Omitted::kNothing>
void check_stored() {
  const Operands<float16> operands(64, 64, 64);
  Stored<float16> stored(operands, false);
  Buffer<float> c(64 * 64);
  run(multiply_stored<omitted, float16>, {1, 128, 1, 2 * kBoxBytes}, stored.a.data, stored.b.data,
      c.data);
  operands.check_product(c);
}

CASE(product_of_what_threads_stored) { check_stored(); }

// ---- barriers of some threads ----

template <Omitted omitted = Omitted::kNothing>
void check_turns() {
  Buffer<float> out(1);
  run(take_turns<omitted>, {1, 256, 1}, out.data, 4);
  float wanted = 1;
  for (int i = 0; i < 4; ++i) wanted = 3 * (3 * wanted) + 1;
  check_equal(out[0], wanted, "number");
}

CASE(named_barriers_give_turns) { check_turns(); }

CASE(one_lane_of_each_warp_is_elected) {
  Buffer<int> out(8);
  run(count_elected, {1, 256, 1}, out.data);
  for (int i = 0; i < 8; ++i) check_equal(out[i], 3, "warp " + std::to_string(i));
}

}  // namespace
