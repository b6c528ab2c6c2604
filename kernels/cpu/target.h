/* BEGIN_TARGET("avx2,fma") ... END_TARGET: compile the functions between for an instruction set beyond the build's. */
#define POSTTRAIN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define BEGIN_TARGET(features) POSTTRAIN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(features) _Pragma("GCC push_options") POSTTRAIN_PRAGMA(GCC target(features))
#define END_TARGET _Pragma("GCC pop_options")
#endif
