#pragma once

// A function compiled for several instruction sets, the best one chosen when the library loads.
// gcc takes these names from version 12 on; elsewhere the compiler's default set serves.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define VLFAST_DISPATCH \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define VLFAST_DISPATCH_TARGETS "x86-64-v4 x86-64-v3 default"
#else
#define VLFAST_DISPATCH
#define VLFAST_DISPATCH_TARGETS "default"
#endif
