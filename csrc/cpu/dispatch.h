#pragma once

// The highest level of x86-64 that functions are compiled for, beside the lower ones: v4 (AVX-512),
// v3 (AVX2) or 1, the baseline. gcc takes these names from version 12 on; elsewhere the compiler's
// default set serves. Tests lower it to run what this processor would not choose.
#if !defined(__x86_64__) || !defined(__GNUC__) || __GNUC__ < 12 || defined(__clang__)
#undef VLFAST_X86_LEVEL
#define VLFAST_X86_LEVEL 1
#elif !defined(VLFAST_X86_LEVEL)
#define VLFAST_X86_LEVEL 4
#endif

// A function compiled for each level, the best one chosen when the library loads.
#if VLFAST_X86_LEVEL >= 4
#define VLFAST_DISPATCH \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define VLFAST_DISPATCH_TARGETS "x86-64-v4 x86-64-v3 default"
#elif VLFAST_X86_LEVEL >= 3
#define VLFAST_DISPATCH __attribute__((target_clones("arch=x86-64-v3", "default")))
#define VLFAST_DISPATCH_TARGETS "x86-64-v3 default"
#else
#define VLFAST_DISPATCH
#define VLFAST_DISPATCH_TARGETS "default"
#endif

// Of functions `name`_v4, `name`_v3 and `name`_default, as many as are compiled, the best one here.
#if VLFAST_X86_LEVEL >= 4
#define VLFAST_BEST(name)                            \
  (__builtin_cpu_supports("x86-64-v4")   ? name##_v4 \
   : __builtin_cpu_supports("x86-64-v3") ? name##_v3 \
                                         : name##_default)
#elif VLFAST_X86_LEVEL >= 3
#define VLFAST_BEST(name) (__builtin_cpu_supports("x86-64-v3") ? name##_v3 : name##_default)
#else
#define VLFAST_BEST(name) (name##_default)
#endif
