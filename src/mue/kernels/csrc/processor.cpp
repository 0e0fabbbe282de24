// Which engines may run here (processor.h).
#include "processor.h"

#include "half.h"
#if defined(MUE_TILES) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mue {

bool has_dot() {
#if defined(MUE_DOT) && defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);  // AVX512_BF16
#elif defined(MUE_DOT) && defined(__linux__)
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16
#else
  return false;
#endif
}

MatrixUnit matrix_unit() {
#if defined(MUE_TILES) && defined(__linux__)
  static const MatrixUnit unit = []() -> MatrixUnit {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return kNoUnit;  // AMX-BF16, AMX-TILE
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? kUnitGiven : kUnitRefused;
  }();
  return unit;
#else
  return kNoUnit;
#endif
}

}  // namespace mue

extern "C" {

bool mue_has_dot() { return mue::has_dot(); }
int64_t mue_matrix_unit() { return mue::matrix_unit(); }

}  // extern "C"
