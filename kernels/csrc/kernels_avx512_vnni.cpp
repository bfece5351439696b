// AVX-512 with VNNI: kernels_avx512.cpp, compiled with its flag.

#include "kernels_avx512.cpp"
