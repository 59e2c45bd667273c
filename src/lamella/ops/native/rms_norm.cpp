// RMS norm, alone or of the sum with the residual stream.
#include "common.h"

namespace {

// Row i of (T, heads, N) lies at i / heads * token_stride + i % heads * head_stride; the outputs are contiguous.
template <class T>
void add_rms_norm(const T* x, int64_t token_stride, int64_t head_stride, const T* residual, int64_t ldr,
                  const float* weight, float eps, T* normed, T* new_residual, int64_t rows, int64_t heads, int64_t N,
                  int threads) {
    parallel_ranges(threads, rows, N, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T* row = x + i / heads * token_stride + i % heads * head_stride;
            f32v squares{};
            if (residual) {
                T* to = new_residual + i * N;
                for_vectors(N, [&](int64_t d, int n) INLINE {
                    const f32v s = rounded<T>(load(row + d, n) + load(residual + i * ldr + d, n));
                    store(to + d, s, n);
                    squares += s * s;
                });
                row = to;
            } else {
                for_vectors(N, [&](int64_t d, int n) INLINE {
                    const f32v s = load(row + d, n);
                    squares += s * s;
                });
            }
            const float inverse = 1.f / std::sqrt(sum(squares) / float(N) + eps);
            for_vectors(N, [&](int64_t d, int n) INLINE {
                store(normed + i * N + d, load(row + d, n) * inverse * load(weight + d, n), n);
            });
        }
    });
}

}  // namespace

EXPORT(add_rms_norm)
