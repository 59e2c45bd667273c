// Gated activation of Llama's feed-forward.
#include "common.h"

namespace {

template <class T>
void silu_mul(const T* x, int64_t ldx, T* y, int64_t rows, int64_t I, int threads) {
    constexpr int64_t block = 2048;  // columns per item: one wide row still feeds every thread
    const int64_t blocks = (I + block - 1) / block;
    parallel_ranges(threads, rows * blocks, 4 * block, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / blocks, column = i % blocks * block;
            const T* gate = x + row * ldx + column;
            for_vectors(std::min(block, I - column), [&](int64_t d, int n) INLINE {
                store(y + row * I + column + d, silu(load(gate + d, n)) * load(gate + I + d, n), n);
            });
        }
    });
}

}  // namespace

EXPORT(silu_mul)
