// The host twin: the primitives on a CPU, for tests without a GPU. Included by primitives.cuh.
//
// A launch runs cluster after cluster. Each thread of a cluster is a fiber, a stack of its own that
// gives up the processor only where the thread must wait for others; warp operations, barriers and
// reads of another block's shared memory do what they do on a GPU, one thread after the other. The
// order is always the same, so a kernel that forgets a barrier might still compute the right
// result. The twin therefore remembers of every element of shared memory who wrote and read it and
// when, and a launch fails with a twin::Error if no barrier orders two accesses that a GPU may swap
// (the happens-before relation of data race detectors, here exact).
//
// Time is a count of the barriers completed in the cluster. An access at time t happens before what
// a thread does now if a barrier of both was completed after t: of the warp, for threads of one
// warp, of the block, for threads of one block, or of the cluster. Every barrier of a block is one
// of its warps too, and every thread goes through all the barriers of its warp, so that no chain of
// barriers orders what these three do not.
//
// Barriers of some threads (twin_asynchronous.h) do make chains. From its first one on, a block is
// `asynchronous`: each thread has a clock, up to which time it has seen the accesses of every other
// thread, and of the agents that copy and multiply beside the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define FASTGPT_TWIN_UCONTEXT
#endif
#ifdef FASTGPT_TWIN_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FASTGPT_TWIN_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTGPT_TWIN_ASAN
#endif
#endif
#ifdef FASTGPT_TWIN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastgpt::cuda::twin {

// Why a launch failed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- stacks, and the switch from one to another ----

#ifdef FASTGPT_TWIN_ASAN
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Context {
#ifdef FASTGPT_TWIN_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
#ifdef FASTGPT_TWIN_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
#endif
};

#if defined(FASTGPT_TWIN_UCONTEXT)

inline void swap_stacks(Context* from, Context* to) {
  swapcontext(&from->registers, &to->registers);
}

inline void prepare_stack(Context* context, char* stack, void (*entry)()) {
  getcontext(&context->registers);
  context->registers.uc_stack.ss_sp = stack;
  context->registers.uc_stack.ss_size = kStackBytes;
  context->registers.uc_link = nullptr;
  makecontext(&context->registers, entry, 0);
}

#else

// To the compiler the switch is an instruction that changes every register: it saves those that are
// in use. What it cannot be told of, the frame pointer, goes to the stack with the address to go on
// from, below what the compiler may keep under the stack pointer.
#if defined(__clang__)
__attribute__((noinline))
#else
__attribute__((noipa))
#endif
inline void swap_stacks(Context* from, Context* to) {
#if defined(__x86_64__)
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rdx\n\t"
      "pushq %%rdx\n\t"
      "movq %%rsp, (%%rax)\n\t"
      "movq (%%rcx), %%rsp\n\t"
      "popq %%rdx\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp\n\t"
      "jmpq *%%rdx\n"
      "1:"
      : "+a"(from), "+c"(to)
      :
      : "rdx", "rbx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc",
        "memory");
#else
  register Context* x0 asm("x0") = from;
  register Context* x1 asm("x1") = to;
  asm volatile(
      "sub sp, sp, #144\n\t"
      "adr x17, 1f\n\t"
      "stp x29, x17, [sp]\n\t"
      "mov x16, sp\n\t"
      "str x16, [x0]\n\t"
      "ldr x16, [x1]\n\t"
      "mov sp, x16\n\t"
      "ldp x29, x17, [sp]\n\t"
      "add sp, sp, #144\n\t"
      "br x17\n"
      "1: hint #36"  // a place that a branch may reach, to processors that check
      : "+r"(x0), "+r"(x1)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
        "x16", "x17", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30",
        "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13",
        "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26",
        "v27", "v28", "v29", "v30", "v31", "cc", "memory");
#endif
}

// The stack as swap_stacks would have left it just before `entry`.
inline void prepare_stack(Context* context, char* stack, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t(15);
#if defined(__x86_64__)
  // A function expects the address it returns to on a stack aligned before that was pushed. Zero
  // ends what a debugger or the search for a handler walks through.
  void** const start = reinterpret_cast<void**>(top - 16 - 8);
  *start = nullptr;
  void** const saved = start - 18;
  saved[0] = reinterpret_cast<void*>(entry);
  saved[1] = nullptr;
#else
  void** const saved = reinterpret_cast<void**>(top - 144);
  saved[0] = nullptr;
  saved[1] = reinterpret_cast<void*>(entry);
#endif
  context->stack_pointer = saved;
}

#endif

// A context that starts with `entry` on this stack.
inline void prepare(Context* context, char* stack, void (*entry)()) {
  prepare_stack(context, stack, entry);
#ifdef FASTGPT_TWIN_ASAN
  context->bottom = stack;
  context->bytes = kStackBytes;
#endif
}

// `leaves`: the stack that is left will never be returned to.
inline void switch_context(Context* from, Context* to, [[maybe_unused]] bool leaves = false) {
#ifdef FASTGPT_TWIN_ASAN
  __sanitizer_start_switch_fiber(leaves ? nullptr : &from->fake_stack, to->bottom, to->bytes);
#endif
  swap_stacks(from, to);
#ifdef FASTGPT_TWIN_ASAN
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// ---- the threads of a cluster ----

struct Fiber;
struct Block;

struct Fibers {
  Fiber* first = nullptr;
  Fiber* last = nullptr;

  inline void append(Fiber* fiber);
  inline void append(Fibers& others);
  inline Fiber* pop();
};

// What a thread waits at.
enum class Operation {
  kShuffleXor,
  kShuffle,
  kAny,
  kAll,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAdd,
  kElect,
  kProductFence,
  kProduct,
  kProductCommit,
  kProductWait,
  kWarpBarrier,
  kBlockBarrier,
  kClusterBarrier,
  // Where threads meet that no block, warp or cluster unites.
  kBarrier,
  kNamedBarrier,
  kTakeRegisters,
};

inline const char* name_of(Operation operation) {
  constexpr const char* names[] = {
      "shuffle_xor",
      "shuffle",
      "any",
      "all",
      "load_matrices",
      "load_matrices_transposed",
      "multiply_add",
      "elect_one",
      "warpgroup_fence",
      "warpgroup_multiply",
      "warpgroup_commit",
      "warpgroup_wait",
      "warp_barrier",
      "block_barrier",
      "cluster_barrier",
      "a barrier",
      "a named barrier",
      "take_registers",
  };
  return names[int(operation)];
}

// The threads that go on when all `members` of them have come.
struct Meeting {
  int members = 0;
  int arrived = 0;
  Fibers waiting;
};

struct Lane {
  uint32_t words[6];
};

// Up to which time the accesses of each thread, by its index, happen before something: those of the
// block's threads first, then of its agents. What is not there is 0.
using Clock = std::vector<uint32_t>;

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

inline void join(Clock& into, int thread, uint32_t time) {
  if (into.size() <= size_t(thread)) into.resize(size_t(thread) + 1, 0);
  into[size_t(thread)] = std::max(into[size_t(thread)], time);
}

struct Asynchronous;  // what twin_asynchronous.h knows of a block

struct Warp {
  Meeting meeting;
  Operation operation;
  uint32_t barrier_time = 0;
  // What the lanes exchange. Two, since a lane may come to the next exchange before another one has
  // read this one's; it cannot come to the one after.
  Lane lanes[2][32];
  int exchange = 0;
};

// A copy under way, of 16 bytes.
struct Element;
struct Copy {
  const void* from;
  unsigned char seen[16];  // the source as it was
  unsigned char* to;
  Element* elements;
  int count;
};

struct Fiber {
  Context context;
  char* stack = nullptr;  // of a fiber that waits
  Fiber* next = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  bool ended = false;
  bool waits = false;
  Operation operation;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is open
  Clock seen;
  std::vector<uint32_t> fences;         // when it fenced what it wrote for the asynchronous proxy
  std::string agent;                    // what this is, if it is no thread
  std::function<std::string()> awaits;  // what it waits for, at an operation that is no meeting
};

inline void Fibers::append(Fiber* fiber) {
  fiber->next = nullptr;
  (last ? last->next : first) = fiber;
  last = fiber;
}

inline void Fibers::append(Fibers& others) {
  if (!others.first) return;
  (last ? last->next : first) = others.first;
  last = others.last;
  others = {};
}

inline Fiber* Fibers::pop() {
  Fiber* const fiber = first;
  if (fiber) {
    first = fiber->next;
    if (!first) last = nullptr;
  }
  return fiber;
}

// Who wrote an element of shared memory, and who has read it since. A thread that reads is only
// remembered while nothing orders it before all threads of the block, and of these two suffice:
// another one of the same warp, or better one of another warp, with which no thread can write
// unnoticed.
struct Element {
  const Fiber* writer;  // null: nobody
  const Fiber* copier;  // whose asynchronous copy to it is under way
  const Fiber* reader;
  const Fiber* other_reader;
  const Fiber* remote_reader;  // of another block
  uint32_t written, read, remote_read;
};

constexpr uint32_t kNever = 0xffffffffu;

// A read, in a block that is asynchronous.
struct Read {
  const Fiber* reader;
  uint32_t time;
};

struct Array {
  const char* key;  // the address of its name
  int count;
  size_t size;           // of an element
  bool declared = true;  // by the block that now runs
  int64_t offset = -1;   // in the memory that the launch gives to the block; or -1
  std::unique_ptr<Vector<unsigned char>[]> storage;
  mutable std::vector<Element> elements;
  mutable std::unordered_map<int, std::vector<Read>> reads;  // of an element since it was written

  unsigned char* bytes() const { return storage[0].data; }
  // Where it begins, of the dynamic shared memory.
  int offset_bytes() const { return offset < 0 ? 0 : int(offset); }
  Element& element(int i) const { return elements[size_t(i)]; }

  void clear() {
    memset(bytes(), 0xff, size_t(count) * size);
    elements.assign(size_t(count),
                    Element{nullptr, nullptr, nullptr, nullptr, nullptr, kNever, 0, 0});
    reads.clear();
  }
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  int64_t index = 0;
  int rank = 0;
  int running = 0;  // threads that have not ended
  uint32_t barrier_time = 0;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Array>> arrays;
  // The last read of this block's shared memory by another one.
  const Fiber* remote_reader = nullptr;
  uint32_t remote_read = 0;
  std::shared_ptr<Asynchronous> asynchronous;  // null until it is
};

struct Cluster {
  int64_t grid_blocks = 0;
  int threads = 0;            // of a block
  int64_t dynamic_bytes = 0;  // of shared memory, that the launch gives to each block
  uint32_t now = 1;
  uint32_t barrier_time = 0;
  Meeting meeting;
  std::vector<Block> blocks;
  Fibers ready;
  Context caller;
  std::exception_ptr failure;
  void (*kernel)(void*) = nullptr;
  void* argument = nullptr;
};

// The thread that runs.
inline thread_local Fiber* current = nullptr;

inline std::string describe(const Fiber* fiber) {
  if (!fiber->agent.empty()) return fiber->agent;
  return "thread " + std::to_string(fiber->thread) + " of block " +
         std::to_string(fiber->block->index);
}

[[noreturn]] inline void fail(const std::string& what) {
  throw Error(describe(current) + " " + what);
}

// ---- scheduling ----

// Kept from launch to launch.
struct Stacks {
  std::vector<std::unique_ptr<char[]>> all;
  std::vector<char*> free;

  char* take() {
    if (free.empty()) {
      all.emplace_back(new char[kStackBytes]);
      free.push_back(all.back().get());
    }
    char* const stack = free.back();
    free.pop_back();
#ifdef FASTGPT_TWIN_ASAN
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
    // Found changed at the end, the stack was too small.
    memcpy(stack, kCanary, sizeof(kCanary));
    return stack;
  }

  static bool intact(const char* stack) { return memcmp(stack, kCanary, sizeof(kCanary)) == 0; }

  static constexpr char kCanary[16] = "end of a stack.";
};

inline thread_local Stacks stacks;

// Null where the threads that must come are not those of a cluster, a block or a warp.
inline Meeting* meeting_of(const Fiber& fiber) {
  if (fiber.operation >= Operation::kBarrier) return nullptr;
  if (fiber.operation == Operation::kClusterBarrier) return &fiber.block->cluster->meeting;
  if (fiber.operation == Operation::kBlockBarrier) return &fiber.block->meeting;
  return &fiber.warp->meeting;
}

// Why nothing can go on: of the threads that wait, one for another that has ended, else one for
// another that waits elsewhere.
inline std::string describe_deadlock(const Cluster& cluster) {
  std::string text, awaited;
  for (const Block& block : cluster.blocks) {
    for (const Fiber& fiber : block.fibers) {
      if (!fiber.waits) continue;
      const Meeting* const meeting = meeting_of(fiber);
      if (!meeting) {
        // Of those that wait for the same, the first one.
        const std::string what = " waits " + fiber.awaits();
        if (awaited.find(what) == std::string::npos)
          awaited += (awaited.empty() ? "" : ", ") + describe(&fiber) + what;
        continue;
      }
      const std::string waits =
          describe(&fiber) + " waits at " + name_of(fiber.operation) + ", to which ";
      for (const Block& other_block : cluster.blocks) {
        for (const Fiber& other : other_block.fibers) {
          const bool member =
              fiber.operation == Operation::kClusterBarrier ||
              (fiber.operation == Operation::kBlockBarrier ? other.block == fiber.block
                                                           : other.warp == fiber.warp);
          if (!member || (other.waits && meeting_of(other) == meeting)) continue;
          if (other.ended) return waits + describe(&other) + " never came: it has ended";
          if (text.empty())
            text =
                waits + describe(&other) + " never came: it waits at " + name_of(other.operation);
        }
      }
      if (fiber.operation != Operation::kClusterBarrier &&
          fiber.operation != Operation::kBlockBarrier && meeting->members < kWarp)
        return describe(&fiber) + " waits at " + name_of(fiber.operation) + " in a warp of only " +
               std::to_string(meeting->members) + " threads";
    }
  }
  // A thread that never comes to a meeting waits for what never happens: that is what is wrong.
  return awaited.empty() ? text : awaited;
}

inline void check_end(Fiber* fiber);  // of a thread, and of its asynchronous block

inline void end_thread(Fiber* fiber) {
  fiber->ended = true;
  Block& block = *fiber->block;
  if (block.asynchronous) check_end(fiber);
  if (--block.running == 0 && block.remote_reader &&
      block.remote_read >= block.cluster->barrier_time)
    throw Error("block " + std::to_string(block.index) + " ended, but " +
                describe(block.remote_reader) +
                " reads its shared memory, and no cluster_barrier lies between");
}

// What runs on every stack: threads that have not started yet, until one is to go on that waited on
// a stack of its own.
inline void run_threads() {
  char* const stack = current->stack;
  Cluster& cluster = *current->block->cluster;
#ifdef FASTGPT_TWIN_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!cluster.caller.bytes) {
    // The first stack is the one that was switched to from the caller's.
    cluster.caller.bottom = bottom;
    cluster.caller.bytes = bytes;
  }
#endif
  Context nowhere;
  for (;;) {
    try {
      cluster.kernel(cluster.argument);
      end_thread(current);
      if (!Stacks::intact(stack)) throw Error(describe(current) + " needs a larger stack");
    } catch (...) {
      cluster.failure = std::current_exception();
    }
    Fiber* next = nullptr;
    if (!cluster.failure) next = cluster.ready.pop();
    if (!next) {
      stacks.free.push_back(stack);
      switch_context(&nowhere, &cluster.caller, true);
    }
    current = next;
    if (next->stack) {
      stacks.free.push_back(stack);
      switch_context(&nowhere, &next->context, true);
    }
    next->stack = stack;
  }
}

// Let the others go on until one of them has this thread go on.
inline void wait(Operation operation) {
  Fiber* const fiber = current;
  Cluster& cluster = *fiber->block->cluster;
  fiber->operation = operation;
  fiber->waits = true;
  Fiber* const next = cluster.ready.pop();
  if (!next) {
    const std::string why = describe_deadlock(cluster);
    fiber->waits = false;
    throw Error(why);
  }
  current = next;
  if (!next->stack) {
    next->stack = stacks.take();
    prepare(&next->context, next->stack, run_threads);
  }
  switch_context(&fiber->context, &next->context);
  fiber->waits = false;
}

// Whether this is the last one to come, before whom the others wait. `complete` is done when all
// have come, before any goes on.
template <class Complete>
inline void meet(Meeting& meeting, Operation operation, const Complete& complete) {
  Fiber* const fiber = current;
  if (meeting.arrived + 1 < meeting.members) {
    ++meeting.arrived;
    meeting.waiting.append(fiber);
    wait(operation);
    return;
  }
  meeting.arrived = 0;
  complete();
  fiber->block->cluster->ready.append(meeting.waiting);
}

// What the threads have seen, all of them see.
template <class Each>
inline void join_clocks(const Each& each_fiber) {
  Clock all;
  each_fiber([&](Fiber& fiber) { join(all, fiber.seen); });
  each_fiber([&](Fiber& fiber) { fiber.seen = all; });
}

inline Fiber* first_of(const Warp& warp, Block& block) {
  return &block.fibers[size_t(&warp - block.warps.data()) * kWarp];
}

// `complete` is done when all lanes have come, before any goes on.
template <class Complete>
inline void meet_warp(Operation operation, bool orders_memory, const Complete& complete) {
  Fiber* const fiber = current;
  Warp& warp = *fiber->warp;
  if (warp.meeting.members < kWarp)
    fail(std::string("comes to ") + name_of(operation) + " in a warp of only " +
         std::to_string(warp.meeting.members) + " threads");
  if (warp.meeting.arrived && warp.operation != operation)
    fail(std::string("comes to ") + name_of(operation) + " while " +
         describe(warp.meeting.waiting.first) + ", of the same warp, waits at " +
         name_of(warp.operation));
  warp.operation = operation;
  meet(warp.meeting, operation, [&] {
    warp.exchange ^= 1;
    complete();
    if (!orders_memory) return;
    Block& block = *fiber->block;
    warp.barrier_time = ++block.cluster->now;
    if (!block.asynchronous) return;
    Fiber* const lanes = first_of(warp, block);
    join_clocks([&](const auto& each) {
      for (int i = 0; i < warp.meeting.members; ++i) each(lanes[i]);
    });
  });
}

inline void meet_warp(Operation operation, bool orders_memory) {
  meet_warp(operation, orders_memory, [] {});
}

// After a barrier of the whole block.
inline void pass_block_barrier(Block& block) {
  block.barrier_time = block.cluster->now;
  if (!block.asynchronous) return;
  join_clocks([&](const auto& each) {
    for (Fiber& fiber : block.fibers) each(fiber);
  });
}

// What all lanes of the warp give, each one by its `lane`.
inline const Lane* exchange(Operation operation, const Lane& lane) {
  Warp& warp = *current->warp;
  Lane* const lanes = warp.lanes[warp.exchange];
  lanes[current->thread % kWarp] = lane;
  meet_warp(operation, false);
  return lanes;
}

constexpr int64_t kMostDynamicBytes = 227 << 10;

// The grid's blocks in clusters, one cluster after the other. `kernel` is what each thread runs.
template <class Kernel>
void run(int64_t blocks, int threads, int cluster_blocks, int64_t dynamic_bytes, Kernel&& kernel) {
  if (current) throw Error("a kernel cannot launch another one");
  if (blocks < 0 || threads < 1 || threads > 1024 || cluster_blocks < 1 || cluster_blocks > 8 ||
      blocks % cluster_blocks)
    throw Error("a grid cannot have " + std::to_string(blocks) + " blocks of " +
                std::to_string(threads) + " threads in clusters of " +
                std::to_string(cluster_blocks));
  Cluster cluster;
  cluster.grid_blocks = blocks;
  cluster.threads = threads;
  if (dynamic_bytes < 0 || dynamic_bytes > kMostDynamicBytes)
    throw Error("a block cannot have " + std::to_string(dynamic_bytes) +
                " bytes of dynamic memory");
  cluster.dynamic_bytes = dynamic_bytes;
  cluster.argument = const_cast<void*>(static_cast<const void*>(&kernel));
  cluster.kernel = [](void* argument) {
    (*static_cast<std::remove_reference_t<Kernel>*>(argument))();
  };
  cluster.blocks = std::vector<Block>(size_t(cluster_blocks));
  for (int64_t first = 0; first < blocks; first += cluster_blocks) {
    cluster.now = 1;
    cluster.barrier_time = 0;
    cluster.meeting.members = cluster_blocks * threads;
    for (int rank = 0; rank < cluster_blocks; ++rank) {
      Block& block = cluster.blocks[size_t(rank)];
      block.cluster = &cluster;
      block.index = first + rank;
      block.rank = rank;
      block.running = threads;
      block.barrier_time = 0;
      block.remote_reader = nullptr;
      block.asynchronous.reset();
      block.meeting.members = threads;
      block.warps.resize(size_t(threads + kWarp - 1) / kWarp);
      for (size_t w = 0; w < block.warps.size(); ++w) {
        block.warps[w].barrier_time = 0;
        block.warps[w].meeting.members = std::min(kWarp, threads - int(w) * kWarp);
      }
      for (auto& array : block.arrays) array->declared = false;
      block.fibers.resize(size_t(threads));
      for (int t = 0; t < threads; ++t) {
        Fiber& fiber = block.fibers[size_t(t)];
        fiber.stack = nullptr;
        fiber.block = &block;
        fiber.warp = &block.warps[size_t(t) / kWarp];
        fiber.thread = t;
        fiber.ended = false;
        fiber.groups.assign(1, {});
        fiber.seen.clear();
        fiber.fences.clear();
        cluster.ready.append(&fiber);
      }
    }
    current = cluster.ready.pop();
    current->stack = stacks.take();
    prepare(&current->context, current->stack, run_threads);
    switch_context(&cluster.caller, &current->context);
    current = nullptr;
    if (!cluster.failure) {
      for (const Block& block : cluster.blocks)
        if (block.running)
          cluster.failure = std::make_exception_ptr(Error(describe_deadlock(cluster)));
    }
    if (cluster.failure) {
      // The stacks of the threads that wait are given up with what is on them.
      for (Block& block : cluster.blocks)
        for (Fiber& fiber : block.fibers)
          if (fiber.waits && fiber.stack) stacks.free.push_back(fiber.stack);
      std::rethrow_exception(cluster.failure);
    }
  }
}

// ---- accesses to shared memory ----

inline std::string name_element(const Array& array, int i) {
  return "element " + std::to_string(i) + " of " + array.key;
}

inline std::string name_thread(const Fiber* fiber) {
  if (!fiber->agent.empty()) return fiber->agent;
  return fiber->block == current->block ? "thread " + std::to_string(fiber->thread)
                                        : describe(fiber);
}

inline std::string name_copy(const Fiber* copier) {
  return copier->agent.empty() ? "a copy of " + name_thread(copier) : copier->agent;
}

[[noreturn]] inline void fail_unordered(const char* access, const Array& array, int i,
                                        const Fiber* other, const char* other_access) {
  fail(access + (" " + name_element(array, i)) + ", which " + name_thread(other) + " " +
       other_access + ", and no barrier lies between");
}

inline void fail_outside(const Array& array, int i) {
  fail("uses element " + std::to_string(i) + " of " + array.key + ", which has " +
       std::to_string(array.count));
}

// Where nothing is written, or by a copy that may not have arrived.
[[noreturn]] inline void fail_unwritten(const Array& array, int i, const Element& element) {
  fail("reads " + name_element(array, i) +
       (element.copier ? ", to which " + name_copy(element.copier) + " is under way"
                       : ", which nobody wrote"));
}

// The time before which the accesses of `other`, of the same block, are ordered before what the
// current thread does now.
inline uint32_t seen_until(const Fiber* other) {
  const Fiber* const fiber = current;
  if (other == fiber) return kNever;
  uint32_t time = 0;
  if (other->agent.empty()) {
    time = fiber->block->barrier_time;
    if (other->warp == fiber->warp) time = std::max(time, fiber->warp->barrier_time);
  }
  if (size_t(other->thread) < fiber->seen.size())
    time = std::max(time, fiber->seen[size_t(other->thread)]);
  return time;
}

inline bool ordered(const Fiber* other, uint32_t time) { return time < seen_until(other); }

// Of the reads of an element, those that no later one follows.
inline void note_read(const Array& array, int i) {
  std::vector<Read>& reads = array.reads[i];
  reads.erase(std::remove_if(reads.begin(), reads.end(),
                             [](const Read& r) { return ordered(r.reader, r.time); }),
              reads.end());
  reads.push_back({current, current->block->cluster->now});
}

// Asynchronous reads, of all that is in [first, last).
inline void check_asynchronous_reads(const Array& array, int first, int last);

inline void check_read(const Array& array, int i) {
  Element& element = array.element(i);
  const Fiber* const fiber = current;
  if (element.writer != fiber && element.written >= fiber->block->barrier_time) {
    if (!element.writer) fail_unwritten(array, i, element);
    if (!ordered(element.writer, element.written))
      fail_unordered("reads", array, i, element.writer, "wrote");
  }
  if (fiber->block->asynchronous) {
    note_read(array, i);
    return;
  }
  if (!element.reader || element.read < fiber->block->barrier_time) {
    element.reader = fiber;
    element.other_reader = nullptr;
  } else if (element.other_reader && element.other_reader->warp != element.reader->warp) {
    // Readers in two warps: more cannot change what conflicts.
  } else if (element.reader->warp != fiber->warp) {
    element.other_reader = fiber;
  } else if (element.read < fiber->warp->barrier_time) {
    element.reader = fiber;
    element.other_reader = nullptr;
  } else if (element.reader != fiber) {
    element.other_reader = fiber;
  }
  element.read = fiber->block->cluster->now;
}

inline void check_write(const Array& array, int i) {
  Element& element = array.element(i);
  const Fiber* const fiber = current;
  if (element.copier)
    fail("writes " + name_element(array, i) + ", to which " + name_copy(element.copier) +
         " is under way");
  if (element.writer && !ordered(element.writer, element.written))
    fail_unordered("writes", array, i, element.writer, "wrote");
  if (element.reader && element.read >= fiber->block->barrier_time) {
    // Of two warps, the one that is not this thread's is sure not to be ordered by a warp's
    // barrier.
    const Fiber* readers[] = {element.reader, element.other_reader};
    if (readers[1] && readers[0]->warp == fiber->warp) std::swap(readers[0], readers[1]);
    for (const Fiber* reader : readers)
      if (reader && !ordered(reader, element.read))
        fail_unordered("writes", array, i, reader, "read");
  }
  if (element.remote_reader && element.remote_read >= fiber->block->cluster->barrier_time)
    fail_unordered("writes", array, i, element.remote_reader, "read");
  if (fiber->block->asynchronous) {
    const auto found = array.reads.find(i);
    if (found != array.reads.end()) {
      for (const Read& read : found->second)
        if (!ordered(read.reader, read.time))
          fail_unordered("writes", array, i, read.reader, "read");
      array.reads.erase(found);
    }
  }
  element.reader = element.other_reader = element.remote_reader = nullptr;
}

inline void note_write(Element& element) {
  element.writer = current;
  element.written = current->block->cluster->now;
}

inline void check_remote_read(const Array& array, int i, Block& owner) {
  Element& element = array.element(i);
  const Cluster& cluster = *owner.cluster;
  if (!element.writer) fail_unwritten(array, i, element);
  if (element.written >= cluster.barrier_time)
    fail_unordered("reads", array, i, element.writer, "wrote");
  element.remote_reader = owner.remote_reader = current;
  element.remote_read = owner.remote_read = cluster.now;
}

inline Array* find_array(Block& block, const char* key) {
  for (auto& array : block.arrays)
    if (array->key == key) return array.get();
  return nullptr;
}

inline void check_aligned(const void* p, const char* what) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address % 16)
    fail(std::string(what) + " an address that is " + std::to_string(address % 16) +
         " bytes past a multiple of 16");
}

}  // namespace fastgpt::cuda::twin

namespace fastgpt::cuda {

// ---- places ----

inline int thread_index() { return twin::current->thread; }
inline int block_threads() { return twin::current->block->cluster->threads; }
inline int64_t block_index() { return twin::current->block->index; }
inline int64_t grid_blocks() { return twin::current->block->cluster->grid_blocks; }
inline int lane_index() { return twin::current->thread % kWarp; }
inline int warp_index() { return twin::current->thread / kWarp; }
inline int cluster_rank() { return twin::current->block->rank; }
inline int cluster_blocks() { return int(twin::current->block->cluster->blocks.size()); }

inline void require(bool condition, const char* what) {
  if (!condition) twin::fail(std::string("requires: ") + what);
}

// ---- numbers ----

// A GPU has one NaN of each 2-byte type.
constexpr uint16_t kNan = 0x7fff;

inline float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const int exponent = x.bits >> 10 & 31;
  const uint32_t fraction = x.bits & 0x3ff;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent) return bit_cast<float>(sign | uint32_t(exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static float from(float x) { return x; }
  static float from(double x) { return float(x); }
};
template <>
struct Narrow<double> {
  static double from(double x) { return x; }
};
template <>
struct Narrow<bfloat16> {
  static bfloat16 from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {kNan};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
  static bfloat16 from(double x) { return from(round_to_odd(x)); }
};
template <>
struct Narrow<float16> {
  static float16 from(float x) {
    if (x != x) return {kNan};
    const uint16_t sign = uint16_t(bit_cast<uint32_t>(x) >> 16 & 0x8000);
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
    // In units of the result's last place, the default rounding of the sum does what is wanted.
    if (magnitude < 0x1p-14f)
      return {uint16_t(sign | uint16_t(std::nearbyint(magnitude * 0x1p24f)))};
    const uint32_t bits = bit_cast<uint32_t>(magnitude) - (112u << 23);
    return {uint16_t(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
  }
  static float16 from(double x) { return from(round_to_odd(x)); }
};

template <class T>
inline T narrow(float x) {
  return Narrow<T>::from(x);
}
template <class T>
inline T narrow(double x) {
  return Narrow<T>::from(x);
}

template <class T, class A>
inline Vector<T> narrow_vector(const A (&x)[Vector<T>::width]) {
  Vector<T> y;
  for (int i = 0; i < Vector<T>::width; ++i) y.data[i] = narrow<T>(x[i]);
  return y;
}

template <class T>
inline uint32_t narrow_pair(float first, float second) {
  return narrow<T>(first).bits | uint32_t(narrow<T>(second).bits) << 16;
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

// ---- global memory ----

template <class T>
inline Vector<T> load_vector(const T* from) {
  twin::check_aligned(from, "loads a vector from");
  Vector<T> x;
  memcpy(&x, from, sizeof(x));
  return x;
}

template <class T>
inline void store_vector(T* to, const Vector<T>& x) {
  twin::check_aligned(to, "stores a vector to");
  memcpy(static_cast<void*>(to), &x, sizeof(x));
}

template <class T>
inline T load(const T* from) {
  return *from;
}

template <class T>
inline void store(T* to, T x) {
  *to = x;
}

// ---- shared memory ----

template <class T>
struct Shared {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8,
                "one load moves 1, 2, 4 or 8 bytes");
  twin::Array* array;

  T load(int i) const {
    check_inside(*array, i);
    twin::check_read(*array, i);
    return get(*array, i);
  }

  void store(int i, T x) const {
    check_inside(*array, i);
    twin::check_write(*array, i);
    twin::check_asynchronous_reads(*array, i, i + 1);
    twin::note_write(array->element(i));
    memcpy(array->bytes() + size_t(i) * sizeof(T), &x, sizeof(T));
  }

  T load_from(int rank, int i) const {
    check_inside(*array, i);
    twin::Cluster& cluster = *twin::current->block->cluster;
    if (rank < 0 || size_t(rank) >= cluster.blocks.size())
      twin::fail("reads shared memory of block " + std::to_string(rank) + " of a cluster of " +
                 std::to_string(cluster.blocks.size()));
    twin::Block& owner = cluster.blocks[size_t(rank)];
    if (&owner == twin::current->block) return load(i);
    if (!owner.running)
      twin::fail("reads " + twin::name_element(*array, i) + " of block " +
                 std::to_string(owner.index) + ", which has ended");
    const twin::Array* const theirs = twin::find_array(owner, array->key);
    if (!theirs || !theirs->declared)
      twin::fail("reads " + twin::name_element(*array, i) + " of block " +
                 std::to_string(owner.index) + ", which nobody wrote");
    twin::check_remote_read(*theirs, i, owner);
    return get(*theirs, i);
  }

  static void check_inside(const twin::Array& array, int i) {
    if (i < 0 || i >= array.count) twin::fail_outside(array, i);
  }

  static T get(const twin::Array& array, int i) {
    T x;
    memcpy(&x, array.bytes() + size_t(i) * sizeof(T), sizeof(T));
    return x;
  }
};

namespace twin {

constexpr size_t kSharedBytes = 48 << 10;  // that a block can declare

// Of one that lies in the memory that the launch gives.
inline void check_place(const Block& block, const Array& array) {
  const int64_t end = array.offset + int64_t(array.count) * int64_t(array.size);
  const int64_t given = block.cluster->dynamic_bytes;
  if (array.offset % 16 || end > given)
    fail("places " + std::string(array.key) + " at the bytes " + std::to_string(array.offset) +
         " to " + std::to_string(end) + " of " + std::to_string(given));
  for (const auto& other : block.arrays) {
    if (!other->declared || other->offset < 0 || other.get() == &array) continue;
    const int64_t other_end = other->offset + int64_t(other->count) * int64_t(other->size);
    if (array.offset < other_end && other->offset < end)
      fail("places " + std::string(array.key) + " over " + other->key);
  }
}

inline void check_dynamic_bytes(int64_t bytes) {
  const int64_t given = current->block->cluster->dynamic_bytes;
  if (given != bytes)
    fail("states " + std::to_string(bytes) + " bytes of dynamic memory, but is launched with " +
         std::to_string(given));
}

// The array of this block with this key; `offset`: in the memory that the launch gives, or -1.
template <class T>
inline Shared<T> shared(const char* key, int count, int64_t offset = -1) {
  Block& block = *current->block;
  Array* array = find_array(block, key);
  if (!array) {
    const size_t vectors = (size_t(count) * sizeof(T) + 15) / 16;
    block.arrays.emplace_back(new Array{key, count, sizeof(T), false, offset, nullptr, {}, {}});
    array = block.arrays.back().get();
    array->storage.reset(new Vector<unsigned char>[vectors]);
  }
  if (!array->declared) {
    array->declared = true;
    array->clear();
    size_t bytes = 0;
    if (offset >= 0) check_place(block, *array);
    for (const auto& each : block.arrays)
      if (each->declared && each->offset < 0)
        bytes += (size_t(each->count) * each->size + 15) / 16 * 16;
    if (bytes > kSharedBytes)
      fail("declares " + std::to_string(bytes) + " bytes of shared memory, of " +
           std::to_string(kSharedBytes));
  }
  return {array};
}

}  // namespace twin

// ---- warps, blocks and clusters ----

namespace twin {

template <class T>
inline T exchange_value(Operation operation, T x, int from_lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 4 or 8 bytes");
  if (from_lane < 0 || from_lane >= kWarp)
    fail("reads from lane " + std::to_string(from_lane) + " in " + name_of(operation));
  Lane lane;
  memcpy(lane.words, &x, sizeof(T));
  T y;
  memcpy(&y, exchange(operation, lane)[from_lane].words, sizeof(T));
  return y;
}

// How many lanes say yes.
inline int count_votes(Operation operation, bool x) {
  Lane lane;
  lane.words[0] = x;
  const Lane* const lanes = exchange(operation, lane);
  int votes = 0;
  for (int i = 0; i < kWarp; ++i) votes += int(lanes[i].words[0]);
  return votes;
}

}  // namespace twin

template <class T>
inline T shuffle_xor(T x, int mask) {
  return twin::exchange_value(twin::Operation::kShuffleXor, x, lane_index() ^ mask);
}

template <class T>
inline T shuffle(T x, int from_lane) {
  return twin::exchange_value(twin::Operation::kShuffle, x, from_lane);
}

inline bool any(bool x) { return twin::count_votes(twin::Operation::kAny, x) > 0; }
inline bool all(bool x) { return twin::count_votes(twin::Operation::kAll, x) == kWarp; }

inline void warp_barrier() { twin::meet_warp(twin::Operation::kWarpBarrier, true); }

inline void block_barrier() {
  twin::Block& block = *twin::current->block;
  twin::meet(block.meeting, twin::Operation::kBlockBarrier, [&] {
    ++block.cluster->now;
    twin::pass_block_barrier(block);
  });
}

inline void cluster_barrier() {
  twin::Cluster& cluster = *twin::current->block->cluster;
  twin::meet(cluster.meeting, twin::Operation::kClusterBarrier, [&] {
    cluster.barrier_time = ++cluster.now;
    for (twin::Block& block : cluster.blocks) twin::pass_block_barrier(block);
  });
}

// ---- asynchronous copies ----

namespace twin {

template <class T>
inline void start_copy(const Shared<T>& to, int i, const void* from) {
  constexpr int count = Vector<T>::width;
  twin::Array& array = *to.array;
  Shared<T>::check_inside(array, i);
  Shared<T>::check_inside(array, i + count - 1);
  unsigned char* const bytes = array.bytes() + size_t(i) * sizeof(T);
  twin::check_aligned(from, "copies from");
  twin::check_aligned(bytes, "copies to");
  twin::check_asynchronous_reads(array, i, i + count);
  for (int j = i; j < i + count; ++j) {
    twin::check_write(array, j);
    twin::Element& element = array.element(j);
    element.copier = twin::current;
    element.writer = nullptr;
    element.written = twin::kNever;
  }
  twin::Copy copy = {from, {}, bytes, &array.element(i), count};
  memcpy(copy.seen, from, 16);
  twin::current->groups.back().push_back(copy);
}

}  // namespace twin

template <class T>
inline void copy_async(const Shared<T>& to, int i, const T* from) {
  twin::start_copy(to, i, from);
}

template <class T>
inline void copy_async_if(bool there, const Shared<T>& to, int i, const T* from) {
  alignas(16) static constexpr unsigned char zeros[16] = {};
  twin::check_aligned(from, "copies from");
  twin::start_copy(to, i, there ? static_cast<const void*>(from) : zeros);
}

inline void copy_async_commit() { twin::current->groups.emplace_back(); }

template <int pending>
inline void copy_async_wait() {
  auto& groups = twin::current->groups;
  // The last group is open: no wait covers it.
  while (groups.size() > size_t(pending) + 1) {
    for (const twin::Copy& copy : groups.front()) {
      if (memcmp(copy.seen, copy.from, 16) != 0)
        twin::fail("copies from memory that was written while the copy was under way");
      memcpy(copy.to, copy.from, 16);
      for (int j = 0; j < copy.count; ++j) {
        copy.elements[j].copier = nullptr;
        twin::note_write(copy.elements[j]);
      }
    }
    groups.erase(groups.begin());
  }
}

// ---- matrices ----

namespace twin {

// The row that lane `from` names, of which this lane takes the element `column`.
template <class T>
inline uint16_t matrix_element(const Shared<T>& shared, const Lane* lanes, int from, int column) {
  return bit_cast<uint16_t>(shared.load(int(lanes[from].words[0]) + column));
}

template <class T>
inline const Lane* exchange_rows(Operation operation, const Shared<T>& from, int i) {
  static_assert(sizeof(T) == 2, "a matrix has elements of 2 bytes");
  Shared<T>::check_inside(*from.array, i);
  Shared<T>::check_inside(*from.array, i + 7);
  check_aligned(from.array->bytes() + size_t(i) * 2, "loads a matrix's row from");
  Lane lane;
  lane.words[0] = uint32_t(i);
  return exchange(operation, lane);
}

// Element `k` of those that the lane packs two in a register.
template <class T>
inline float unpack(const uint32_t* registers, int k) {
  return widen(T{uint16_t(registers[k / 2] >> 16 * (k % 2))});
}

}  // namespace twin

template <class T>
inline void load_matrices(const Shared<T>& from, int i, uint32_t (&out)[4]) {
  const twin::Lane* const lanes = twin::exchange_rows(twin::Operation::kLoadMatrices, from, i);
  const int row = lane_index() / 4, column = lane_index() % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    const uint32_t first = twin::matrix_element(from, lanes, 8 * m + row, column);
    const uint32_t second = twin::matrix_element(from, lanes, 8 * m + row, column + 1);
    out[m] = first | second << 16;
  }
}

template <class T>
inline void load_matrices_transposed(const Shared<T>& from, int i, uint32_t (&out)[4]) {
  const twin::Lane* const lanes =
      twin::exchange_rows(twin::Operation::kLoadMatricesTransposed, from, i);
  const int row = lane_index() % 4 * 2, column = lane_index() / 4;
  for (int m = 0; m < 4; ++m) {
    const uint32_t first = twin::matrix_element(from, lanes, 8 * m + row, column);
    const uint32_t second = twin::matrix_element(from, lanes, 8 * m + row + 1, column);
    out[m] = first | second << 16;
  }
}

template <class T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  twin::Lane lane;
  memcpy(lane.words, a, sizeof(a));
  memcpy(lane.words + 4, b, sizeof(b));
  const twin::Lane* const lanes = twin::exchange(twin::Operation::kMultiplyAdd, lane);
  const int group = lane_index() / 4, quad = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    // d[i] lies in row group + 8 (i / 2) and column 2 quad + i % 2. In the rows of A and the
    // columns of B, elements 8 h + 2 c and the next one are lane c's, in its register for half h.
    const int column = 2 * quad + i % 2;
    for (int half = 0; half < 2; ++half) {
      for (int c = 0; c < 4; ++c) {
        const uint32_t* const row = &lanes[4 * group + c].words[2 * half + i / 2];
        const uint32_t* const col = &lanes[4 * column + c].words[4 + half];
        d[i] += twin::unpack<T>(row, 0) * twin::unpack<T>(col, 0);
        d[i] += twin::unpack<T>(row, 1) * twin::unpack<T>(col, 1);
      }
    }
  }
}

}  // namespace fastgpt::cuda

#include "twin_asynchronous.h"
