// All headers that the kernel needs from outside: the system's, and ours that are not compiled for the target.
//
// A target includes them before its pragma. Behind it, their inline functions would be compiled for the target too, and
// the linker, which keeps one copy of each for the whole library, might keep one that another machine cannot run. So the
// -inl.h files include none of them.

#pragma once

#ifndef INTACTKV_X86
#define INTACTKV_X86 0
#endif
#ifndef INTACTKV_ARM
#define INTACTKV_ARM 0
#endif

#include "attention/call.h"
#include "attention/targets/dispatch.h"

#include <cmath>
#include <cstring>

#if INTACTKV_X86
// GCC's own header initializes "undefined" vectors with themselves.
#if INTACTKV_X86 >= 3 && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif INTACTKV_ARM
#include <arm_neon.h>
#endif
