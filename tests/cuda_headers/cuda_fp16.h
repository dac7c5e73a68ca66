// Float32 to float16 by torch's own rounding, to the nearest.
#pragma once

#include <c10/util/Half.h>

inline c10::Half __float2half_rn(float value) { return c10::Half(value); }
inline uint16_t __half_as_ushort(c10::Half value) { return value.x; }
