// Rotary position embedding of queries and keys.
#include "common.h"

namespace {

// One head: pairs (i, i + half) or (2i, 2i + 1) rotated by (cos[i], sin[i]); what follows the pairs is copied.
template <class T, bool interleaved>
INLINE inline void rotate(const T* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half,
                          int64_t D, T* __restrict y) {
    for (int64_t i = 0; i < half; ++i) {
        const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
        const float x1 = widen(x[a]), x2 = widen(x[b]);
        y[a] = narrow_to<T>(x1 * cos[i] - x2 * sin[i]);
        y[b] = narrow_to<T>(x2 * cos[i] + x1 * sin[i]);
    }
    std::memcpy(y + 2 * half, x + 2 * half, (D - 2 * half) * sizeof(T));
}

template <class T>
void rotary(const T* q, int64_t ldq, const T* k, int64_t ldk, const float* cos, const float* sin, T* q_out, T* k_out,
            int64_t tokens, int64_t H, int64_t KV, int64_t D, int64_t half, bool interleaved, int threads) {
    parallel_ranges(threads, tokens, 2 * (H + KV) * D, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t h = 0; h < H + KV; ++h) {
                const T* from = h < H ? q + t * ldq + h * D : k + t * ldk + (h - H) * D;
                T* to = h < H ? q_out + (t * H + h) * D : k_out + (t * KV + h - H) * D;
                const float *c = cos + t * half, *s = sin + t * half;
                interleaved ? rotate<T, true>(from, c, s, half, D, to) : rotate<T, false>(from, c, s, half, D, to);
            }
    });
}

}  // namespace

EXPORT(rotary)
