/* Plain C, for any machine. */
#define ISA portable
#include "simd_portable.h"
#include "template.h"
