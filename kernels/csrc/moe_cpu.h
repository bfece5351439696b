// CPU kernels for quantized mixture-of-experts models: the contract between the C++ files and with Python.
//
// Memory      Nothing here owns tensors. Every pointer belongs to the caller, who keeps it valid for the call
//             (for an ExpertLayer: for as long as the layer is used). Weights are only read.
// Shapes      Row-major. A weight matrix is n_out rows; a row is n_in / block_size consecutive blocks
//             (quant_blocks.h); rows lie row_stride bytes apart. x, y and out are float32 and contiguous.
// Arguments   Python checks them (kernels/cpu.py); here they are trusted.
// Threads     A call runs on all threads of its pool; calls on one pool from several threads wait in turn.
//             Where memory has several nodes, the threads are spread over them (cpu_order.h), but a thread takes
//             units wherever their weights lie. HostMemory (host_memory.h) deals its pages out to the nodes in
//             turn, so that all memory channels serve a call; with two nodes half of the reads cross over. A
//             mapped file's pages lie where they were first read.
// Results     A token's result is the same bits whatever else is in the call and however many threads run, as
//             long as the tier and the form of each product are the same: a dot product is one fixed sequence
//             of operations, and the sum over experts runs in ascending expert order.
// Forms       Integer products have two, which differ by the rounding of float32 sums (about 1e-7 of the
//             result; where a hidden activation then rounds to the next 8-bit step, more): row by row, and,
//             from many_threshold() (dispatch.h) on, in tiles of rows and panels of tokens. matmul()
//             counts its tokens, expert_ffn() those of each expert, for gate and up together (both must
//             take integers) and for down. Float products have one form. The scalar and avx2 tiers only
//             work row by row; amx gives the bits of avx512.
//
// Precision   Integer mode quantizes activations to int8 in blocks of 32 (max|x| maps to 127) and multiplies
//             integers: relative error about 0.5 %. Float mode decodes the weights to float32: about 1e-6.
//             Float weights (F32, F16, BF16) always use float activations.

#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "thread_pool.h"

namespace moe {

// What can run: the scalar tier everywhere, the others where the processor has the instructions.
// AMX only changes products of many tokens.
enum class Tier { scalar, avx2, avx512, avx512vnni, avx512vbmi, amx };

std::vector<std::string> available_tiers();  // lowest first
std::string current_tier();                  // std::invalid_argument if MOE_ENGINE_CPU_TIER has a wrong value
void set_tier(const std::string& name);      // std::invalid_argument unless available

// Copies the grid of an IQ type, int8 [entries, 8 or 4], into the library's own tables.
// Must run before any other call that meets this type. IQ1_M shares the grid of IQ1_S.
void set_codebook(int type_id, const int8_t* grid, int64_t n_bytes);

// out [n_rows, n_in] = the decoded rows, bit for bit what the reference decoder of the format gives.
void dequantize(ThreadPool& pool, int type_id, const uint8_t* rows, int64_t n_rows, int64_t n_in,
                int64_t row_stride, float* out);

struct Matmul {
    int type_id;
    const uint8_t* weight;  // n_batch matrices of [n_out, n_in]
    int64_t batch_stride;   // bytes
    int64_t row_stride;     // bytes
    int64_t n_batch, n_out, n_in;
    const float* x;  // [n_batch, n_tokens, n_in]
    int64_t n_tokens;
    float* y;  // [n_batch, n_tokens, n_out] = x W^T
    bool float_activations;
};
void matmul(ThreadPool& pool, const Matmul& job);

// One of the three weight stacks of a layer's experts; rows of a matrix are contiguous.
struct ExpertStack {
    const uint8_t* data;
    int type_id;
    int64_t expert_stride;  // bytes
};

class ExpertMemory;

struct ExpertLayer {
    ExpertStack gate, up;  // [n_expert, n_ff, hidden]
    ExpertStack down;      // [n_expert, hidden, n_ff]
    int64_t n_expert, hidden, n_ff;
    // Where not all experts fit the RAM: who reads them when they are needed (expert_memory.h), and the layer's
    // number there. expert_ffn() asks for what it uses; who else reads weights has to hold them.
    ExpertMemory* memory = nullptr;
    int memory_layer = 0;
};

// A pair (token_ids[i], expert_ids[i], weights[i]) sends a token through an expert; pairs with expert -1 are
// skipped. out [n_tokens, hidden] = sum over a token's pairs of weight * down(silu(gate x) * up x).
struct ExpertFfn {
    const float* x;  // [n_tokens, hidden]
    int64_t n_tokens;
    const int32_t* token_ids;   // [n_pairs]
    const int32_t* expert_ids;  // [n_pairs]
    const float* weights;       // [n_pairs]
    int64_t n_pairs;
    float* out;
    bool float_activations;
    const std::function<void()>* beside = nullptr;  // the caller's thread does this while the others begin
};
void expert_ffn(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job);

// What a thread reads of an expert in a call of few tokens: rows of gate, of up and of down. It is the same whatever
// the call's other experts are.
struct Bytes {
    const uint8_t* data;
    int64_t n_bytes;
};
std::array<Bytes, 3> expert_share(const ExpertLayer& layer, int64_t expert, int thread, int n_threads);

}  // namespace moe
