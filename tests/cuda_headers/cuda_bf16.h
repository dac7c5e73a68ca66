// Float32 to bfloat16 by torch's own rounding, to the nearest.
#pragma once

#include <c10/util/BFloat16.h>

inline c10::BFloat16 __float2bfloat16_rn(float value) { return c10::BFloat16(value); }
inline uint16_t __bfloat16_as_ushort(c10::BFloat16 value) { return value.x; }
