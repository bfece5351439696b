// The memory through which the GPU's decode step and the worker talk. Sequence numbers never repeat: layer l of
// step s is s * (n_layer + 1) + l, the tokens of step s come after the last layer. An answer's or tokens' number is
// written last (release) and read first (acquire). A message and x carry checks instead: on its way to the host a fence
// takes the GPU a microsecond, and six beside copies. The GPU waits for the answer of a message with misses before it
// posts another, so one x, one answer and one y are enough.

#pragma once

#include <cstdint>
#include <cstring>

namespace moe {

inline int64_t load_acquire(const int64_t* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
inline void store_release(int64_t* address, int64_t value) {
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
}

inline uint32_t sum_of_words(const void* words, int64_t n) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t word;
        std::memcpy(&word, static_cast<const char*>(words) + 4 * i, 4);
        sum += word;
    }
    return sum;
}

struct Mailbox {
    static constexpr int64_t kRing = 4;  // steps whose records have places of their own
    static constexpr int64_t kHeaderBytes = 64;
    static constexpr int64_t kMaxAhead = 2;
    // kMissed: pairs; 0: the GPU does not wait. kAhead: how many of the next layers are predicted.
    // kCheck: of the sum of these three and all 32-bit words of ids, weights, slots and what is ahead.
    enum MessageHeader { kSeq, kTokens, kMissed, kAhead, kCheck };
    enum TokensHeader { kBad = 2 };                      // the logits were not finite
    enum AnswerHeader { kEvicted };
    // answer_numbers: the answer's number times kFlags, and one or both of these: y is to be added; late() is valid.
    static constexpr int64_t kFlags = 4, kAddY = 1, kLate = 2;
    enum Control { kAbort, kGpuError };
    // Values of x that have one check, of the sum of their 32-bit words; of y that one place in `answer_numbers` is for.
    static constexpr int64_t kXBlock = 16384, kYBlock = 512;

    int64_t n_layer, top_k, hidden, max_batch;
    uint8_t* messages;  // [kRing * n_layer, message_bytes()]
    uint8_t* tokens;    // [kRing, token_bytes()]
    const float* x;     // [max_batch, hidden], valid in messages with misses
    const int64_t* x_checks;  // [blocks, 8], the first of each line
    int64_t* answer_numbers;  // [blocks, 8], the first of each line
    uint8_t* answer;
    float* y;          // [max_batch, hidden]: what the CPU computed, weighted and summed
    int64_t* control;  // [8]

    static int64_t whole_lines(int64_t n_bytes) { return (n_bytes + 63) / 64 * 64; }
    int64_t max_pairs() const { return max_batch * top_k; }
    int64_t message_bytes() const { return whole_lines(kHeaderBytes + (12 + 4 * kMaxAhead) * max_pairs()); }
    int64_t token_bytes() const { return kHeaderBytes + whole_lines(4 * max_batch); }
    int64_t max_evicted(int64_t n_token) const { return 2 * n_token * top_k; }  // that the GPU looks at
    int64_t answer_bytes() const {
        return kHeaderBytes + whole_lines(4 * max_pairs()) + whole_lines(4 * max_evicted(max_batch));
    }
    int64_t seq(int64_t step, int64_t layer) const { return step * (n_layer + 1) + layer; }
    // Both in one number: what belongs to another message does not pass for this one's.
    static int64_t check(int64_t seq, uint32_t sum) {
        return static_cast<int64_t>(static_cast<uint64_t>(seq) << 32 | sum);
    }

    struct Message {
        int64_t* header;
        int32_t* ids;  // [n_token, top_k]; -1: the token is of no sequence
        float* weights;
        int32_t* slots;  // -1: missed
        // [n_token, top_k]: what the next layers will probably choose, best first; -1: nothing
        int32_t* ahead[kMaxAhead];
    };
    Message message(int64_t step, int64_t layer) const {
        uint8_t* record = messages + (step % kRing * n_layer + layer) * message_bytes();
        int32_t* ids = reinterpret_cast<int32_t*>(record + kHeaderBytes);
        return {reinterpret_cast<int64_t*>(record), ids, reinterpret_cast<float*>(ids + max_pairs()),
                ids + 2 * max_pairs(), {ids + 3 * max_pairs(), ids + 4 * max_pairs()}};
    }

    // What kCheck is of, for so many tokens and predicted layers.
    uint32_t sum(const Message& message, int64_t n_token, int64_t n_ahead) const {
        const int64_t n_pair = n_token * top_k;
        uint32_t words = static_cast<uint32_t>(n_token + message.header[kMissed] + message.header[kAhead]);
        for (const void* field : {static_cast<const void*>(message.ids), static_cast<const void*>(message.weights),
                                  static_cast<const void*>(message.slots)})
            words += sum_of_words(field, n_pair);
        for (int64_t i = 0; i < n_ahead; ++i) words += sum_of_words(message.ahead[i], n_pair);
        return words;
    }

    struct Tokens {
        int64_t* header;
        int32_t* tokens;
    };
    Tokens step_tokens(int64_t step) const {
        uint8_t* record = tokens + step % kRing * token_bytes();
        return {reinterpret_cast<int64_t*>(record), reinterpret_cast<int32_t*>(record + kHeaderBytes)};
    }

    int64_t* answer_header() const { return reinterpret_cast<int64_t*>(answer); }
    // Slots of pairs whose expert was fetched for this very step, else -1.
    int32_t* late() const { return reinterpret_cast<int32_t*>(answer + kHeaderBytes); }
    // layer * n_expert + expert, whose entries of the slot table the GPU sets to -1.
    int32_t* evicted() const { return late() + whole_lines(4 * max_pairs()) / 4; }
};

}  // namespace moe
