// AVX-512 without VNNI: kernels_avx512.cpp, compiled without its flag. Some products are those of AVX2 (dispatch.cpp).

#include "kernels_avx512.cpp"
