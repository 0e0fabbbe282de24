// What of the engines this processor, and the system it runs under, can do.
#pragma once
#include "api.h"

namespace mue {

bool has_dot();
// Asks the system for the unit's registers, once: Linux gives them to who asks (arch_prctl, ARCH_REQ_XCOMP_PERM).
enum MatrixUnit : int64_t { kNoUnit, kUnitRefused, kUnitGiven };
MatrixUnit matrix_unit();

}  // namespace mue
