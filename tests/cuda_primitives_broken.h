// Cases of cuda_primitives.cpp for the host twin alone: kernels that are wrong, and what their
// launch must say.
#pragma once

namespace fastgpt::cuda {

template <class Body>
FASTGPT_KERNEL(1024, 1)
run_body(const Body* body) {
  (*body)();
}

}  // namespace fastgpt::cuda

namespace {

// The launch fails with a text that the regular expression matches.
template <class Launch>
void check_failure(const std::string& wanted, const Launch& launch_it) {
  std::string found;
  try {
    launch_it();
  } catch (const twin::Error& error) {
    found = error.what();
  }
  check(!found.empty(), "the launch did not fail");
  check(std::regex_search(found, std::regex(wanted)), found);
}

template <class Body>
void run_threads(const Grid& grid, const Body& body) {
  launch(run_body<Body>, grid, nullptr, &body);
}

template <class Body>
void check_failing_threads(const Grid& grid, const std::string& wanted, const Body& body) {
  check_failure(wanted, [&] { run_threads(grid, body); });
}

// ---- the barriers of the intact kernels, left out one at a time ----

CASE(missing_warp_barrier_after_writing) {
  check_failure("reads element \\d+ of values, which nobody wrote",
                [] { check_exchange<Missing::kFirstBarrier>(); });
}

CASE(missing_warp_barrier_after_reading) {
  // Which of the two accesses comes first is for the order of the threads to say.
  check_failure(
      "^thread \\d+ of block 0 (reads element \\d+ of values, which thread \\d+ wrote|writes "
      "element "
      "\\d+ of values, which thread \\d+ read), and no barrier lies between$",
      [] { check_exchange<Missing::kLastBarrier>(); });
}

CASE(missing_block_barrier_after_writing) {
  check_failure("reads element \\d of sums, which nobody wrote",
                [] { check_blocks<float, Missing::kFirstBarrier>(); });
}

CASE(missing_block_barrier_after_reading) {
  check_failure("writes element \\d of sums, which thread \\d+ read, and no barrier lies between$",
                [] { check_blocks<double, Missing::kLastBarrier>(); });
}

CASE(missing_cluster_barrier_after_writing) {
  check_failure(
      "^thread 0 of block 0 reads element 1 of (sums of block 1|sums), which nobody wrote",
      [] { check_clusters<float, Missing::kFirstBarrier>(2); });
}

CASE(missing_cluster_barrier_after_reading) {
  check_failure("^thread 0 of block 1 reads element 1 of sums of block 0, which has ended$",
                [] { check_clusters<float, Missing::kLastBarrier>(2); });
  check_clusters<float, Missing::kLastBarrier>(1);
}

CASE(missing_wait_for_a_copy) {
  check_failure("reads element \\d+ of buffer, to which a copy of thread \\d+ is under way",
                [] { check_add_rows<Missing::kWait>(7); });
}

CASE(missing_barrier_after_the_wait_for_a_copy) {
  check_failure("^thread 0 of block 0 reads element 256 of buffer, which nobody wrote$",
                [] { check_add_rows<Missing::kFirstBarrier>(1); });
}

CASE(missing_barrier_before_the_next_copy) {
  check_failure(
      "(reads element \\d+ of buffer, to which a copy of thread \\d+ is under way|writes element "
      "\\d+ of buffer, which thread \\d+ read)",
      [] { check_add_rows<Missing::kLastBarrier>(7); });
}

// ---- the order of two accesses ----

CASE(write_is_not_seen_without_a_barrier) {
  const auto body = [](bool barrier) {
    return [barrier] {
      FASTGPT_SHARED(int64_t, s, 64);
      const int i = thread_index();
      s.store(i, i);
      if (barrier) block_barrier();
      if (i > 0) require(s.load(i - 1) == i - 1, "what the thread before wrote");
    };
  };
  run_threads({2, 64, 1}, body(true));
  check_failing_threads({2, 64, 1},
                        "^thread 1 of block 0 reads element 0 of s, which thread 0 wrote, and no "
                        "barrier lies between$",
                        body(false));
}

CASE(warp_barrier_does_not_order_two_warps) {
  check_failing_threads(
      {1, 64, 1}, "^thread \\d+ of block 0 reads element \\d+ of s, which thread \\d+ wrote", [] {
        FASTGPT_SHARED(float, s, 64);
        s.store(thread_index(), 1);
        warp_barrier();
        s.load(thread_index() % 32);
      });
}

CASE(block_barrier_does_not_order_two_blocks) {
  check_failing_threads(
      {2, 32, 2},
      "^thread \\d+ of block 1 reads element \\d+ of s, which thread \\d+ of block 0 wrote", [] {
        FASTGPT_SHARED(float, s, 32);
        s.store(thread_index(), 1);
        block_barrier();
        if (cluster_rank() == 1) s.load_from(0, thread_index());
        cluster_barrier();
      });
}

CASE(shuffle_does_not_order_memory) {
  check_failing_threads({1, 32, 1}, "reads element 0 of s, which thread 0 wrote", [] {
    FASTGPT_SHARED(float, s, 1);
    if (thread_index() == 0) s.store(0, 1);
    shuffle(1.0f, 0);
    s.load(0);
  });
}

CASE(two_writes_need_a_barrier) {
  check_failing_threads({1, 32, 1},
                        "^thread 1 of block 0 writes element 0 of s, which thread 0 wrote", [] {
                          FASTGPT_SHARED(bfloat16, s, 1);
                          s.store(0, {});
                        });
}

CASE(write_after_another_blocks_read_needs_a_barrier) {
  check_failing_threads({2, 32, 2}, "writes element 3 of s, which thread \\d+ of block 0 read", [] {
    FASTGPT_SHARED(float, s, 4);
    if (thread_index() < 4) s.store(thread_index(), 1);
    cluster_barrier();
    if (cluster_rank() == 0) s.load_from(1, 3);
    block_barrier();
    if (cluster_rank() == 1 && thread_index() == 3) s.store(3, 2);
    cluster_barrier();
  });
}

// Programs of random accesses and barriers. Which accesses a barrier orders is worked out here once
// more, by a vector clock for each thread; the twin must stop each program at the access that is
// the first one not ordered, or let it pass.
struct Step {
  enum { kNothing, kLoad, kStore, kLoadFrom, kWarp, kBlock, kCluster } operation;
  int element;
};

CASE(every_unordered_pair_is_found_and_no_other) {
  constexpr int blocks = 2, threads = 64, all = blocks * threads, steps = 24, elements = 3;
  struct Access {
    int thread, step;
  };
  std::mt19937 generator(1);
  const auto below = [&](int n) { return int(generator() % unsigned(n)); };
  int failed = 0, passed = 0;
  for (int round = 0; round < 1500; ++round) {
    std::vector<Step> program(all * steps, {Step::kNothing, 0});
    std::vector<std::vector<int>> clock(all, std::vector<int>(all, 0));
    // clocks[thread * steps + step]: how many steps of each thread lie before.
    std::vector<std::vector<int>> clocks(all * steps);
    const int often = 2 + below(12);
    for (int step = 0; step < steps; ++step) {
      const auto meet = [&](int first, int count, auto operation) {
        std::vector<int> joined(all, 0);
        for (int t = first; t < first + count; ++t) {
          program[size_t(t * steps + step)].operation = operation;
          for (int u = 0; u < all; ++u)
            joined[size_t(u)] = std::max(joined[size_t(u)], clock[size_t(t)][size_t(u)]);
        }
        for (int t = first; t < first + count; ++t) clock[size_t(t)] = joined;
      };
      const bool barriers = step % 2;
      if (!barriers) {
        for (int n = below(4); n > 0; --n) {
          // Of few threads, so that they meet again.
          const int thread = below(4) + 32 * below(all / 32);
          program[size_t(thread * steps + step)] = {below(often) == 0   ? Step::kStore
                                                    : below(often) == 0 ? Step::kLoadFrom
                                                                        : Step::kLoad,
                                                    below(elements)};
        }
      } else if (below(10) == 0) {
        meet(0, all, Step::kCluster);
      } else {
        for (int block = 0; block < blocks; ++block) {
          if (below(3) == 0) {
            meet(block * threads, threads, Step::kBlock);
          } else {
            for (int warp = 0; warp < threads / 32; ++warp)
              if (below(2) == 0) meet(block * threads + warp * 32, 32, Step::kWarp);
          }
        }
      }
      for (int t = 0; t < all; ++t) {
        clock[size_t(t)][size_t(t)] = step + 1;
        clocks[size_t(t * steps + step)] = clock[size_t(t)];
      }
    }

    std::vector<Access> log;
    const auto body = [&] {
      FASTGPT_SHARED(float, s, elements);
      if (thread_index() < elements) s.store(thread_index(), 0);
      cluster_barrier();
      const int thread = int(block_index()) * threads + thread_index();
      for (int step = 0; step < steps; ++step) {
        const Step& now = program[size_t(thread * steps + step)];
        if (now.operation >= Step::kLoad && now.operation <= Step::kLoadFrom)
          log.push_back({thread, step});
        if (now.operation == Step::kLoad) s.load(now.element);
        if (now.operation == Step::kStore) s.store(now.element, 1);
        if (now.operation == Step::kLoadFrom) s.load_from(1 - cluster_rank(), now.element);
        if (now.operation == Step::kWarp) warp_barrier();
        if (now.operation == Step::kBlock) block_barrier();
        if (now.operation == Step::kCluster) cluster_barrier();
      }
      cluster_barrier();
    };
    std::string found;
    try {
      run_threads({blocks, threads, blocks}, body);
    } catch (const twin::Error& error) {
      found = error.what();
    }

    const auto step_of = [&](const Access& a) {
      return program[size_t(a.thread * steps + a.step)];
    };
    const auto home = [&](const Access& a) {
      return a.thread / threads ^ (step_of(a).operation == Step::kLoadFrom);
    };
    const auto conflicts = [&](const Access& a, const Access& b) {
      return step_of(a).element == step_of(b).element && home(a) == home(b) &&
             (step_of(a).operation == Step::kStore || step_of(b).operation == Step::kStore) &&
             clocks[size_t(b.thread * steps + b.step)][size_t(a.thread)] <= a.step;
    };
    size_t first = log.size();
    for (size_t i = 0; i < log.size() && first == log.size(); ++i)
      for (size_t j = 0; j < i; ++j)
        if (conflicts(log[j], log[i])) first = i;
    const std::string where = "program " + std::to_string(round) + ": ";
    if (first == log.size()) {
      check(found.empty(), where + "ordered, but " + found);
      ++passed;
    } else {
      check(!found.empty(), where + "unordered, but nothing was said");
      check_equal(log.size(), first + 1, where + found + ", accesses");
      ++failed;
    }
  }
  check(failed > 300 && passed > 300, std::to_string(failed) + " failed of 1500");
}

// ---- shared memory ----

CASE(unwritten_shared_memory_is_not_read) {
  check_failing_threads({3, 32, 1},
                        "^thread 0 of block 0 reads element 2 of s, which nobody wrote$", [] {
                          FASTGPT_SHARED(float, s, 4);
                          if (thread_index() == 0) s.store(1, 1);
                          if (thread_index() == 0) s.load(2);
                        });
}

CASE(shared_memory_of_the_block_before_is_gone) {
  check_failing_threads({2, 32, 1},
                        "^thread 0 of block 1 reads element 0 of s, which nobody wrote$", [] {
                          FASTGPT_SHARED(float, s, 1);
                          if (block_index() == 0 && thread_index() == 0) s.store(0, 1);
                          if (block_index() == 1) s.load(0);
                        });
}

CASE(unwritten_shared_memory_is_nan) {
  run_threads({2, 1, 1}, [] {
    FASTGPT_SHARED(float, s, 1);
    float x;
    memcpy(&x, s.array->bytes(), sizeof(x));
    require(x != x, "NaN");
    s.store(0, 1);
  });
}

CASE(index_outside_an_array) {
  const std::string text = "^thread 7 of block 0 uses element (8|-1) of s, which has 8$";
  for (const int i : {8, -1}) {
    check_failing_threads({1, 32, 1}, text, [i] {
      FASTGPT_SHARED(double, s, 8);
      if (thread_index() == 7) s.store(i, 1);
    });
    check_failing_threads({1, 32, 1}, text, [i] {
      FASTGPT_SHARED(float, s, 8);
      if (thread_index() == 7) s.load(i);
    });
    check_failing_threads({1, 32, 1}, text, [i] {
      FASTGPT_SHARED(float, s, 8);
      if (thread_index() == 7) s.load_from(0, i);
    });
  }
}

CASE(dynamic_memory_past_what_the_launch_gives) {
  const char* const text = "places s at the bytes 16 to 48 of 47";
  check_failing_threads({1, 1, 1, 47}, text, [] { FASTGPT_DYNAMIC_SHARED(float, s, 16, 8); });
  run_threads({1, 1, 1, 48}, [] { FASTGPT_DYNAMIC_SHARED(float, s, 16, 8); });
}

CASE(dynamic_memory_of_two_arrays_that_overlap) {
  const auto body = [](int64_t offset) {
    return [offset] {
      FASTGPT_DYNAMIC_SHARED(float, first, 0, 5);
      FASTGPT_DYNAMIC_SHARED(float, second, offset, 4);
    };
  };
  check_failing_threads({1, 1, 1, 64}, "places second over first", body(16));
  run_threads({1, 1, 1, 64}, body(32));
}

CASE(dynamic_memory_other_than_the_kernel_states) {
  check_failing_threads({1, 1, 1, 64}, "states 48 bytes of dynamic memory, but is launched with 64",
                        [] { FASTGPT_DYNAMIC_SHARED_BYTES(48); });
}

CASE(copy_past_the_end_of_an_array) {
  Buffer<float> in(4);
  check_failing_threads({1, 1, 1}, "uses element 7 of s, which has 6", [&] {
    FASTGPT_SHARED(float, s, 6);
    copy_async(s, 4, in.data);
  });
}

CASE(matrix_past_the_end_of_an_array) {
  check_failing_threads({1, 32, 1}, "uses element 255 of s, which has 252", [] {
    FASTGPT_SHARED(bfloat16, s, 252);
    uint32_t registers[4];
    load_matrices(s, lane_index() * 8, registers);
  });
}

CASE(matrix_written_by_another_lane_needs_a_barrier) {
  const auto body = [](bool barrier) {
    return [barrier] {
      FASTGPT_SHARED(float16, s, 256);
      for (int i = 0; i < 8; ++i) s.store(lane_index() * 8 + i, {});
      if (barrier) warp_barrier();
      uint32_t registers[4];
      load_matrices(s, lane_index() * 8, registers);
    };
  };
  run_threads({1, 32, 1}, body(true));
  check_failing_threads({1, 32, 1}, "reads element \\d+ of s, which thread \\d+ wrote",
                        body(false));
}

CASE(more_shared_memory_than_a_block_has) {
  const auto body = [](bool more) {
    return [more] {
      FASTGPT_SHARED(double, first, 6 * 1024 - 1);
      if (!more) return;
      FASTGPT_SHARED(float, second, 3);
    };
  };
  run_threads({1, 1, 1}, body(false));
  run_threads({1, 1, 1}, [] { FASTGPT_SHARED(double, whole, 6 * 1024); });
  check_failing_threads({1, 1, 1}, "declares 491\\d\\d bytes of shared memory", [] {
    FASTGPT_SHARED(double, first, 6 * 1024 - 1);
    FASTGPT_SHARED(float, second, 5);
  });
}

CASE(block_that_has_ended_is_not_read) {
  check_failing_threads(
      {2, 32, 2}, "^thread 0 of block 1 reads element 0 of s of block 0, which has ended$", [] {
        FASTGPT_SHARED(float, s, 1);
        if (thread_index() == 0) s.store(0, 1);
        cluster_barrier();
        if (cluster_rank() == 0) return;
        block_barrier();
        if (thread_index() == 0) s.load_from(0, 0);
      });
  check_failing_threads({2, 32, 2},
                        "^block 1 ended, but thread 0 of block 0 reads its shared memory, and no "
                        "cluster_barrier lies between$",
                        [] {
                          FASTGPT_SHARED(float, s, 1);
                          if (thread_index() == 0) s.store(0, 1);
                          cluster_barrier();
                          if (cluster_rank() == 0 && thread_index() == 0) s.load_from(1, 0);
                        });
}

CASE(block_outside_the_cluster_is_not_read) {
  check_failing_threads({4, 32, 2}, "reads shared memory of block 2 of a cluster of 2", [] {
    FASTGPT_SHARED(float, s, 1);
    s.load_from(2, 0);
  });
}

// ---- threads that never come ----

CASE(block_barrier_in_divergent_code) {
  check_failing_threads(
      {1, 64, 1},
      "^thread 0 of block 0 waits at block_barrier, to which thread 40 of block 0 "
      "never came: it has ended$",
      [] {
        if (thread_index() < 40) block_barrier();
      });
}

CASE(cluster_barrier_without_a_block) {
  check_failing_threads(
      {2, 32, 2},
      "^thread 0 of block 0 waits at cluster_barrier, to which thread 0 of block 1 "
      "never came: it has ended$",
      [] {
        if (cluster_rank() == 0) cluster_barrier();
      });
}

CASE(shuffle_without_a_lane) {
  check_failing_threads({1, 64, 1},
                        "^thread 32 of block 0 waits at shuffle_xor, to which thread 50 of block 0 "
                        "never came: it has ended$",
                        [] {
                          if (thread_index() != 50) shuffle_xor(1.0f, 1);
                        });
}

CASE(threads_that_wait_for_each_other) {
  check_failing_threads(
      {1, 64, 1},
      "^thread \\d+ of block 0 waits at (warp|block)_barrier, to which thread \\d+ "
      "of block 0 never came: it waits at (warp|block)_barrier$",
      [] {
        if (thread_index() == 40)
          warp_barrier();
        else
          block_barrier();
      });
}

CASE(lanes_at_different_operations) {
  check_failing_threads({1, 32, 1},
                        "^thread 16 of block 0 comes to shuffle while thread 0 of block 0, of the "
                        "same warp, waits at any$",
                        [] {
                          if (lane_index() < 16)
                            any(true);
                          else
                            shuffle(1, 0);
                        });
  check_failing_threads({1, 32, 1}, "comes to all while", [] {
    if (lane_index() < 16)
      any(true);
    else
      all(true);
  });
}

CASE(warp_that_is_not_whole) {
  check_failing_threads({1, 48, 1},
                        "^thread 32 of block 0 comes to warp_barrier in a warp of only 16",
                        [] { warp_barrier(); });
}

CASE(lane_outside_the_warp) {
  check_failing_threads({1, 32, 1}, "reads from lane 32 in shuffle", [] { shuffle(1, 32); });
  check_failing_threads({1, 32, 1}, "reads from lane 63 in shuffle_xor",
                        [] { shuffle_xor(1, lane_index() ^ 63); });
}

// ---- vectors and copies ----

CASE(misaligned_vectors) {
  Buffer<float> in(8);
  Buffer<bfloat16> narrow_in(16);
  check_failing_threads({1, 32, 1},
                        "loads a vector from an address that is 4 bytes past a multiple",
                        [&] { load_vector(in.data + 1); });
  check_failing_threads({1, 32, 1}, "stores a vector to an address that is 2 bytes past a multiple",
                        [&] { store_vector(narrow_in.data + 1, {}); });
}

CASE(misaligned_copies) {
  Buffer<float> in(8);
  check_failing_threads({1, 1, 1}, "copies from an address that is 8 bytes past", [&] {
    FASTGPT_SHARED(float, s, 8);
    copy_async(s, 4, in.data + 2);
  });
  check_failing_threads({1, 1, 1}, "copies to an address that is 12 bytes past", [&] {
    FASTGPT_SHARED(float, s, 8);
    copy_async(s, 3, in.data);
  });
}

CASE(misaligned_matrix_row) {
  check_failing_threads({1, 32, 1}, "loads a matrix's row from an address that is 2 bytes past",
                        [] {
                          FASTGPT_SHARED(bfloat16, s, 512);
                          uint32_t registers[4];
                          load_matrices_transposed(s, lane_index() * 9, registers);
                        });
}

CASE(wait_covers_only_older_groups) {
  Buffer<float> in(8);
  for (int i = 0; i < 8; ++i) in[i] = float(i);
  const auto body = [&](int reads, bool commit) {
    return [&in, reads, commit] {
      FASTGPT_SHARED(float, s, 8);
      copy_async(s, 0, in.data);
      copy_async_commit();
      copy_async(s, 4, in.data + 4);
      if (commit) copy_async_commit();
      copy_async_wait<1>();
      if (!commit) copy_async_wait<0>();
      require(s.load(reads) == float(reads), "the element that was copied");
    };
  };
  run_threads({1, 1, 1}, body(3, true));
  run_threads({1, 1, 1}, body(3, false));
  const std::string text = "reads element 4 of s, to which a copy of thread 0 is under way";
  check_failing_threads({1, 1, 1}, text, body(4, true));
  check_failing_threads({1, 1, 1}, text, body(4, false));
}

CASE(copy_is_not_seen_by_others_without_a_barrier) {
  Buffer<float> in(4);
  check_failing_threads({1, 32, 1}, "reads element 0 of s, which thread 0 wrote", [&] {
    FASTGPT_SHARED(float, s, 4);
    if (thread_index() == 0) copy_async(s, 0, in.data);
    copy_async_commit();
    copy_async_wait<0>();
    s.load(0);
  });
}

CASE(copy_under_way_is_not_written_over) {
  Buffer<float> in(4);
  check_failing_threads({1, 1, 1},
                        "writes element 2 of s, to which a copy of thread 0 is under way", [&] {
                          FASTGPT_SHARED(float, s, 4);
                          copy_async(s, 0, in.data);
                          s.store(2, 1);
                        });
}

CASE(copy_of_memory_that_changes) {
  Buffer<float> in(4);
  check_failing_threads({1, 1, 1}, "copies from memory that was written while", [&] {
    FASTGPT_SHARED(float, s, 4);
    copy_async(s, 0, in.data);
    copy_async_commit();
    store(in.data + 3, 1.0f);
    copy_async_wait<0>();
  });
}

// ---- launches ----

CASE(condition_that_fails) {
  Buffer<int> in(256);
  in[77] = 5;
  check_failure("^thread 77 of block 0 requires: a number below the limit$",
                [&] { run(require_below, {1, 256, 1}, in.data, 5); });
}

CASE(exception_of_another_kind_comes_out) {
  try {
    run_threads({1, 32, 1}, [] { throw std::out_of_range("mine"); });
  } catch (const std::out_of_range& error) {
    return check(error.what() == std::string("mine"), error.what());
  }
  check(false, "no exception");
}

CASE(impossible_grids) {
  for (const Grid& grid : {Grid{-1, 32, 1}, Grid{1, 0, 1}, Grid{1, 1025, 1}, Grid{3, 32, 2},
                           Grid{16, 32, 16}, Grid{1, 32, 0}})
    check_failing_threads(grid, "a grid cannot have", [] {});
}

CASE(kernel_does_not_launch) {
  check_failing_threads({1, 1, 1}, "a kernel cannot launch another one",
                        [] { run_threads({1, 1, 1}, [] {}); });
}

CASE(stack_that_is_too_small) {
  check_failing_threads({1, 32, 1}, "thread 0 of block 0 needs a larger stack", [] {
    // Only its end is written, where a deeper stack would lie.
    volatile char* const end = twin::current->stack;
    end[0] = 'x';
  });
}

CASE(threads_of_the_host_launch_at_once) {
  std::vector<std::string> failures(4);
  std::vector<std::thread> workers;
  for (int worker = 0; worker < 4; ++worker) {
    workers.emplace_back([worker, &failures] {
      try {
        for (int i = 0; i < 5; ++i) {
          check_clusters<float>(worker % 2 ? 2 : 8);
          check_failure("nobody wrote", [] { check_blocks<float, Missing::kFirstBarrier>(); });
          check_multiply<bfloat16, true>();
        }
      } catch (const std::exception& error) {
        failures[size_t(worker)] = error.what();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  for (const std::string& failure : failures) check(failure.empty(), failure);
}

}  // namespace
