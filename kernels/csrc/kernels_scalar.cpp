// The tier that runs everywhere: plain loops, also the definition of what the other tiers compute.

#include <cmath>

#include "quant_blocks.h"

#include "rows.inc"

namespace moe {
namespace {

template <int T>
void dequantize_row(const uint8_t* row, int64_t n_in, float* out) {
    decode_row<T>(row, n_in, out, [](const uint8_t* chunk, float* values) {
        uint8_t code[kChunk];
        float scale[16], min[16];
        expand_chunk<T>(chunk, code, scale, min);
        for (int j = 0; j < 16; ++j)
            for (int i = 16 * j; i < 16 * j + 16; ++i) {
                const float value = scale[j] * static_cast<float>(code[i] - Block<T>::offset);
                values[i] = Block<T>::has_min ? value - min[j] : value;
            }
    });
}

template <int T>
void dot_row(const uint8_t* row, int64_t n_in, const Ahead& ahead, const uint8_t* const* acts, int64_t n_acts,
             float* out) {
    const int64_t n_pad = padded(n_in);
    for (int64_t t = 0; t < n_acts; ++t) out[t] = 0.0f;
    for_each_chunk<T>(row, n_in, ahead, [&](const uint8_t* chunk, int64_t first) {
        uint8_t code[kChunk];
        float scale[16], min[16];
        expand_chunk<T>(chunk, code, scale, min);
        for (int64_t t = 0; t < n_acts; ++t) {
            const int8_t* q = reinterpret_cast<const int8_t*>(acts[t]) + first;
            const float* d = reinterpret_cast<const float*>(acts[t] + n_pad) + first / 32;
            const float* s = reinterpret_cast<const float*>(acts[t] + n_pad + n_pad / 8) + first / 16;
            float sum = 0.0f;
            for (int j = 0; j < 16; ++j) {
                int products = 0;
                for (int i = 16 * j; i < 16 * j + 16; ++i) products += (code[i] - Block<T>::offset) * q[i];
                sum += scale[j] * d[j / 2] * static_cast<float>(products);
                if (Block<T>::has_min) sum -= min[j] * s[j];
            }
            out[t] += sum;
        }
    });
}

template <int T>
void dot(const Rows& rows, const uint8_t* const* acts, int64_t n_acts, float* out, int64_t out_stride) {
    const Ahead ahead(rows);
    for (int64_t r = 0; r < rows.n_rows; ++r)
        dot_row<T>(rows.data + r * rows.stride, rows.n_in, ahead, acts, n_acts, out + r * out_stride);
}

// No many-token form: nothing here is fast.
template <int T>
constexpr unsigned planes_read() {
    return 0;
}
template <int T>
constexpr ExpandFn expand_function() {
    return nullptr;
}
template <int T>
constexpr MultiplyFn multiply_function() {
    return nullptr;
}

template <int T>
inline float load_float(const uint8_t* row, int64_t i) {
    if (T == F32) return load<float>(row + 4 * i);
    if (T == F16) return load_f16(row + 2 * i);
    return float_from_bits(static_cast<uint32_t>(load<uint16_t>(row + 2 * i)) << 16);
}

template <int T>
void dot_floats(const uint8_t* const* rows, int64_t n_rows, int64_t n_in, const float* const* acts,
                int64_t n_acts, float* out, int64_t out_stride) {
    constexpr int kWidth = 32;
    for (int64_t r = 0; r < n_rows; ++r)
        for (int64_t t = 0; t < n_acts; ++t) {
            const uint8_t* row = rows[r];
            const float* x = acts[t];
            float acc[kWidth] = {};
            int64_t i = 0;
            for (; i + kWidth <= n_in; i += kWidth)
                for (int lane = 0; lane < kWidth; ++lane)
                    acc[lane] += load_float<T>(row, i + lane) * x[i + lane];
            for (int lane = 0; i < n_in; ++i, ++lane) acc[lane] += load_float<T>(row, i) * x[i];
            for (int width = kWidth / 2; width > 0; width /= 2)
                for (int lane = 0; lane < width; ++lane) acc[lane] += acc[lane + width];
            out[r * out_stride + t] = acc[0];
        }
}

void quantize_blocks(const float* x, int64_t n_blocks, int8_t* q, float* d, float* s) {
    for (int64_t b = 0; b < n_blocks; ++b, x += 32, q += 32) {
        float max = 0.0f;
        bool nan = false;
        for (int i = 0; i < 32; ++i) {
            max = std::fabs(x[i]) > max ? std::fabs(x[i]) : max;
            nan |= x[i] != x[i];
        }
        const float scale = nan ? NAN : max < kTiny ? 0.0f : max / 127.0f;
        const float inverse = max < kTiny ? 0.0f : 127.0f / max;
        d[b] = scale;
        for (int half = 0; half < 2; ++half) {
            int sum = 0;
            for (int i = 16 * half; i < 16 * half + 16; ++i) {
                const float value = x[i] * inverse;
                q[i] = std::fabs(value) <= 127.5f ? static_cast<int8_t>(std::nearbyintf(value)) : 0;
                sum += q[i];
            }
            s[2 * b + half] = scale * static_cast<float>(sum);
        }
    }
}

void silu_mul(const float* gate, const float* up, int64_t n, float* h) {
    for (int64_t i = 0; i < n; ++i) h[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

constexpr TierKernels make() {
    TierKernels k = type_kernels();
    k.quantize_blocks = quantize_blocks;
    k.silu_mul = silu_mul;
    return k;
}

constexpr TierKernels kTable = make();

}  // namespace

const TierKernels kScalarKernels = kTable;

}  // namespace moe
