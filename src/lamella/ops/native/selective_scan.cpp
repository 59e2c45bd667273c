// Selective scan, token after token, with a matrix per slot.
#include "common.h"

namespace {

// The selective scan: a task owns the states of some heads of a request, for all of its new tokens.
template <class T>
void selective_scan(const T* x, int64_t ldx, const T* dt, int64_t ldt, const T* b, int64_t ldb, const T* c, int64_t ldc,
                    const T* z, int64_t ldz, const float* a_log, const float* dt_bias, const float* skip, float* state,
                    int64_t state_slot, const int64_t* slots, const int32_t* starts, const int32_t* lengths, T* out,
                    int64_t R, int64_t X, int64_t G, int64_t H, int64_t P, int64_t N, int threads) {
    if (R == 0) return;
    parallel_ranges(threads, R * H, std::max<int64_t>(1, starts[R] / R) * P * N, [&](int64_t first, int64_t last) {
        std::vector<float> rates(P * N), steps(P), sums(P), own(state ? 0 : P * N);
        for (int64_t i = first; i < last; ++i) {
            const int64_t r = i / H, h = i % H, begin = starts[r], end = starts[r + 1];
            if (begin == end) continue;
            float* memory = state ? state + slots[r] * state_slot + h * P * N : own.data();
            if (!state || lengths[r] <= end - begin) std::memset(memory, 0, P * N * sizeof(float));
            for_vectors(P * N, [&](int64_t j, int n) INLINE {
                store(&rates[j], -exp(load(a_log + h * P * N + j, n)), n);
            });
            for (int64_t t = begin; t < end; ++t) {
                const T *xt = x + t * ldx + h / (H / X) * P, *bt = b + t * ldb + h / (H / G) * N;
                const T *ct = c + t * ldc + h * N, *zt = z + t * ldz + h * P;
                for_vectors(P, [&](int64_t p, int n) INLINE {
                    const f32v bias = dt_bias ? load(dt_bias + h * P + p, n) : f32v{};
                    store(&steps[p], softplus(load(dt + t * ldt + h * P + p, n) + bias), n);
                });
                for (int64_t p = 0; p < P; ++p) {
                    const float step = steps[p], added = step * widen(xt[p]);
                    f32v total{};
                    for_vectors(N, [&](int64_t j, int n) INLINE {
                        const f32v decay = exp(load(&rates[p * N + j], n) * step);
                        const f32v now = load(memory + p * N + j, n) * decay + load(bt + j, n) * added;
                        store(memory + p * N + j, now, n);
                        total += now * load(ct + j, n);
                    });
                    sums[p] = sum(total);
                }
                for_vectors(P, [&](int64_t p, int n) INLINE {
                    const f32v y = load(&sums[p], n) + load(skip + h * P + p, n) * load(xt + p, n);
                    store(out + (t * H + h) * P + p, y * silu(load(zt + p, n)), n);
                });
            }
        }
    });
}

}  // namespace

EXPORT(selective_scan)
