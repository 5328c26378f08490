// Which instruction set runs: asked of the processor once, when the library is loaded.
#include "kernels.h"

#include <atomic>
#include <cstring>

namespace fastgpt {
namespace {

constexpr int kMaxTables = 4;

struct Tables {
  const Kernels* table[kMaxTables];
  int count = 0;

  Tables() {
    table[count++] = &scalar::kernels;
#if defined(__x86_64__)
    // These also ask the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c")) {
      return;
    }
    table[count++] = &avx2::kernels;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
      return;
    }
    table[count++] = &avx512::kernels;
    if (__builtin_cpu_supports("avx512bf16")) table[count++] = &avx512_bf16::kernels;
#endif
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> instance{tables().table[tables().count - 1]};
  return instance;
}

}  // namespace

int isa_count() { return tables().count; }

const Kernels& isa_at(int index) { return *tables().table[index]; }

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

bool set_active_isa(const char* name) {
  for (int i = 0; i < isa_count(); ++i) {
    if (std::strcmp(isa_at(i).isa, name) == 0) {
      active().store(&isa_at(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fastgpt
