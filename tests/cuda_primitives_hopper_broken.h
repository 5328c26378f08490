// Cases of cuda_primitives.cpp for the host twin alone: what it must say of kernels that use the
// primitives of 9.0a wrongly.
#pragma once

namespace {

// ---- the intact kernels, with something left out ----

CASE(missing_fence_of_the_barriers) {
  check_failure("has a copy come to full\\[0\\], after whose init no fence_barriers was$",
                [] { check_stream<Omitted::kBarrierFence>(1); });
}

CASE(missing_block_barrier_after_the_barriers_init) {
  check_failure(
      "uses (full|empty)\\[0\\], which (nobody initialised|thread 0 initialised, and no barrier "
      "lies between)$",
      [] { check_stream<Omitted::kBlockBarrier>(1); });
}

CASE(missing_wait_for_a_full_stage) {
  check_failure(
      "reads element \\d+ of (a|b)_tiles, (to which a copy of full\\[0\\] is under way|which "
      "nobody "
      "wrote)$",
      [] { check_stream<Omitted::kFullWait>(7); });
}

CASE(wrong_parity_of_a_full_stage) {
  check_failure("reads element \\d+ of a_tiles, (to which a copy|which nobody wrote)",
                [] { check_stream<Omitted::kFullParity>(7); });
}

CASE(missing_wait_for_an_empty_stage) {
  check_failure(
      "(writes element \\d+ of (a|b)_tiles, (which a product of warp \\d (under way reads|read, "
      "and "
      "no barrier lies between)|to which a copy of full\\[\\d\\] is under way|which a copy of "
      "full\\[\\d\\] wrote, and no barrier)|arrives at "
      "full\\[\\d\\])",
      [] { check_stream<Omitted::kEmptyWait>(7); });
}

CASE(wrong_parity_of_an_empty_stage) {
  check_failure("waits for empty\\[0\\], whose phase 0 lacks 128 arrivals and 0 bytes$",
                [] { check_stream<Omitted::kEmptyParity>(7); });
}

CASE(more_bytes_than_expected) {
  // The phase ends with the first copy, or with both, whichever comes first: the second one or the
  // wait.
  check_failure("reads element \\d+ of b_tiles, to which a copy of full\\[0\\] is under way$",
                [] { check_stream<Omitted::kSomeBytes>(7); });
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  check_failing_threads({1, 1, 1, kBoxBytes},
                        "finds that 16 bytes more than expected came to full\\[0\\]$", [&] {
                          FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
                          FASTGPT_BARRIERS(full, 1);
                          full.init(0, 1);
                          fence_barriers();
                          full.arrive_expecting(0, kBoxBytes - 16);
                          copy_tensor(s, 0, map, full, 0, 0, 0, 0, 0);
                          full.wait(0, 0);
                        });
}

CASE(fewer_bytes_than_expected) {
  check_failure("waits for full\\[0\\], whose phase 0 lacks 0 arrivals and 16 bytes",
                [] { check_stream<Omitted::kTooManyBytes>(7); });
}

CASE(missing_fence_before_a_product) {
  check_failure("multiplies with accumulators of thread \\d+ that no warpgroup_fence named",
                [] { check_stream<Omitted::kProductFence>(1); });
}

CASE(stage_given_back_while_a_product_reads_it) {
  check_failure("writes element \\d+ of (a|b)_tiles, which a product of warp \\d under way reads$",
                [] { check_stream<Omitted::kProductWait>(7); });
}

CASE(missing_asynchronous_fence_before_a_product) {
  check_failure(
      "reads element \\d+ of a_tile, which thread \\d+ wrote, and no fence_asynchronous of its "
      "lies between$",
      [] { check_stored<Omitted::kAsynchronousFence>(); });
}

CASE(missing_block_barrier_before_a_product) {
  check_failure(
      "reads element \\d+ of a_tile, which (nobody wrote|thread \\d+ wrote, and no barrier lies "
      "between)$",
      [] { check_stored<Omitted::kBlockBarrier>(); });
}

CASE(missing_turn) {
  check_failure("(reads|writes) element 0 of number, which thread \\d+ (wrote|read)",
                [] { check_turns<Omitted::kTurn>(); });
}

// ---- the order of accesses ----

// Thread 0 writes; threads 0 and 32 meet at a barrier, warps 1 and 2 at a named barrier, and thread
// 64 reads: of the two, `first` and `second` say which are there.
void run_chain(bool first, bool second, bool write_late) {
  run_threads({1, 96, 1}, [=] {
    FASTGPT_SHARED(float, s, 1);
    FASTGPT_BARRIERS(passed, 1);
    if (thread_index() == 0) passed.init(0, 1);
    block_barrier();
    if (thread_index() == 0) {
      if (!write_late) s.store(0, 5);
      passed.arrive(0);
      if (write_late) s.store(0, 5);
    }
    if (warp_index() == 1) {
      if (first && thread_index() == 32) passed.wait(0, 0);
      if (second) named_barrier_sync(3, 64);
    }
    if (warp_index() == 2) {
      if (second) named_barrier_sync(3, 64);
      if (thread_index() == 64) require(s.load(0) == 5, "what thread 0 wrote");
    }
  });
}

CASE(chain_of_barriers_orders) {
  run_chain(true, true, false);
  const std::string text =
      "^thread 64 of block 0 reads element 0 of s, which thread 0 wrote, and no";
  check_failure(text, [] { run_chain(false, true, false); });
  check_failure(text, [] { run_chain(true, false, false); });
  check_failure(text, [] { run_chain(true, true, true); });
}

CASE(read_before_another_threads_write_needs_a_barrier) {
  const auto body = [](bool waits) {
    return [waits] {
      FASTGPT_SHARED(float, s, 1);
      FASTGPT_BARRIERS(read, 1);
      if (thread_index() == 0) {
        s.store(0, 1);
        read.init(0, 63);
      }
      block_barrier();
      if (thread_index() != 5) {
        s.load(0);
        if (waits || thread_index() != 40) read.arrive(0);
        if (!waits && thread_index() == 41) read.arrive(0);
      } else {
        read.wait(0, 0);
        s.store(0, 2);
      }
    };
  };
  run_threads({1, 64, 1}, body(true));
  check_failing_threads({1, 64, 1},
                        "^thread 5 of block 0 writes element 0 of s, which thread 40 "
                        "read, and no barrier lies between$",
                        body(false));
}

CASE(wait_for_one_barrier_does_not_order_anothers_copies) {
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  const auto body = [&](int reads) {
    return [&map, reads] {
      FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 2 * 64 * 64);
      FASTGPT_BARRIERS(full, 2);
      if (thread_index() == 0) {
        for (int i = 0; i < 2; ++i) full.init(i, 1);
        fence_barriers();
        for (int i = 0; i < 2; ++i) {
          full.arrive_expecting(i, kBoxBytes);
          copy_tensor(s, i * 64 * 64, map, full, i, 0, 0, 0, 0);
        }
      }
      block_barrier();
      if (thread_index() == 0) full.wait(0, 0);
      if (thread_index() == 1) full.wait(1, 0);
      if (thread_index() == 1) s.load(reads * 64 * 64);
    };
  };
  run_threads({1, 32, 1, 2 * kBoxBytes}, body(1));
  check_failing_threads({1, 32, 1, 2 * kBoxBytes},
                        "reads element 0 of s, which a copy of full\\[0\\] wrote, and no barrier",
                        body(0));
}

// ---- fences for what is asynchronous ----

CASE(fence_of_another_thread_or_before_the_store_is_none) {
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  enum { kRight, kEarly, kOther, kLate };
  const auto body = [&](int when) {
    return [&map, when] {
      FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
      if (when == kEarly) fence_asynchronous();
      for (int i = thread_index(); i < 64 * 64; i += 32) s.store(i, {});
      if (when == kRight || (when == kOther && thread_index() == 0)) fence_asynchronous();
      block_barrier();
      if (when == kLate) fence_asynchronous();
      if (thread_index() == 0) {
        store_tensor(map, s, 0, 0, 0, 0, 0);
        store_tensor_commit();
        store_tensor_wait<0>();
      }
    };
  };
  run_threads({1, 32, 1, kBoxBytes}, body(kRight));
  for (const int when : {kEarly, kOther, kLate})
    check_failing_threads({1, 32, 1, kBoxBytes},
                          "reads element \\d+ of s, which thread \\d+ wrote, and no "
                          "fence_asynchronous of its lies between$",
                          body(when));
}

CASE(copy_over_what_was_stored_needs_a_fence) {
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  check_failing_threads({1, 32, 1, kBoxBytes},
                        "copies over element 7 of s, which thread 3 wrote, and no fence", [&] {
                          FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
                          FASTGPT_BARRIERS(full, 1);
                          if (thread_index() == 3) s.store(7, {});
                          if (thread_index() == 0) full.init(0, 1);
                          fence_barriers();
                          block_barrier();
                          if (thread_index() == 0) copy_tensor(s, 0, map, full, 0, 0, 0, 0, 0);
                        });
}

CASE(store_under_way_is_not_written_over) {
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  const auto body = [&](int waiting) {
    return [&map, waiting] {
      FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
      for (int i = thread_index(); i < 64 * 64; i += 32) s.store(i, {});
      fence_asynchronous();
      block_barrier();
      if (thread_index() == waiting) {
        store_tensor(map, s, 0, 0, 0, 0, 0);
        store_tensor_commit();
        if (waiting == 1) store_tensor_wait_read<0>();
      }
      if (waiting == 2) block_barrier();
      if (thread_index() == 1) s.store(9, {});
    };
  };
  run_threads({1, 32, 1, kBoxBytes}, body(1));
  check_failing_threads({1, 32, 1, kBoxBytes},
                        "writes element 9 of s, which a copy of thread 2 under way reads$",
                        body(2));
  check_failing_threads({1, 32, 1, kBoxBytes}, "ended, but a copy from its shared memory is under",
                        body(0));
}

// ---- registers of a product ----

// One product of tiles that hold zeros; `use` is done between the commit and the wait.
template <class Use>
void run_product(const Use& use) {
  run_threads({1, 128, 1, kBoxBytes}, [&use] {
    FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
    for (int i = thread_index(); i < 64 * 64; i += 128) s.store(i, {});
    fence_asynchronous();
    block_barrier();
    float d[32] = {}, e[32] = {};
    uint32_t a[4] = {};
    warpgroup_fence(d, e, a);
    warpgroup_multiply(d, a, along(s, 0), false);
    warpgroup_commit();
    use(s, d, e, a);
    warpgroup_wait<0>(d, e, a);
  });
}

CASE(accumulators_are_nan_until_the_wait) {
  run_product([](auto&, auto& d, auto&, auto&) {
    require(d[5] != d[5], "NaN");
    warpgroup_wait<0>(d);
    require(d[5] == 0, "the sum");
  });
}

CASE(accumulators_that_the_wait_does_not_name_stay_nan) {
  run_product([](auto&, auto& d, auto& e, auto&) {
    warpgroup_wait<0>(e);
    require(d[5] != d[5], "NaN");
  });
}

CASE(accumulators_written_under_way) {
  check_failure("finds that thread \\d+ wrote accumulators of a product that was under way$",
                [] { run_product([](auto&, auto& d, auto&, auto&) { d[3] = 1; }); });
}

CASE(fragments_written_under_way) {
  check_failure("finds that thread \\d+ wrote the A of a product that was under way$",
                [] { run_product([](auto&, auto&, auto&, auto& a) { a[3] = 1; }); });
}

CASE(fragments_written_after_the_fence) {
  check_failure("multiplies with an A of thread \\d+ that were written after the warpgroup_fence$",
                [] {
                  run_product([](auto& s, auto&, auto& e, auto&) {
                    uint32_t b[4] = {};
                    warpgroup_fence(e, b);
                    b[2] = 1;
                    warpgroup_multiply(e, b, along(s, 0), false);
                  });
                });
}

CASE(accumulators_of_a_later_group_are_not_done) {
  const auto body = [](bool early) {
    return [early](auto& s, auto& d, auto& e, auto& a) {
      warpgroup_multiply(e, a, along(s, 16), false);
      warpgroup_commit();
      if (early) {
        warpgroup_wait<1>(d, e);
      } else {
        warpgroup_wait<1>(d);
        require(d[0] == 0 && e[0] != e[0], "the first product alone");
      }
    };
  };
  run_product(body(false));
  check_failure("waits for accumulators that a later product writes$",
                [&] { run_product(body(true)); });
}

CASE(accumulators_need_a_fence_after_each_use) {
  check_failure("multiplies with accumulators of thread \\d+ that no warpgroup_fence named", [] {
    run_product([](auto& s, auto& d, auto&, auto& a) {
      warpgroup_wait<0>(d, a);
      warpgroup_fence(a);
      warpgroup_multiply(d, a, along(s, 0), true);
    });
  });
}

CASE(product_under_way_is_not_written_over) {
  check_failure("writes element \\d+ of s, which a product of warp \\d under way reads$", [] {
    run_product([](auto& s, auto&, auto&, auto&) {
      if (thread_index() == 0) s.store(70, {});  // row 1, from column 0 on but for the swizzle
      if (thread_index() == 0) s.store(8 + 64, {});
    });
  });
  // Of the first row, columns from 16 on are not read.
  run_product([](auto& s, auto&, auto&, auto&) {
    if (thread_index() == 0) s.store(16, {});
  });
}

CASE(product_across_some_columns_of_a_slab_reads_no_others) {
  const auto body = [](int row, int column) {
    return [row, column] {
      FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 2 * 64 * 64);
      for (int i = thread_index(); i < 2 * 64 * 64; i += 128) s.store(i, {});
      fence_asynchronous();
      block_barrier();
      float d[40] = {};
      uint32_t a[4] = {};
      warpgroup_fence(d, a);
      warpgroup_multiply(d, a, across(s, 0, 64 * 64), false);
      warpgroup_commit();
      if (thread_index() == 0) s.store(64 * 64 + place_in_tile(row, column), {});
      warpgroup_wait<0>(d, a);
    };
  };
  const Grid grid = {1, 128, 1, 2 * kBoxBytes};
  run_threads(grid, body(5, 16));  // column 80
  run_threads(grid, body(16, 15));
  check_failing_threads(grid, "writes element \\d+ of s, which a product of warp \\d under way",
                        body(5, 15));
}

CASE(products_of_a_warpgroup_differ) {
  check_failure("multiplies \\(64 s \\d+ added\\) where another warp of its warpgroup multiplies",
                [] {
                  run_product([](auto& s, auto& d, auto&, auto& a) {
                    warpgroup_multiply(d, a, along(s, warp_index() == 2 ? 16 : 0), true);
                  });
                });
  check_failure("has not multiplied as often as another one of its warpgroup$", [] {
    run_product([](auto& s, auto& d, auto&, auto& a) {
      if (warp_index() == 2) warpgroup_multiply(d, a, along(s, 0), true);
      warpgroup_commit();
    });
  });
}

CASE(product_without_a_wait) {
  check_failing_threads({1, 128, 1, kBoxBytes}, "ended, but a product of its warp is under way$",
                        [] {
                          FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
                          for (int i = thread_index(); i < 64 * 64; i += 128) s.store(i, {});
                          fence_asynchronous();
                          block_barrier();
                          float d[32];
                          warpgroup_fence(d);
                          warpgroup_multiply(d, along(s, 0), along(s, 0), false);
                          warpgroup_commit();
                        });
}

CASE(product_in_a_block_that_is_no_warpgroup) {
  check_failing_threads({1, 96, 1}, "in a block of 96 threads, which are not whole warpgroups", [] {
    float d[32] = {};
    warpgroup_fence(d);
  });
}

CASE(tiles_that_a_product_cannot_read) {
  const auto body = [](int at, bool is_across) {
    return [at, is_across] {
      FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
      if (is_across) {
        across(s, at, 64 * 64);
      } else {
        along(s, at);
      }
    };
  };
  run_threads({1, 128, 1, kBoxBytes}, body(512 + 48, false));
  run_threads({1, 128, 1, kBoxBytes}, body(1024, true));
  check_failing_threads({1, 128, 1, kBoxBytes},
                        "element 64 of s, at byte 128, which is no multiple", body(64, false));
  check_failing_threads({1, 128, 1, kBoxBytes}, "multiplies from column 8 on", body(8, false));
  check_failing_threads({1, 128, 1, kBoxBytes}, "at byte 32, which is no multiple of 1024",
                        body(16, true));
  check_failing_threads({1, 128, 1}, "multiplies s, not in dynamic memory", [] {
    FASTGPT_SHARED(bfloat16, s, 64 * 64);
    along(s, 0);
  });
  check_failure("uses element 4096 of s, which has 4096", [] {
    run_product(
        [](auto& s, auto& d, auto&, auto& a) { warpgroup_multiply(d, a, along(s, 512), true); });
  });
}

// ---- barriers ----

template <class Use>
void check_failing_barrier(const std::string& wanted, const Use& use) {
  check_failing_threads({1, 32, 1}, wanted, [&use] {
    FASTGPT_BARRIERS(all, 2);
    if (thread_index() == 0) use(all);
  });
}

CASE(misused_barriers) {
  check_failing_barrier("uses barrier 2 of 2$", [](auto& all) { all.init(2, 1); });
  check_failing_barrier("initialises all\\[1\\] again$", [](auto& all) {
    all.init(1, 1);
    all.init(1, 1);
  });
  check_failing_barrier("initialises all\\[0\\] for nobody$", [](auto& all) { all.init(0, 0); });
  check_failing_barrier("uses all\\[0\\], which nobody initialised$",
                        [](auto& all) { all.arrive(0); });
  check_failing_barrier("arrives at all\\[0\\], where all 1 of the phase have arrived$",
                        [](auto& all) {
                          all.init(0, 1);
                          all.arrive_expecting(0, 16);
                          all.arrive(0);
                        });
  check_failing_barrier("^thread 0 of block 0 waits for all\\[0\\], whose phase 1 lacks 2 arrivals",
                        [](auto& all) {
                          all.init(0, 2);
                          all.arrive(0);
                          all.arrive(0);
                          all.wait(0, 0);
                          all.wait(0, 1);
                        });
}

CASE(block_that_ends_before_a_copy_lands) {
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  check_failing_threads({1, 32, 1, kBoxBytes}, "block 0 ended, but a copy of full\\[0\\] is under",
                        [&] {
                          FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64);
                          FASTGPT_BARRIERS(full, 1);
                          if (thread_index() == 0) {
                            full.init(0, 1);
                            fence_barriers();
                            full.arrive_expecting(0, kBoxBytes);
                            copy_tensor(s, 0, map, full, 0, 0, 0, 0, 0);
                          }
                        });
}

CASE(boxes_that_cannot_be_copied) {
  Buffer<bfloat16> data(64 * 64);
  const TensorMap map = map_of(data, 64, 64);
  const auto body = [&](int to, bool five) {
    return [&map, to, five] {
      FASTGPT_DYNAMIC_SHARED(bfloat16, s, 0, 64 * 64 + 512);
      FASTGPT_BARRIERS(full, 1);
      full.init(0, 1);
      fence_barriers();
      if (five) copy_tensor(s, to, map, full, 0, 0, 0, 0, 0, 0);
      if (!five) copy_tensor(s, to, map, full, 0, 0, 0, 0, 0);
    };
  };
  const int bytes = kBoxBytes + 1024;
  check_failing_threads({1, 1, 1, bytes}, "element 64 of s, at byte 128, which is no multiple",
                        body(64, false));
  check_failing_threads({1, 1, 1, bytes}, "uses element 5119 of s, which has 4608",
                        body(1024, false));
  check_failing_threads({1, 1, 1, bytes}, "in a tensor of 4 dimensions by 5", body(0, true));
}

CASE(misused_named_barriers) {
  check_failing_threads({1, 32, 1}, "comes to the named barrier 0, of 1 to 15",
                        [] { named_barrier_sync(0, 32); });
  check_failing_threads({1, 32, 1}, "comes to the named barrier 16, of 1 to 15",
                        [] { named_barrier_arrive(16, 32); });
  check_failing_threads({1, 32, 1}, "comes to the named barrier 1 for 48 threads$",
                        [] { named_barrier_sync(1, 48); });
  check_failing_threads({1, 32, 1}, "comes to the named barrier 1 for 64 threads$",
                        [] { named_barrier_sync(1, 64); });
  check_failing_threads({1, 96, 1}, "for (64|96) threads, to which others came for (64|96)$",
                        [] { named_barrier_sync(1, warp_index() ? 64 : 96); });
  check_failing_threads({1, 64, 1}, "comes twice to the named barrier 2 while others have not", [] {
    if (warp_index() == 0)
      for (int i = 0; i < 2; ++i) named_barrier_arrive(2, 64);
  });
  check_failing_threads({1, 64, 1}, "waits at the named barrier 4 of 64 threads, to which not all",
                        [] {
                          if (warp_index() == 0) named_barrier_sync(4, 64);
                        });
}

CASE(arriving_at_a_named_barrier_does_not_acquire) {
  const auto body = [](bool acquires) {
    return [acquires] {
      FASTGPT_SHARED(float, s, 1);
      if (thread_index() == 0) s.store(0, 1);
      if (warp_index() == 0 || acquires) {
        named_barrier_sync(1, 64);
      } else {
        named_barrier_arrive(1, 64);
      }
      if (thread_index() == 63) s.load(0);
    };
  };
  run_threads({1, 64, 1}, body(true));
  check_failing_threads(
      {1, 64, 1}, "^thread 63 of block 0 reads element 0 of s, which thread 0 wrote", body(false));
}

CASE(misused_registers) {
  check_failing_threads({1, 384, 1}, "asks for 100 registers, not 24 to 256 by eights",
                        [] { take_registers<100>(); });
  check_failing_threads({1, 384, 1}, "asks for 16 registers", [] { give_registers<16>(); });
  check_failing_threads({1, 384, 1}, "gives registers to have 176, but has 168$",
                        [] { give_registers<176>(); });
  check_failing_threads({1, 384, 1}, "takes registers to have 160, but has 168$",
                        [] { take_registers<160>(); });
  check_failing_threads({1, 384, 1}, "waits for 240 registers, which nobody gives$", [] {
    if (warp_index() >= 4) take_registers<240>();
  });
  check_failing_threads({1, 384, 1}, "has not the registers of others of its warpgroup$", [] {
    if (warp_index() == 6) give_registers<24>();
  });
  // The block has 384 times 168 of them, fewer than 65536.
  check_failing_threads({1, 384, 1}, "waits for 240 registers, which nobody gives$", [] {
    if (warp_index() >= 4) {
      take_registers<240>();
    } else {
      give_registers<32>();
    }
  });
  run_threads({1, 384, 1}, [] {
    if (warp_index() >= 4) {
      take_registers<240>();
    } else {
      give_registers<24>();
    }
  });
}

}  // namespace
