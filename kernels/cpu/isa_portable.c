/* Plain C, for any machine. */
#include "sampled_row.h"
#define ISA portable
#include "simd_portable.h"
#include "template.h"
