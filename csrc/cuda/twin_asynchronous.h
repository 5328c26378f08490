// The host twin's share of what a GPU of 9.0a does beside its threads: barriers on which copies
// count their bytes, copies of tensors, products of warpgroups. Included by twin.h.
//
// What is asynchronous is done as late as a GPU may do it: a copy lands when a thread waits for it,
// a product is formed when its warpgroup does. Until then its registers hold NaN, and whoever
// touches its shared memory is told. Each barrier's copies and each warp's products are an agent,
// with an index of its own in the clocks.
#pragma once

#include <map>

namespace fastgpt::cuda::twin {

// ---- what an asynchronous access covers ----

constexpr int kSlab = 64;                 // columns of a tile that lie together: 128 bytes
constexpr int kAtom = 1024;               // bytes after which the swizzle repeats
constexpr uint32_t kPoison = 0x7fffdead;  // a NaN: a register that a product will write

// The order of the 16 bytes in a row of 128, which differs in each row of eight. Its own inverse.
inline int swizzle(int byte) { return byte ^ (byte >> 7 & 7) << 4; }

struct Region {
  enum Kind { kWhole, kAlong, kAcross } kind;
  const Array* array;
  int first;  // element
  int lines;  // kWhole: elements; kAlong: rows of 16; kAcross: columns, 16 of each
  int slab;   // elements from one slab to the next

  int start() const { return array->offset_bytes() + 2 * first; }

  // The element of the array at this line and this place along the 16.
  int element(int line, int k) const {
    const int logical = kind == kAlong
                            ? start() + line * 2 * kSlab + 2 * k
                            : start() + line / kSlab * 2 * slab + k * 2 * kSlab + line % kSlab * 2;
    return (swizzle(logical) - array->offset_bytes()) / 2;
  }

  // Within [low, high) lies everything.
  int low() const { return kind == kAlong ? first / kSlab * kSlab : first; }
  int high() const {
    if (kind == kWhole) return first + lines;
    if (kind == kAlong) return low() + lines * kSlab;
    return first + (lines - 1) / kSlab * slab + 16 * kSlab;
  }

  bool covers(int i) const {
    if (i < low() || i >= high()) return false;
    if (kind == kWhole) return true;
    const int logical = swizzle(array->offset_bytes() + 2 * i);
    if (kind == kAlong) return (logical & 127) / 32 == (start() & 127) / 32;
    const int in_slab = (logical - start()) % (2 * slab);
    const int line = (logical - start()) / (2 * slab) * kSlab + in_slab / 2 % kSlab;
    return in_slab < 16 * 2 * kSlab && line < lines;
  }

  bool operator<(const Region& other) const {
    return std::tie(array, kind, first, lines, slab) <
           std::tie(other.array, other.kind, other.first, other.lines, other.slab);
  }
};

// ---- the state of a block ----

// A box of a tensor in global memory, and where it lies in the shared memory.
struct Box {
  TensorMap map;
  int coordinates[5];
  Region region;

  // Calls f(element of the array, address in global memory or null where the tensor has nothing).
  template <class F>
  void each(const F& f) const {
    int at[5] = {};
    for (int n = 0; n < region.lines; ++n) {
      const char* from = static_cast<const char*>(map.base);
      bool inside = true;
      for (int d = 0; d < map.rank; ++d) {
        const int64_t c = int64_t(coordinates[d]) + at[d];
        inside = inside && c >= 0 && c < map.sizes[d];
        from += c * map.strides[d] * 2;
      }
      const int base = region.array->offset_bytes();
      f((swizzle(base + 2 * (region.first + n)) - base) / 2, inside ? from : nullptr);
      for (int d = 0; d < map.rank && ++at[d] == map.box[d]; ++d) at[d] = 0;
    }
  }
};

struct Barrier {
  Fiber copies;      // the agent
  std::string name;  // "full[0]"
  int arrivals = 0;  // of a phase; 0: not initialised
  int pending = 0;
  int64_t bytes = 0;  // that the phase under way still expects
  uint32_t phase = 0;
  const Fiber* initialiser = nullptr;
  uint32_t initialised = 0;
  bool fenced = false;
  Clock arriving, completed;
  std::vector<Box> boxes;
  Fibers waiting;
};

struct NamedBarrier {
  int count = 0, arrived = 0;
  uint32_t generation = 1;
  Clock clock;
  Fibers waiting;
};

// Of a thread.
struct Accumulators {
  float* registers;
  std::vector<float> values;
  int pending = 0;  // products that write them
};
struct Fenced {
  const void* data;
  std::vector<uint32_t> words;
};
struct Registers {
  std::vector<Accumulators> accumulators;
  std::vector<Fenced> fenced;
  int limit = 0;  // set by take_registers and give_registers
  // What it brings to the product that is being issued.
  float* d = nullptr;
  const uint32_t* a = nullptr;
  std::vector<std::vector<Box>> stores{1};  // groups; the last one is open
  uint32_t generations[16] = {};            // of the named barriers it came to last
};

// Of a warp, the 16 rows that are its own.
struct Product {
  Region a, b;
  bool a_is_shared, accumulate;
  int columns;
  float (*widen)(uint16_t);
  struct {
    float* d;
    const uint32_t* a;
    uint32_t a_then[4];
  } lanes[kWarp];
};

struct WarpProducts {
  Fiber agent;
  std::vector<std::vector<Product>> groups{1};  // the last one is open
  size_t issued = 0;
};

struct Asynchronous {
  std::map<const char*, std::vector<Barrier>> barriers;
  NamedBarrier named[16];
  std::vector<Registers> threads;
  std::vector<WarpProducts> warps;
  std::vector<std::vector<std::string>> issued;  // by each warpgroup
  std::map<Region, std::vector<Read>> reads;     // that are over: of each agent the last one
  Fibers want_registers;
  int register_pool = 0;  // that the block was launched with
  int agents = 0;
};

inline Fiber make_agent(Block& block, const std::string& name) {
  Fiber agent;
  agent.block = &block;
  agent.thread = block.cluster->threads + block.asynchronous->agents++;
  agent.agent = name;
  return agent;
}

inline Asynchronous& asynchronous() {
  Block& block = *current->block;
  if (!block.asynchronous) {
    block.asynchronous = std::make_shared<Asynchronous>();
    Asynchronous& all = *block.asynchronous;
    all.threads.resize(block.fibers.size());
    const int given = std::min(256, 65536 / block.cluster->threads / 8 * 8);
    for (Registers& thread : all.threads) thread.limit = std::min(255, given);
    all.register_pool = given * block.cluster->threads;
    all.warps.resize(block.warps.size());
    for (size_t w = 0; w < all.warps.size(); ++w)
      all.warps[w].agent = make_agent(block, "a product of warp " + std::to_string(w));
    all.issued.resize((block.warps.size() + 3) / 4);
  }
  return *block.asynchronous;
}

inline Registers& registers_of(const Fiber* fiber) {
  return asynchronous().threads[size_t(fiber->thread)];
}
inline WarpProducts& products_of_warp() {
  return asynchronous().warps[size_t(current->thread) / kWarp];
}

// ---- order ----

// What the thread did and saw happens before what is done after `into` was acquired.
inline void release(Clock& into) {
  Fiber* const fiber = current;
  Block& block = *fiber->block;
  join(fiber->seen, fiber->thread, ++block.cluster->now);
  join(into, fiber->seen);
  const Fiber* const lanes = first_of(*fiber->warp, block);
  for (int i = 0; i < fiber->warp->meeting.members; ++i)
    join(into, lanes[i].thread, fiber->warp->barrier_time);
}

inline void fail_reader(const Array& array, int i, const std::string& who) {
  fail("writes " + name_element(array, i) + ", which " + who + " under way reads");
}

inline void check_asynchronous_reads(const Array& array, int first, int last) {
  if (!current->block->asynchronous) return;
  const Asynchronous& all = *current->block->asynchronous;
  // The first element of the range that the region covers, or -1.
  const auto met = [&](const Region& region) {
    if (region.array != &array) return -1;
    for (int i = std::max(first, region.low()); i < std::min(last, region.high()); ++i)
      if (region.covers(i)) return i;
    return -1;
  };
  for (const WarpProducts& warp : all.warps)
    for (const auto& group : warp.groups)
      for (const Product& product : group)
        for (const Region* region : {&product.b, &product.a})
          if (region->array && met(*region) >= 0)
            fail_reader(array, met(*region), warp.agent.agent);
  for (size_t thread = 0; thread < all.threads.size(); ++thread)
    for (const auto& group : all.threads[thread].stores)
      for (const Box& box : group)
        if (met(box.region) >= 0)
          fail_reader(array, met(box.region), "a copy of thread " + std::to_string(thread));
  for (const auto& entry : all.reads) {
    int i = -2;
    for (const Read& read : entry.second) {
      if (ordered(read.reader, read.time)) continue;
      if (i == -2) i = met(entry.first);
      if (i >= 0) fail_unordered("writes", array, i, read.reader, "read");
    }
  }
}

// A read that is over, by an agent or a thread.
inline void note_asynchronous_read(const Region& region, const Fiber* reader) {
  std::vector<Read>& reads = asynchronous().reads[region];
  for (Read& read : reads) {
    if (read.reader == reader) {
      read.time = current->block->cluster->now;
      return;
    }
  }
  reads.push_back({reader, current->block->cluster->now});
}

// What threads wrote must have been fenced by who wrote it, before the barrier.
inline void check_fenced(const Array& array, int i, const char* access) {
  const Element& element = array.element(i);
  const Fiber* const writer = element.writer;
  if (!writer || !writer->agent.empty()) return;
  const auto fence =
      std::upper_bound(writer->fences.begin(), writer->fences.end(), element.written);
  if (fence == writer->fences.end() || *fence >= seen_until(writer))
    fail(std::string(access) + " " + name_element(array, i) + ", which " + name_thread(writer) +
         " wrote, and no fence_asynchronous of its lies between");
}

inline void check_asynchronous_read(const Array& array, int i) {
  if (i < 0 || i >= array.count) fail_outside(array, i);
  const Element& element = array.element(i);
  if (!element.writer) fail_unwritten(array, i, element);
  if (!ordered(element.writer, element.written))
    fail_unordered("reads", array, i, element.writer, "wrote");
  check_fenced(array, i, "reads");
}

inline void check_tile(const Array& array, int first, int multiple, const char* what) {
  const int byte = array.offset_bytes() + 2 * first;
  if (array.offset < 0) fail(std::string(what) + " " + array.key + ", not in dynamic memory");
  if (byte % kAtom % multiple)
    fail(std::string(what) + " " + name_element(array, first) + ", at byte " +
         std::to_string(byte) + ", which is no multiple of " + std::to_string(multiple));
}

// ---- barriers ----

inline std::vector<Barrier>& barriers(const char* key, int count) {
  Block& block = *current->block;
  std::vector<Barrier>& found = asynchronous().barriers[key];
  if (found.empty()) {
    found.resize(size_t(count));
    for (int i = 0; i < count; ++i) {
      Barrier& barrier = found[size_t(i)];
      barrier.name = std::string(key) + "[" + std::to_string(i) + "]";
      barrier.copies = make_agent(block, "a copy of " + barrier.name);
    }
  }
  return found;
}

inline void check_initialised(const Barrier& barrier) {
  if (!barrier.arrivals) fail("uses " + barrier.name + ", which nobody initialised");
  if (!ordered(barrier.initialiser, barrier.initialised))
    fail("uses " + barrier.name + ", which " + name_thread(barrier.initialiser) +
         " initialised, and no barrier lies between");
}

// Copies land; a phase that lacks nothing ends.
inline void settle(Barrier& barrier) {
  Cluster& cluster = *current->block->cluster;
  for (const Box& box : barrier.boxes) {
    const Array& array = *box.region.array;
    box.each([&](int i, const char* from) {
      uint16_t bits = 0;
      if (from) memcpy(&bits, from, 2);
      memcpy(array.bytes() + 2 * i, &bits, 2);
      Element& element = array.element(i);
      element.copier = nullptr;
      element.writer = &barrier.copies;
      element.written = cluster.now;
    });
    barrier.bytes -= 2 * box.region.lines;
  }
  if (!barrier.boxes.empty()) join(barrier.arriving, barrier.copies.thread, ++cluster.now);
  barrier.boxes.clear();
  if (barrier.pending) return;
  if (barrier.bytes < 0)
    fail("finds that " + std::to_string(-barrier.bytes) + " bytes more than expected came to " +
         barrier.name);
  if (barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  join(barrier.completed, barrier.arriving);
  barrier.arriving.clear();
  cluster.ready.append(barrier.waiting);
}

inline void arrive(Barrier& barrier, int64_t bytes) {
  check_initialised(barrier);
  if (!barrier.pending)
    fail("arrives at " + barrier.name + ", where all " + std::to_string(barrier.arrivals) +
         " of the phase have arrived");
  barrier.bytes += bytes;
  release(barrier.arriving);
  --barrier.pending;
  if (!barrier.pending || barrier.waiting.first) settle(barrier);
}

}  // namespace fastgpt::cuda::twin

namespace fastgpt::cuda {

struct Barriers {
  std::vector<twin::Barrier>* all;

  twin::Barrier& at(int i) const {
    if (i < 0 || size_t(i) >= all->size())
      twin::fail("uses barrier " + std::to_string(i) + " of " + std::to_string(all->size()));
    return (*all)[size_t(i)];
  }

  void init(int i, int arrivals) const {
    twin::Barrier& barrier = at(i);
    if (barrier.arrivals) twin::fail("initialises " + barrier.name + " again");
    if (arrivals < 1) twin::fail("initialises " + barrier.name + " for nobody");
    barrier.arrivals = barrier.pending = arrivals;
    barrier.initialiser = twin::current;
    barrier.initialised = twin::current->block->cluster->now;
  }

  void arrive(int i) const { twin::arrive(at(i), 0); }
  void arrive_expecting(int i, int bytes) const { twin::arrive(at(i), bytes); }

  void wait(int i, int parity) const {
    twin::Barrier& barrier = at(i);
    twin::check_initialised(barrier);
    twin::Fiber* const fiber = twin::current;
    if (int(barrier.phase & 1) == parity) twin::settle(barrier);
    while (int(barrier.phase & 1) == parity) {
      fiber->awaits = [&barrier] {
        return "for " + barrier.name + ", whose phase " + std::to_string(barrier.phase) +
               " lacks " + std::to_string(barrier.pending) + " arrivals and " +
               std::to_string(barrier.bytes) + " bytes";
      };
      barrier.waiting.append(fiber);
      twin::wait(twin::Operation::kBarrier);
    }
    twin::join(fiber->seen, barrier.completed);
  }
};

inline void fence_barriers() {
  for (auto& entry : twin::asynchronous().barriers)
    for (twin::Barrier& barrier : entry.second)
      if (barrier.initialiser == twin::current) barrier.fenced = true;
}

inline void fence_asynchronous() {
  twin::asynchronous();
  twin::current->fences.push_back(++twin::current->block->cluster->now);
}

namespace twin {

inline NamedBarrier& come_to(int barrier, int threads) {
  if (barrier < 1 || barrier > 15)
    fail("comes to the named barrier " + std::to_string(barrier) + ", of 1 to 15");
  NamedBarrier& named = asynchronous().named[barrier];
  const std::string name = "the named barrier " + std::to_string(barrier);
  if (threads < kWarp || threads % kWarp || threads > current->block->cluster->threads)
    fail("comes to " + name + " for " + std::to_string(threads) + " threads");
  if (named.arrived && named.count != threads)
    fail("comes to " + name + " for " + std::to_string(threads) +
         " threads, to which others came " + "for " + std::to_string(named.count));
  uint32_t& last = registers_of(current).generations[barrier];
  if (last == named.generation) fail("comes twice to " + name + " while others have not come");
  last = named.generation;
  named.count = threads;
  ++named.arrived;
  release(named.clock);
  return named;
}

inline void complete(NamedBarrier& named) {
  for (Fiber* fiber = named.waiting.first; fiber; fiber = fiber->next)
    join(fiber->seen, named.clock);
  current->block->cluster->ready.append(named.waiting);
  named.clock.clear();
  named.arrived = 0;
  ++named.generation;
}

}  // namespace twin

inline void named_barrier_sync(int barrier, int threads) {
  twin::NamedBarrier& named = twin::come_to(barrier, threads);
  if (named.arrived == named.count) {
    twin::join(twin::current->seen, named.clock);
    twin::complete(named);
    return;
  }
  twin::current->awaits = [=] {
    return "at the named barrier " + std::to_string(barrier) + " of " + std::to_string(threads) +
           " threads, to which not all come";
  };
  named.waiting.append(twin::current);
  twin::wait(twin::Operation::kNamedBarrier);
}

inline void named_barrier_arrive(int barrier, int threads) {
  twin::NamedBarrier& named = twin::come_to(barrier, threads);
  if (named.arrived == named.count) twin::complete(named);
}

inline bool elect_one() {
  twin::meet_warp(twin::Operation::kElect, false);
  // Which one is not for the program to know.
  return lane_index() == (5 + 11 * warp_index()) % kWarp;
}

// ---- registers ----

namespace twin {

inline void check_registers(int count) {
  if (count < 24 || count > 256 || count % 8)
    fail("asks for " + std::to_string(count) + " registers, not 24 to 256 by eights");
}

}  // namespace twin

template <int count>
inline void give_registers() {
  twin::check_registers(count);
  int& limit = twin::registers_of(twin::current).limit;
  if (count > limit)
    twin::fail("gives registers to have " + std::to_string(count) + ", but has " +
               std::to_string(limit));
  limit = count;
  twin::current->block->cluster->ready.append(twin::asynchronous().want_registers);
}

template <int count>
inline void take_registers() {
  twin::check_registers(count);
  int& limit = twin::registers_of(twin::current).limit;
  if (count < limit)
    twin::fail("takes registers to have " + std::to_string(count) + ", but has " +
               std::to_string(limit));
  for (;;) {
    int64_t used = count - limit;
    for (const twin::Registers& thread : twin::asynchronous().threads) used += thread.limit;
    if (used <= twin::asynchronous().register_pool) break;
    twin::current->awaits = [] {
      return "for " + std::to_string(count) + " registers, which nobody gives";
    };
    twin::asynchronous().want_registers.append(twin::current);
    twin::wait(twin::Operation::kTakeRegisters);
  }
  limit = count;
}

// ---- copies of tensors ----

namespace twin {

template <class T, class... Coordinates>
inline Box box_of(const TensorMap& map, const Shared<T>& shared, int i, Coordinates... c) {
  static_assert(sizeof(T) == 2, "a tensor has elements of 2 bytes");
  const int coordinates[] = {c...};
  if (map.rank != int(sizeof...(c)))
    fail("names a place in a tensor of " + std::to_string(map.rank) + " dimensions by " +
         std::to_string(sizeof...(c)));
  Box box = {map, {}, {Region::kWhole, shared.array, i, 1, 0}};
  for (int d = 0; d < map.rank; ++d) {
    box.coordinates[d] = coordinates[d];
    box.region.lines *= map.box[d];
  }
  check_tile(*shared.array, i, kAtom, "copies a tensor's box and");
  Shared<T>::check_inside(*shared.array, i);
  Shared<T>::check_inside(*shared.array, i + box.region.lines - 1);
  return box;
}

}  // namespace twin

inline void prefetch_tensor_map(const TensorMap&) {}

template <class T, class... Coordinates>
inline void copy_tensor(const Shared<T>& to, int i, const TensorMap& map, const Barriers& barriers,
                        int barrier_index, Coordinates... coordinates) {
  twin::Barrier& barrier = barriers.at(barrier_index);
  twin::check_initialised(barrier);
  if (!barrier.fenced)
    twin::fail("has a copy come to " + barrier.name + ", after whose init no fence_barriers was");
  const twin::Box box = twin::box_of(map, to, i, coordinates...);
  const twin::Array& array = *to.array;
  twin::check_asynchronous_reads(array, i, i + box.region.lines);
  for (int j = i; j < i + box.region.lines; ++j) {
    twin::check_write(array, j);
    twin::check_fenced(array, j, "copies over");
    twin::Element& element = array.element(j);
    element.copier = &barrier.copies;
    element.writer = nullptr;
    element.written = twin::kNever;
  }
  barrier.boxes.push_back(box);
  if (barrier.waiting.first) twin::settle(barrier);
}

template <class T, class... Coordinates>
inline void store_tensor(const TensorMap& map, const Shared<T>& from, int i,
                         Coordinates... coordinates) {
  const twin::Box box = twin::box_of(map, from, i, coordinates...);
  for (int j = i; j < i + box.region.lines; ++j) twin::check_asynchronous_read(*from.array, j);
  twin::registers_of(twin::current).stores.back().push_back(box);
}

inline void store_tensor_commit() { twin::registers_of(twin::current).stores.emplace_back(); }

template <int pending>
inline void store_tensor_wait_read() {
  auto& groups = twin::registers_of(twin::current).stores;
  while (groups.size() > size_t(pending) + 1) {
    for (const twin::Box& box : groups.front()) {
      box.each([&](int i, const char* to) {
        if (to) memcpy(const_cast<char*>(to), box.region.array->bytes() + 2 * i, 2);
      });
      twin::note_asynchronous_read(box.region, twin::current);
    }
    groups.erase(groups.begin());
  }
}

template <int pending>
inline void store_tensor_wait() {
  store_tensor_wait_read<pending>();
}

// ---- products of a warpgroup ----

template <class T>
struct Along {
  static constexpr bool across = false;
  twin::Region region;
};
template <class T>
struct Across {
  static constexpr bool across = true;
  twin::Region region;
};

template <class T>
inline Along<T> along(const Shared<T>& tile, int i) {
  twin::check_tile(*tile.array, i / twin::kSlab * twin::kSlab, twin::kAtom, "multiplies");
  if (i % 16) twin::fail("multiplies from column " + std::to_string(i % twin::kSlab) + " on");
  return {{twin::Region::kAlong, tile.array, i, 0, 0}};
}

template <class T>
inline Across<T> across(const Shared<T>& tile, int i, int slab) {
  twin::check_tile(*tile.array, i, twin::kAtom, "multiplies");
  if (slab % (twin::kAtom / 2)) twin::fail("multiplies slabs of " + std::to_string(slab));
  return {{twin::Region::kAcross, tile.array, i, 0, slab}};
}

namespace twin {

// Calls f(address of the first word, words) for an array of registers of any shape.
template <class Registers, class F>
inline void with_words(Registers& registers, const F& f) {
  static_assert(sizeof(registers) % 4 == 0, "registers have 4 bytes");
  f(reinterpret_cast<uint32_t*>(&registers), sizeof(registers) / 4);
}

inline const Fenced* find_fenced(const Registers& mine, const void* data, size_t words) {
  for (const Fenced& fenced : mine.fenced) {
    const char* const begin = static_cast<const char*>(fenced.data);
    if (data >= begin &&
        static_cast<const char*>(data) + 4 * words <= begin + 4 * fenced.words.size())
      return &fenced;
  }
  return nullptr;
}

inline void check_registers_fenced(const Fiber* fiber, const Registers& mine, const void* data,
                                   size_t words, bool values, const char* what) {
  const Fenced* const fenced = find_fenced(mine, data, words);
  if (!fenced)
    fail(std::string("multiplies with ") + what + " of " + name_thread(fiber) +
         " that no warpgroup_fence named since they were last used");
  const size_t offset =
      size_t(static_cast<const char*>(data) - static_cast<const char*>(fenced->data));
  if (values &&
      memcmp(data, reinterpret_cast<const char*>(fenced->words.data()) + offset, 4 * words) != 0)
    fail(std::string("multiplies with ") + what + " of " + name_thread(fiber) +
         " that were written after the warpgroup_fence");
}

// They need another fence before they are used again.
inline void forget_fence(Registers& mine, const void* data) {
  mine.fenced.erase(std::remove_if(mine.fenced.begin(), mine.fenced.end(),
                                   [&](const Fenced& f) {
                                     const char* const begin = static_cast<const char*>(f.data);
                                     return data >= begin && data < begin + 4 * f.words.size();
                                   }),
                    mine.fenced.end());
}

inline Accumulators* find_accumulators(Registers& mine, const float* registers) {
  for (Accumulators& each : mine.accumulators)
    if (each.registers == registers) return &each;
  return nullptr;
}

inline void check_poison(const Fiber* fiber, const Accumulators& accumulators) {
  for (size_t i = 0; i < accumulators.values.size(); ++i)
    if (bit_cast<uint32_t>(accumulators.registers[i]) != kPoison)
      fail("finds that " + name_thread(fiber) +
           " wrote accumulators of a product that was under way");
}

inline void issue(const Product& product) {
  Fiber* const fibers = first_of(*current->warp, *current->block);
  WarpProducts& warp = products_of_warp();
  Product issued = product;
  // A warp's rows of A are its own 16.
  const int row = int(&warp - asynchronous().warps.data()) % 4 * 16;
  if (product.a_is_shared) {
    issued.a.first += row * kSlab;
    issued.a.lines = 16;
  }
  const auto text = [](const Region& r) {
    return r.array ? " " + std::string(r.array->key) + " " + std::to_string(r.first) : "";
  };
  const std::string name = std::to_string(product.columns) + text(product.a) + text(product.b) +
                           (product.accumulate ? " added" : "");
  auto& sequence = asynchronous().issued[size_t(current->thread) / (4 * kWarp)];
  if (warp.issued == sequence.size()) sequence.push_back(name);
  if (sequence[warp.issued] != name)
    fail("multiplies (" + name + ") where another warp of its warpgroup multiplies (" +
         sequence[warp.issued] + ")");
  ++warp.issued;
  for (const Region* region : {&issued.a, &issued.b}) {
    if (!region->array) continue;
    for (int line = 0; line < region->lines; ++line)
      for (int k = 0; k < 16; ++k)
        check_asynchronous_read(*region->array, region->element(line, k));
  }
  for (int l = 0; l < kWarp; ++l) {
    const Fiber* const fiber = &fibers[l];
    Registers& mine = registers_of(fiber);
    const size_t words = size_t(product.columns) / 2;
    Accumulators* d = find_accumulators(mine, mine.d);
    if (!d || !d->pending) {
      check_registers_fenced(fiber, mine, mine.d, words, product.accumulate, "accumulators");
      if (!d) {
        mine.accumulators.push_back({mine.d, {}, 0});
        d = &mine.accumulators.back();
      }
      d->values.assign(mine.d, mine.d + words);
      for (size_t i = 0; i < words; ++i) mine.d[i] = bit_cast<float>(kPoison);
    } else {
      if (d->values.size() != words) fail("multiplies into accumulators of another shape");
      check_poison(fiber, *d);
    }
    ++d->pending;
    issued.lanes[l].d = mine.d;
    issued.lanes[l].a = mine.a;
    if (!product.a_is_shared) {
      check_registers_fenced(fiber, mine, mine.a, 4, true, "an A");
      memcpy(issued.lanes[l].a_then, mine.a, 16);
    }
  }
  warp.groups.back().push_back(issued);
}

inline void multiply(const Product& product) {
  Fiber* const fibers = first_of(*current->warp, *current->block);
  float a[16][16];
  const auto element = [&](const Region& region, int line, int k) {
    uint16_t bits;
    memcpy(&bits, region.array->bytes() + 2 * region.element(line, k), 2);
    return product.widen(bits);
  };
  if (product.a_is_shared) {
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) a[row][k] = element(product.a, row, k);
  } else {
    for (int l = 0; l < kWarp; ++l) {
      if (memcmp(product.lanes[l].a, product.lanes[l].a_then, 16) != 0)
        fail("finds that " + name_thread(&fibers[l]) +
             " wrote the A of a product that was under way");
      forget_fence(registers_of(&fibers[l]), product.lanes[l].a);
      for (int i = 0; i < 8; ++i) {
        const uint16_t bits = uint16_t(product.lanes[l].a_then[i / 2] >> 16 * (i % 2));
        a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = product.widen(bits);
      }
    }
  }
  float* rows[kWarp];
  for (int l = 0; l < kWarp; ++l) {
    Accumulators& d = *find_accumulators(registers_of(&fibers[l]), product.lanes[l].d);
    if (!product.accumulate) std::fill(d.values.begin(), d.values.end(), 0.0f);
    rows[l] = d.values.data();
  }
  for (int column = 0; column < product.columns; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) b[k] = element(product.b, column, k);
    for (int row = 0; row < 16; ++row) {
      float& d = rows[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
      d += sum;
    }
  }
  for (int l = 0; l < kWarp; ++l)
    --find_accumulators(registers_of(&fibers[l]), product.lanes[l].d)->pending;
}

// All but the last `pending` groups of the warp.
inline void finish_products(size_t pending) {
  WarpProducts& warp = products_of_warp();
  while (warp.groups.size() > pending + 1) {
    for (const Product& product : warp.groups.front()) {
      multiply(product);
      for (const Region* region : {&product.a, &product.b})
        if (region->array) note_asynchronous_read(*region, &warp.agent);
    }
    warp.groups.erase(warp.groups.begin());
  }
  const uint32_t now = ++current->block->cluster->now;
  Fiber* const fibers = first_of(*current->warp, *current->block);
  for (int l = 0; l < kWarp; ++l) join(fibers[l].seen, warp.agent.thread, now);
}

inline void collect(const float* registers) {
  Registers& mine = registers_of(current);
  Accumulators* const d = find_accumulators(mine, registers);
  if (!d) return;  // nothing was multiplied into them
  if (d->pending) fail("waits for accumulators that a later product writes");
  check_poison(current, *d);
  std::copy(d->values.begin(), d->values.end(), d->registers);
  forget_fence(mine, registers);
  mine.accumulators.erase(mine.accumulators.begin() + (d - mine.accumulators.data()));
}

inline void check_warpgroup() {
  if (current->block->cluster->threads % (4 * kWarp))
    fail("multiplies in a block of " + std::to_string(current->block->cluster->threads) +
         " threads, which are not whole warpgroups");
}

inline Region operand(Region region, int lines) {
  region.lines = lines;
  return region;
}

template <class T>
inline float widen_bits(uint16_t bits) {
  return widen(T{bits});
}

}  // namespace twin

template <class Registers>
inline void pin(Registers&) {}

template <class Registers>
inline void finish(const Registers&) {}

template <class... Registers>
inline void warpgroup_fence(Registers&... registers) {
  twin::check_warpgroup();
  twin::Registers& mine = twin::registers_of(twin::current);
  const auto note = [&](auto& each) {
    twin::with_words(each, [&](uint32_t* words, size_t count) {
      const twin::Accumulators* const d =
          twin::find_accumulators(mine, reinterpret_cast<float*>(words));
      if (d && d->pending) return;  // products of the same accumulators are in order
      twin::forget_fence(mine, words);
      mine.fenced.push_back({words, std::vector<uint32_t>(words, words + count)});
    });
  };
  (note(registers), ...);
  twin::meet_warp(twin::Operation::kProductFence, false);
}

inline void warpgroup_commit() {
  twin::meet_warp(twin::Operation::kProductCommit, false,
                  [] { twin::products_of_warp().groups.emplace_back(); });
}

template <int pending, class... Registers>
inline void warpgroup_wait(Registers&... registers) {
  twin::meet_warp(twin::Operation::kProductWait, false,
                  [] { twin::finish_products(size_t(pending)); });
  const auto take = [](auto& each) {
    twin::with_words(each, [](uint32_t* words, size_t) {
      twin::collect(reinterpret_cast<const float*>(words));
    });
  };
  (take(registers), ...);
}

template <int words, template <class> class B, class T>
inline void warpgroup_multiply(float (&d)[words], const uint32_t (&a)[4], const B<T>& b,
                               bool accumulate) {
  twin::check_warpgroup();
  twin::Registers& mine = twin::registers_of(twin::current);
  mine.d = d;
  mine.a = a;
  twin::meet_warp(twin::Operation::kProduct, false, [&] {
    twin::Product product{
        {}, twin::operand(b.region, 2 * words), false, accumulate, 2 * words, &twin::widen_bits<T>,
        {}};
    twin::issue(product);
  });
}

template <int words, template <class> class B, class T>
inline void warpgroup_multiply(float (&d)[words], const Along<T>& a, const B<T>& b,
                               bool accumulate) {
  twin::check_warpgroup();
  twin::Registers& mine = twin::registers_of(twin::current);
  mine.d = d;
  mine.a = nullptr;
  twin::meet_warp(twin::Operation::kProduct, false, [&] {
    twin::Product product{a.region,  twin::operand(b.region, 2 * words),
                          true,      accumulate,
                          2 * words, &twin::widen_bits<T>,
                          {}};
    twin::issue(product);
  });
}

namespace twin {

inline void check_end(Fiber* fiber) {
  Block& block = *fiber->block;
  Asynchronous& all = *block.asynchronous;
  const WarpProducts& warp = all.warps[size_t(fiber->thread) / kWarp];
  if (warp.groups.size() > 1 || !warp.groups.back().empty())
    throw Error(describe(fiber) + " ended, but a product of its warp is under way");
  const auto& stores = all.threads[size_t(fiber->thread)].stores;
  if (stores.size() > 1 || !stores.back().empty())
    throw Error(describe(fiber) + " ended, but a copy from its shared memory is under way");
  if (block.running > 1) return;
  for (const auto& entry : all.barriers)
    for (const Barrier& barrier : entry.second)
      if (!barrier.boxes.empty())
        throw Error("block " + std::to_string(block.index) + " ended, but " + barrier.copies.agent +
                    " is under way");
  for (size_t w = 0; w < all.warps.size(); ++w)
    if (all.warps[w].issued != all.issued[w / 4].size())
      throw Error("warp " + std::to_string(w) + " of block " + std::to_string(block.index) +
                  " has not multiplied as often as another one of its warpgroup");
  for (size_t t = 0; t < all.threads.size(); ++t)
    if (all.threads[t].limit != all.threads[t / 128 * 128].limit)
      throw Error("thread " + std::to_string(t) + " of block " + std::to_string(block.index) +
                  " has not the registers of others of its warpgroup");
}

}  // namespace twin
}  // namespace fastgpt::cuda
