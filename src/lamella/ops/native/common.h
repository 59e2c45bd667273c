// Shared parts of the CPU kernels: storage types, vectors of 16 lanes, threads, dot products.
//
// A kernel takes raw pointers and sizes, and no framework headers. It is a template over the storage type (float or
// bf16), accumulates in fp32 and rounds once at the end. The vector code is written with the compiler's own 16-lane
// vectors, which lower to whatever the target has; intrinsics appear only where no portable spelling exists (bf16 dot
// products, AMX tiles). Strides count elements. The order of every sum depends on the shapes of one row, request or
// channel alone: never on its neighbours, nor on the threads.
//
// Every operation has a file of its own, which ends with EXPORT; kernels.cpp includes them all. The Python side of a
// signature is in bindings.py.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE __attribute__((always_inline))

// Export kernel `name` for both storage types: `lamella_<name>` is {float's, bf16's}.
#define EXPORT(name)                                                                                               \
    extern "C" {                                                                                                   \
    extern void* const lamella_##name[2];                                                                          \
    void* const lamella_##name[2] = {reinterpret_cast<void*>(name<float>), reinterpret_cast<void*>(name<bf16>)};   \
    }

namespace {

struct bf16 {
    uint16_t bits;
};

constexpr int LANES = 16;
typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));

// ---- conversions, loads and stores ---------------------------------------------------------------------------------

template <class To, class From>
INLINE inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE inline float widen(float x) { return x; }
INLINE inline float widen(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

// To the nearest bf16, ties to even; a NaN stays a (quiet) NaN.
INLINE inline u16v narrow(f32v x) {
    const u32v u = bits_as<u32v>(x);
    const u32v rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (u32v{} + 0x7fc0), u16v);
}
template <class T>
INLINE inline T narrow_to(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else {
        const uint32_t u = bits_as<uint32_t>(x);
        return {uint16_t(x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : 0x7fc0)};
    }
}

// The first n lanes; the others read as zero and are never touched in memory.
INLINE inline f32v load(const float* p, int n = LANES) {
    f32v v{};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
}
INLINE inline f32v load(const bf16* p, int n = LANES) {
    u16v v{};
    std::memcpy(&v, p, n * sizeof(bf16));
    return bits_as<f32v>(__builtin_convertvector(v, u32v) << 16);
}
INLINE inline void store(float* p, f32v v, int n = LANES) { std::memcpy(p, &v, n * sizeof(float)); }
INLINE inline void store(bf16* p, f32v v, int n = LANES) {
    const u16v h = narrow(v);
    std::memcpy(p, &h, n * sizeof(bf16));
}
// Two vectors at once, in whatever lane order is cheapest to widen; store_two<T> puts them back into memory order.
INLINE inline void load_two(const float* p, f32v& a, f32v& b) { a = load(p), b = load(p + LANES); }
INLINE inline void load_two(const bf16* p, f32v& even, f32v& odd) {
    u32v pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    even = bits_as<f32v>(pairs << 16), odd = bits_as<f32v>(pairs & 0xffff0000u);
}
template <class T>
INLINE inline void store_two(float* p, f32v a, f32v b) {
    if constexpr (sizeof(T) == 4) store(p, a), store(p + LANES, b);
    else {
        store(p, __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        store(p + LANES, __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
}
// v as it reads back after a round trip through the storage type.
template <class T>
INLINE inline f32v rounded(f32v v) {
    if constexpr (sizeof(T) == 4) return v;
    else return bits_as<f32v>(__builtin_convertvector(narrow(v), u32v) << 16);
}

INLINE inline f32v splat(float x) { return f32v{} + x; }

// body(i, lanes) over [0, n): whole vectors with a constant lane count, then one partial vector.
template <class Body>
INLINE inline void for_vectors(int64_t n, Body&& body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, LANES);
    if (i < n) body(i, int(n - i));
}

// Reductions over the lanes, by halves.
#define FOLD(v, op)                                                                                    \
    v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));   \
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));   \
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));   \
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));   \
    return v[0]
INLINE inline f32v add(f32v a, f32v b) { return a + b; }
INLINE inline f32v larger(f32v a, f32v b) { return a > b ? a : b; }
INLINE inline float sum(f32v v) { FOLD(v, add); }
INLINE inline float max(f32v v) { FOLD(v, larger); }

// to[0, 4) = the sums of four vectors, by transposing while adding: 13 operations instead of 32.
INLINE inline void store_sums(float* to, f32v a, f32v b, f32v c, f32v d) {
#define INTERLEAVE(x, y, i, j, k, l)                                                                             \
    __builtin_shufflevector(x, y, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, \
                            j + 12, k + 12, l + 12)
    const f32v ab = INTERLEAVE(a, b, 0, 16, 1, 17) + INTERLEAVE(a, b, 2, 18, 3, 19);
    const f32v cd = INTERLEAVE(c, d, 0, 16, 1, 17) + INTERLEAVE(c, d, 2, 18, 3, 19);
    f32v s = INTERLEAVE(ab, cd, 0, 1, 16, 17) + INTERLEAVE(ab, cd, 2, 3, 18, 19);
    s += __builtin_shufflevector(s, s, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    s += __builtin_shufflevector(s, s, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    std::memcpy(to, &s, 4 * sizeof(float));
}

// Rows i and i + S exchange their halves of every 2 S lanes: one of the four steps of a transposition.
template <int S>
INLINE inline void exchange(f32v* rows) {
#define LOW(j) (j & S ? 16 + j - S : j)
#define HIGH(j) (j & S ? 16 + j : j + S)
#define ALL(f) \
    f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
    for (int i = 0; i < LANES; ++i) {
        if (i & S) continue;
        const f32v a = rows[i], b = rows[i + S];
        rows[i] = __builtin_shufflevector(a, b, ALL(LOW));
        rows[i + S] = __builtin_shufflevector(a, b, ALL(HIGH));
    }
}
INLINE inline void transpose(f32v (&rows)[LANES]) {
    exchange<8>(rows), exchange<4>(rows), exchange<2>(rows), exchange<1>(rows);
}

// e^x to about 2 ulp, saturating at the ends of the normal range; a NaN stays a NaN.
INLINE inline f32v exp(f32v x) {
    x = x < -87.3f ? splat(-87.3f) : x;
    x = x > 88.3f ? splat(88.3f) : x;
    constexpr float to_integer = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    const f32v n = (x * 1.44269504f + to_integer) - to_integer;
    const f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32v p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * bits_as<f32v>((__builtin_convertvector(n, i32v) + 127) << 23);
}
INLINE inline f32v silu(f32v x) { return x / (1.f + exp(-x)); }

// log(1 + e^x) to about 2 ulp. With y = e^-|x| in (0, 1], log(1 + y) is that of half of it, and log(2), where y is
// large: either way the argument less one, f, is exact.
INLINE inline f32v softplus(f32v x) {
    const f32v y = exp(x < 0.f ? x : -x);
    const auto large = y > 0.41421356f;
    const f32v f = large ? (y - 1.f) * 0.5f : y, z = f * f;
    f32v p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    f32v log = p * f * z;
    log = large ? log - 2.12194440e-4f : log;
    log = log - 0.5f * z + f;
    log = large ? log + 0.693359375f : log;
    return (x > 0.f ? x : f32v{}) + log;
}

// ---- threads -------------------------------------------------------------------------------------------------------

// task(i) for i in [0, tasks), claimed one by one. The team has all threads or one: a team of another size than the
// last would make the OpenMP runtime end and start threads.
template <class Task>
void parallel_tasks(int threads, int64_t tasks, int64_t work_per_task, Task&& task) {
    constexpr int64_t worth_waking = 16384;  // elements: below this the fork and join cost more than they save
    if (threads == 1 || tasks == 1 || tasks * work_per_task < worth_waking) {
        for (int64_t i = 0; i < tasks; ++i) task(i);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
}

// range(begin, end) over [0, n) in blocks of roughly block_work elements.
template <class Range>
void parallel_ranges(int threads, int64_t n, int64_t work_per_item, Range&& range) {
    constexpr int64_t block_work = 8192;
    const int64_t size = std::max<int64_t>(1, block_work / std::max<int64_t>(1, work_per_item));
    parallel_tasks(threads, (n + size - 1) / size, size * work_per_item,
                   [&](int64_t i) { range(i * size, std::min(n, (i + 1) * size)); });
}

// ---- dot products --------------------------------------------------------------------------------------------------

// What one step of a dot product takes from memory, and how it lands in 16 fp32 sums.
template <class T>
struct Dot {
    static constexpr int step = LANES;
    using V = f32v;
    INLINE static V load(const T* p, int n = step) { return ::load(p, n); }
    INLINE static f32v mac(f32v acc, V a, V b) { return acc + a * b; }
};
#ifdef __AVX512BF16__
template <>
struct Dot<bf16> {
    static constexpr int step = 2 * LANES;
    using V = __m512bh;
    INLINE static V load(const bf16* p, int n = step) {
        V v{};
        std::memcpy(&v, p, n * sizeof(bf16));
        return v;
    }
    INLINE static f32v mac(f32v acc, V a, V b) { return bits_as<f32v>(_mm512_dpbf16_ps(bits_as<__m512>(acc), a, b)); }
};
#endif

// out[j * ldo + i] = sum_k a[i][k] * b[j][k] for 4 rows a[i] and B rows b + j * ldb, each read once.
template <class T, int B>
INLINE inline void dots(const T* const* a, const T* b, int64_t ldb, int64_t K, float* out, int64_t ldo) {
    using D = Dot<T>;
    f32v acc[4][B] = {};
    const auto step = [&](int64_t k, int n) INLINE {
        typename D::V rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = D::load(a[i] + k, n);
        for (int j = 0; j < B; ++j) {
            const typename D::V v = D::load(b + j * ldb + k, n);
            for (int i = 0; i < 4; ++i) acc[i][j] = D::mac(acc[i][j], rows[i], v);
        }
    };
    int64_t k = 0;
    for (; k + D::step <= K; k += D::step) step(k, D::step);
    if (k < K) step(k, int(K - k));
    for (int j = 0; j < B; ++j) store_sums(out + j * ldo, acc[0][j], acc[1][j], acc[2][j], acc[3][j]);
}

}  // namespace
