// Arm's dot products of int8 (optional in Armv8.2, in every processor since about 2018).
#pragma once
#include "simd_neon.h"
