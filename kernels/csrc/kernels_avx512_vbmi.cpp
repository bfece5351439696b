// AVX-512 with VNNI, VBMI and GFNI: kernels_avx512.cpp, compiled with their flags.

#include "kernels_avx512.cpp"
