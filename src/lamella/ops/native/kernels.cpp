// Small CPU kernels for LLM inference: raw pointers in, raw pointers out, no framework headers.
//
// Every kernel is a template over the storage type (float or bf16), accumulates in fp32 and rounds once at the end. The
// vector code is written with the compiler's own 16-lane vectors, which lower to whatever the target has; intrinsics
// appear only where no portable spelling exists (bf16 dot products, AMX tiles). Strides count elements. The order of
// every sum depends on the shapes of one row, request or channel alone: never on its neighbours, nor on the threads.
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

// ---- linear --------------------------------------------------------------------------------------------------------

// x and the weight are T, y is O: the storage type again, or float where the sums are wanted unrounded.
template <class T, class O>
struct Linear {
    const T *x, *w, *bias;
    O* y;
    int64_t M, K, N, ldx;

    // Output columns [begin, end), four weight rows at a time: four streams keep the memory busy.
    void columns(int64_t begin, int64_t end) const {
        float out[4 * 4];
        for (int64_t n = begin; n < end; n += 4) {
            const int count = int(std::min<int64_t>(4, end - n));
            const T* rows[4];
            for (int i = 0; i < 4; ++i) rows[i] = w + (n + std::min(i, count - 1)) * K;
            for (int64_t m = 0; m < M; m += 4) {
                const int ms = int(std::min<int64_t>(4, M - m));
                const T* xs = x + m * ldx;
                if (ms == 4) dots<T, 4>(rows, xs, ldx, K, out, 4);
                else if (ms == 1) dots<T, 1>(rows, xs, ldx, K, out, 4);
                else dots<T, 2>(rows, xs, ldx, K, out, 4);
                if (ms == 3) dots<T, 1>(rows, xs + 2 * ldx, ldx, K, out + 8, 4);
                for (int j = 0; j < ms; ++j)
                    for (int i = 0; i < count; ++i)
                        y[(m + j) * N + n + i] = narrow_to<O>(out[4 * j + i] + (bias ? widen(bias[n + i]) : 0.f));
            }
        }
    }
};

// Weight rows per task, a multiple of `multiple`: large enough for a long linear read, with some tasks per thread.
int64_t task_rows(int64_t N, int64_t K, int threads, int64_t multiple) {
    const int64_t elements = std::clamp<int64_t>(N * K / (8 * threads), 1 << 14, 1 << 18);
    return std::max<int64_t>(1, elements / std::max<int64_t>(1, K * multiple)) * multiple;
}

#ifdef __AMX_BF16__
// Linux hands out the tile registers on request, once per process.
bool have_tiles() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
}

constexpr int TILE_ROWS = 16, TILE_K = 32;  // a tile: 16 rows of 64 bytes

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// y^T = W x^T: the weight is the left operand, whose tiles are plain 16-row pieces of it, so it needs no repacking; x
// becomes the right operand, (pairs of k, rows of x), a small transposition per call. All M <= 16 cost about the same.
template <class O>
struct TileLinear {
    const Linear<bf16, O>& p;
    const uint32_t* packed_x;

    // B blocks of 16 weight rows from row n on, against C blocks of `rows` rows of x from row m on (all of 16 if C is 2).
    // Tiles: 0-3 sums, 2 b + c; 4, 5 w; 6, 7 x. Two by two, every load serves two products.
    template <int B, int C>
    void blocks(int64_t n, int64_t m, int rows) const {
        // The next block follows in memory: while this one is at work, a linear stream of prefetches brings it in.
        const int64_t ahead = B * TILE_ROWS * p.K * int64_t(sizeof(bf16));
        const bf16* w = p.w + n * p.K;
        const uint32_t *x = packed_x + m * p.K / 2, *second = x + TILE_ROWS * p.K / 2;
        _tile_zero(0);
        if (C == 2) _tile_zero(1);
        if (B == 2) _tile_zero(2);
        if (B == 2 && C == 2) _tile_zero(3);
        for (int64_t k = 0; k < p.K; k += TILE_K) {
            if (m == 0) {  // later rows of x find the weight in the cache
                const char* next = reinterpret_cast<const char*>(w + B * TILE_ROWS * k) + ahead;
                for (int line = 0; line < B * TILE_ROWS; ++line) _mm_prefetch(next + 64 * line, _MM_HINT_T1);
            }
            _tile_loadd(6, x + k / 2 * rows, 4 * rows);
            _tile_loadd(4, w + k, 2 * p.K);
            _tile_dpbf16ps(0, 4, 6);
            if (C == 2) {
                _tile_loadd(7, second + k / 2 * rows, 4 * rows);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (B == 2) {
                _tile_loadd(5, w + TILE_ROWS * p.K + k, 2 * p.K);
                _tile_dpbf16ps(2, 5, 6);
                if (C == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
        alignas(64) float out[B * C][TILE_ROWS * 16];
        _tile_stored(0, out[0], 4 * rows);
        if (C == 2) _tile_stored(1, out[1], 4 * rows);
        if (B == 2) _tile_stored(2, out[C], 4 * rows);
        if (B == 2 && C == 2) _tile_stored(3, out[3], 4 * rows);
        for (int b = 0; b < B; ++b) {
            const f32v bias = p.bias ? load(p.bias + n + b * TILE_ROWS) : f32v{};
            for (int c = 0; c < C; ++c) {
                f32v columns[LANES];
                for (int i = 0; i < LANES; ++i) columns[i] = load(out[b * C + c] + i * rows, rows);
                transpose(columns);
                for (int j = 0; j < rows; ++j)
                    store(p.y + (m + c * TILE_ROWS + j) * p.N + n + b * TILE_ROWS, columns[j] + bias);
            }
        }
    }

    template <int C>
    void columns(int64_t begin, int64_t end, int64_t m, int rows) const {
        int64_t n = begin;
        for (; n + 2 * TILE_ROWS <= end; n += 2 * TILE_ROWS) blocks<2, C>(n, m, rows);
        if (n < end) blocks<1, C>(n, m, rows);
    }

    void rows(int64_t begin, int64_t end) const {
        const char* first = reinterpret_cast<const char*>(p.w + begin * p.K);
        const int64_t block = std::min<int64_t>(2 * TILE_ROWS, end - begin) * p.K * int64_t(sizeof(bf16));
        for (int64_t byte = 0; byte < block; byte += 64) _mm_prefetch(first + byte, _MM_HINT_T1);
        for (int64_t m = 0; m < p.M;) {
            const bool pair = p.M - m >= 2 * TILE_ROWS;
            const int count = int(std::min<int64_t>(TILE_ROWS, p.M - m));
            TileConfig config;
            for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = t == 4 || t == 5 ? 64 : 4 * count;
            _tile_loadconfig(&config);
            if (pair) columns<2>(begin, end, m, count);
            else columns<1>(begin, end, m, count);
            m += pair ? 2 * TILE_ROWS : count;
        }
        _tile_release();  // a thread that keeps live tiles pays for them at every context switch
    }
};

template <class O>
void linear_tiles(const Linear<bf16, O>& p, int threads) {
    static thread_local std::vector<uint32_t> scratch;
    const int64_t pairs = p.K / 2, tiled = p.N / TILE_ROWS * TILE_ROWS;
    scratch.resize(p.M * pairs);
    uint32_t* packed = scratch.data();  // per 16 rows of x
    parallel_ranges(threads, pairs, 2 * p.M, [&](int64_t begin, int64_t end) {
        for (int64_t m = 0; m < p.M; m += 16) {
            const int64_t rows = std::min<int64_t>(16, p.M - m);
            uint32_t* to = packed + m * pairs;
            for (int64_t k = begin; k < end; ++k)
                for (int64_t j = 0; j < rows; ++j) std::memcpy(to + k * rows + j, p.x + (m + j) * p.ldx + 2 * k, 4);
        }
    });
    const TileLinear<O> tiles{p, packed};
    // Few rows of x: memory is the limit, and one long read for each thread is the quickest. Many: tasks even out.
    const int64_t pairs_of_blocks = (tiled + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
    const int64_t share = (pairs_of_blocks + threads - 1) / threads * 2 * TILE_ROWS;
    const int64_t size = p.M <= TILE_ROWS && share > 0 ? share : task_rows(p.N, p.K, threads, 2 * TILE_ROWS);
    parallel_tasks(threads, (tiled + size - 1) / size, size * p.K,
                   [&](int64_t i) { tiles.rows(i * size, std::min(tiled, (i + 1) * size)); });
    p.columns(tiled, p.N);
}
#endif

template <class T, class O>
void linear_to(const T* x, int64_t ldx, const T* w, const T* bias, O* y, int64_t M, int64_t K, int64_t N, int threads) {
    const Linear<T, O> p{x, w, bias, y, M, K, N, ldx};
#ifdef __AMX_BF16__
    if constexpr (sizeof(T) == 2)
        if (K % TILE_K == 0 && have_tiles()) return linear_tiles(p, threads);
#endif
    const int64_t size = task_rows(N, K, threads, 4);
    parallel_tasks(threads, (N + size - 1) / size, size * K,
                   [&](int64_t i) { p.columns(i * size, std::min(N, (i + 1) * size)); });
}

template <class T>
void linear(const T* x, int64_t ldx, const T* w, const T* bias, T* y, int64_t M, int64_t K, int64_t N, int threads) {
    linear_to(x, ldx, w, bias, y, M, K, N, threads);
}
template <class T>
void wide_linear(const T* x, int64_t ldx, const T* w, const T* bias, float* y, int64_t M, int64_t K, int64_t N,
                 int threads) {
    linear_to(x, ldx, w, bias, y, M, K, N, threads);
}

// ---- attention of one new token per request ------------------------------------------------------------------------

constexpr int SPLIT = 256;  // tokens per task; fixed, so that the sums do not depend on the number of threads

template <class T>
INLINE inline void prefetch(const T* row, int n) {
    for (int byte = 0; byte < n * int(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// One split of one request: the same tokens for every head.
template <class T>
struct Split {
    int64_t offsets[SPLIT];  // of the tokens' rows in the caches
    int tokens, D;
    float scale;

    // acc[g][0, 32 * PAIRS) = sum_t p[g][t] * v[t] for G heads.
    template <int G, int PAIRS>
    INLINE void weigh(const T* v, const T* upcoming, const float* p, float* acc) const {
        f32v sums[G][PAIRS][2] = {};
        for (int t = 0; t < tokens; ++t) {
            prefetch(upcoming + offsets[t], PAIRS * 2 * LANES);
            for (int i = 0; i < PAIRS; ++i) {
                f32v row[2];
                load_two(v + offsets[t] + i * 2 * LANES, row[0], row[1]);
                for (int g = 0; g < G; ++g)
                    for (int j = 0; j < 2; ++j) sums[g][i][j] += p[g * SPLIT + t] * row[j];
            }
        }
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < PAIRS; ++i)
                store_two<T>(acc + g * (D + 2) + i * 2 * LANES, sums[g][i][0], sums[g][i][1]);
    }

    // The same for up to 16 channels at the end of a row.
    template <int G>
    INLINE void weigh_end(const T* v, const float* p, float* acc, int n) const {
        f32v sums[G] = {};
        for (int t = 0; t < tokens; ++t) {
            const f32v row = load(v + offsets[t], n);
            for (int g = 0; g < G; ++g) sums[g] += p[g * SPLIT + t] * row;
        }
        for (int g = 0; g < G; ++g) store(acc + g * (D + 2), sums[g], n);
    }

    // Per query head g: out[g] = (values weighted by e^(score - maximum), the maximum, the sum of the weights). The
    // rows of one kv head lie far apart, where hardware prefetchers do not follow: while the keys are at work the
    // values are asked for, and during the values the keys that come next.
    template <int G>
    void attend(const T* q, const T* k, const T* v, const T* next_k, float* out) const {
        alignas(64) float scores[G][SPLIT];
        constexpr int ahead = 16;
        for (int t = 0; t < tokens; t += 4) {
            const T* rows[4];
            for (int i = 0; i < 4; ++i) {
                const int token = std::min(t + i, tokens - 1);
                rows[i] = k + offsets[token];
                prefetch(k + offsets[std::min(token + ahead, tokens - 1)], D);
                prefetch(v + offsets[token], D);
            }
            dots<T, G>(rows, q, D, D, &scores[0][t], SPLIT);
        }
        const int padded = (tokens + LANES - 1) / LANES * LANES;
        for (int g = 0; g < G; ++g) {
            float* s = scores[g];
            std::fill(s + tokens, s + padded, -std::numeric_limits<float>::infinity());
            f32v high = load(s), total{};
            for (int t = LANES; t < padded; t += LANES) high = larger(high, load(s + t));
            const float maximum = max(high) * scale;
            for (int t = 0; t < padded; t += LANES) {
                const f32v weight = exp(load(s + t) * scale - maximum);
                store(s + t, weight);
                total += weight;
            }
            out[g * (D + 2) + D] = maximum;
            out[g * (D + 2) + D + 1] = sum(total);
        }
        int d = 0;
        if constexpr (G <= 2)
            for (; d + 8 * LANES <= D; d += 8 * LANES) weigh<G, 4>(v + d, next_k + d, scores[0], out + d);
        for (; d + 4 * LANES <= D; d += 4 * LANES) weigh<G, 2>(v + d, next_k + d, scores[0], out + d);
        for (; d < D; d += LANES) weigh_end<G>(v + d, scores[0], out + d, std::min(LANES, D - d));
    }
};

template <class T>
void decode_attention(const T* q, int64_t ldq, const T* k_cache, const T* v_cache, const int32_t* page_table,
                      int64_t max_pages, const int32_t* seq_lens, T* out, int64_t R, int64_t H, int64_t KV, int64_t D,
                      int64_t page, float scale, int64_t window, int64_t chunk, int threads) {
    static thread_local std::vector<int64_t> first_split;  // of every request, and their count at the end
    static thread_local std::vector<float> partial;        // what Split::attend leaves, per (split, head)
    const auto visible = [&](int64_t r) {
        if (chunk > 0) return (int64_t(seq_lens[r]) - 1) % chunk + 1;
        return window < 0 ? int64_t(seq_lens[r]) : std::min<int64_t>(seq_lens[r], window);
    };
    first_split.assign(1, 0);
    int64_t all_visible = 0;
    for (int64_t r = 0; r < R; ++r) {
        first_split.push_back(first_split.back() + (visible(r) + SPLIT - 1) / SPLIT);
        all_visible += visible(r);
    }
    const int64_t* first = first_split.data();
    const int64_t splits = first[R], group = H / KV, ldp = D + 2;
    if (splits == 0) return;
    partial.resize(splits * H * ldp);
    float* parts = partial.data();

    // A task takes as many kv heads of a split as leave every thread some tasks: neighbours share memory pages.
    const int64_t heads = std::clamp<int64_t>(splits * KV / (4 * threads), 1, KV), per_split = (KV + heads - 1) / heads;
    parallel_tasks(threads, splits * per_split, all_visible / splits * heads * group * D, [&](int64_t task) {
        const int64_t split = task / per_split, kv_begin = task % per_split * heads;
        const int64_t r = std::upper_bound(first, first + R + 1, split) - first - 1;
        const int64_t begin = seq_lens[r] - visible(r) + (split - first[r]) * SPLIT;
        Split<T> tokens;
        tokens.tokens = int(std::min<int64_t>(SPLIT, seq_lens[r] - begin));
        tokens.D = int(D);
        tokens.scale = scale;
        int64_t offset = begin % page;
        const int32_t* pages = page_table + r * max_pages + begin / page;
        for (int t = 0; t < tokens.tokens; ++t) {
            tokens.offsets[t] = (*pages * page + offset) * KV * D;
            if (++offset == page) offset = 0, ++pages;
        }
        for (int64_t kv = kv_begin; kv < std::min(KV, kv_begin + heads); ++kv)
            for (int64_t g = 0; g < group; g += 4) {
                const int64_t h = kv * group + g, next_kv = g + 4 < group ? kv : std::min(kv + 1, KV - 1);
                const auto run = [&](auto count) {
                    const T *k = k_cache + kv * D, *v = v_cache + kv * D, *next_k = k_cache + next_kv * D;
                    float* part = parts + (split * H + h) * ldp;
                    tokens.template attend<decltype(count)::value>(q + r * ldq + h * D, k, v, next_k, part);
                };
                switch (std::min<int64_t>(4, group - g)) {
                    case 1: run(std::integral_constant<int, 1>{}); break;
                    case 2: run(std::integral_constant<int, 2>{}); break;
                    case 3: run(std::integral_constant<int, 3>{}); break;
                    case 4: run(std::integral_constant<int, 4>{}); break;
                }
            }
    });

    parallel_ranges(threads, R * H, 2 * D, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = i / H, count = first[r + 1] - first[r];
            const float* part = parts + (first[r] * H + i % H) * ldp;
            float high = -std::numeric_limits<float>::infinity(), total = 0.f;
            for (int64_t s = 0; s < count; ++s) high = std::max(high, part[s * H * ldp + D]);
            for (int64_t s = 0; s < count; ++s)
                total += std::exp(part[s * H * ldp + D] - high) * part[s * H * ldp + D + 1];
            for_vectors(D, [&](int64_t d, int n) INLINE {
                f32v acc{};
                for (int64_t s = 0; s < count; ++s)
                    acc += std::exp(part[s * H * ldp + D] - high) * load(part + s * H * ldp + d, n);
                store(out + i * D + d, acc / total, n);
            });
        }
    });
}

// ---- short causal convolution --------------------------------------------------------------------------------------

template <class T>
struct ShortConv {
    const T* x;
    int64_t ldx;
    const T* weight;
    int64_t weight_channel, weight_tap;  // strides of weight (D, W)
    const T* bias;
    T* state;
    int64_t state_slot, state_row;  // strides of state (S, W-1, D), in which row p % (W-1) has the input at position p
    const int64_t* slots;
    const int32_t* starts;
    const int64_t* positions;
    T* y;
    int64_t D, W;
    bool activation, residual;

    static constexpr int64_t channels = 256;  // per task

    // Requests [r, r_end), channels [begin, end): the taps of a channel are not adjacent, so they are laid out once.
    void run(int64_t r, int64_t r_end, int64_t begin, int64_t end) const {
        static thread_local std::vector<float> laid_out;  // (W, channels)
        static thread_local std::vector<const T*> rows;   // (W,)
        laid_out.resize(W * channels), rows.resize(W);
        float* taps = laid_out.data();
        for (int64_t j = 0; j < W; ++j)
            for (int64_t d = begin; d < end; ++d)
                taps[j * channels + d - begin] = widen(weight[d * weight_channel + j * weight_tap]);
        for (; r < r_end; ++r) request(r, begin, end - begin, taps, rows.data());
    }

    // All outputs of one request for n channels, then its state; inputs is room for W pointers.
    void request(int64_t r, int64_t begin, int64_t n, const float* taps, const T** inputs) const {
        const int64_t ring = W - 1, t0 = starts[r], t1 = starts[r + 1];
        T* old = state ? state + (slots ? slots[r] : r) * state_slot + begin : nullptr;
        for (int64_t t = t0; t < t1; ++t) {
            int64_t first = W;  // the oldest tap that counts: taps [first, W) read inputs[first, W)
            for (int64_t o = 0; o < W && o <= positions[t] && (t - o >= t0 || old); ++o)
                inputs[--first] = t - o >= t0 ? x + (t - o) * ldx + begin : old + (positions[t] - o) % ring * state_row;
            for_vectors(n, [&](int64_t d, int lanes) INLINE {
                f32v c = bias ? load(bias + begin + d, lanes) : f32v{};
                for (int64_t j = first; j < W; ++j)
                    c += load(taps + j * channels + d, lanes) * load(inputs[j] + d, lanes);
                if (activation) c = silu(c);
                if (residual) c += load(inputs[W - 1] + d, lanes);
                store(y + t * D + begin + d, c, lanes);
            });
        }
        if (!old || t0 == t1) return;
        // Of the last W-1 positions, those that are new are written, and those before the first are zero.
        for (int64_t t = t1 - ring; t < t1; ++t) {
            const int64_t position = positions[t0] + t - t0;
            T* to = old + (position + ring) % ring * state_row;
            if (position < 0) std::memset(to, 0, n * sizeof(T));
            else if (t >= t0) std::memcpy(to, x + t * ldx + begin, n * sizeof(T));
        }
    }
};

template <class T>
void short_conv(const T* x, int64_t ldx, const T* weight, int64_t weight_channel, int64_t weight_tap, const T* bias,
                T* state, int64_t state_slot, int64_t state_row, const int64_t* slots, const int32_t* starts,
                const int64_t* positions, T* y, int64_t R, int64_t D, int64_t W, bool activation, bool residual,
                int threads) {
    const ShortConv<T> conv{x,     ldx,    weight,    weight_channel, weight_tap, bias, state, state_slot, state_row,
                            slots, starts, positions, y,              D,          W,    activation, residual};
    if (R == 0 || starts[R] == 0) return;
    const int64_t tokens = starts[R], blocks = (D + conv.channels - 1) / conv.channels;
    const int64_t size = std::max<int64_t>(1, 16 * R / tokens);  // requests per task: about 16 tokens
    parallel_tasks(threads, (R + size - 1) / size * blocks, tokens * size / R * W * conv.channels, [&](int64_t i) {
        const int64_t r = i / blocks * size, begin = i % blocks * conv.channels;
        conv.run(r, std::min(R, r + size), begin, std::min(D, begin + conv.channels));
    });
}

// ---- recurrent mixers ----------------------------------------------------------------------------------------------

// The gated delta rule: a task owns NV vectors of columns of one head's memory (all others have other tasks) for all
// new tokens of a request, one after another. The memory is read and written where it lies in its slot.
template <class T>
struct DeltaRule {
    const T* q;
    int64_t ldq;
    const T* k;
    int64_t ldk;
    const T* v;
    int64_t ldv;
    const T* decay;
    int64_t ldd;
    const T* beta;
    int64_t ldb;
    const float *a_log, *dt_bias;
    float* state;
    int64_t state_slot;
    const int64_t* slots;
    const int32_t *starts, *lengths;
    T* out;
    int64_t HK, HV, DK, DV;
    bool by_channel;

    // What a token's key and query are multiplied with: DK each.
    struct Operands {
        std::vector<float> keys, factors, decayed_keys, decayed_queries;
        float product;
        explicit Operands(int64_t n) : keys(n), factors(n), decayed_keys(n), decayed_queries(n) {}
    };

    void prepare(int64_t t, int64_t h, float rate, Operands& to) const {
        const T *kt = k + t * ldk + h / (HV / HK) * DK, *qt = q + t * ldq + h / (HV / HK) * DK;
        f32v kk{}, qq{}, qk{};
        for_vectors(DK, [&](int64_t d, int n) INLINE {
            const f32v a = load(kt + d, n), b = load(qt + d, n);
            kk += a * a, qq += b * b, qk += a * b;
        });
        const float key_norm = 1.f / std::sqrt(sum(kk) + 1e-6f);
        const float query_norm = 1.f / (std::sqrt(sum(qq) + 1e-6f) * std::sqrt(float(DK)));
        to.product = sum(qk) * key_norm * query_norm;
        f32v factor{};
        if (!by_channel) factor = exp(softplus(splat(widen(decay[t * ldd + h]) + dt_bias[h])) * -rate);
        for_vectors(DK, [&](int64_t d, int n) INLINE {
            if (by_channel)
                factor = exp(softplus(load(decay + t * ldd + h * DK + d, n) + load(dt_bias + h * DK + d, n)) * -rate);
            const f32v key = load(kt + d, n) * key_norm;
            store(&to.factors[d], factor, n), store(&to.keys[d], key, n);
            store(&to.decayed_keys[d], key * factor, n);
            store(&to.decayed_queries[d], load(qt + d, n) * query_norm * factor, n);
        });
    }

    // `lanes` is less than a vector's only where NV is 1.
    template <int NV>
    void run(int64_t r, int64_t h, int64_t column, int lanes) const {
        const int64_t begin = starts[r], end = starts[r + 1];
        if (begin == end) return;
        float* slot = state ? state + slots[r] * state_slot + h * DK * DV + column : nullptr;
        const bool old = slot && lengths[r] > end - begin;  // else its first token is among the new ones
        // One step works where the memory lies; more of them where its rows are next to each other, close to the core.
        std::vector<float> own(slot && end - begin == 1 ? 0 : DK * NV * LANES);
        float* memory = own.empty() ? slot : own.data();
        const int64_t ld = own.empty() ? DV : NV * LANES;
        for (int64_t d = 0; d < DK && !(old && own.empty()); ++d)
            for (int i = 0; i < NV; ++i)
                store(memory + d * ld + i * LANES, old ? load(slot + d * DV + i * LANES, lanes) : f32v{}, lanes);
        Operands at(DK);
        const float rate = std::exp(a_log[h]);
        for (int64_t t = begin; t < end; ++t) {
            prepare(t, h, rate, at);
            f32v key_sums[NV]{}, query_sums[NV]{};
            for (int64_t d = 0; d < DK; ++d)
                for (int i = 0; i < NV; ++i) {
                    const f32v row = load(memory + d * ld + i * LANES, NV > 1 ? LANES : lanes);
                    key_sums[i] += row * at.decayed_keys[d], query_sums[i] += row * at.decayed_queries[d];
                }
            const float strength = 1.f / (1.f + std::exp(-widen(beta[t * ldb + h])));
            for (int i = 0; i < NV; ++i) {
                const f32v value = load(v + t * ldv + h * DV + column + i * LANES, NV > 1 ? LANES : lanes);
                key_sums[i] = (value - key_sums[i]) * strength;
                store(out + (t * HV + h) * DV + column + i * LANES, query_sums[i] + key_sums[i] * at.product,
                      NV > 1 ? LANES : lanes);
            }
            for (int64_t d = 0; d < DK; ++d)
                for (int i = 0; i < NV; ++i) {
                    float* row = memory + d * ld + i * LANES;
                    store(row, load(row, NV > 1 ? LANES : lanes) * at.factors[d] + key_sums[i] * at.keys[d],
                          NV > 1 ? LANES : lanes);
                }
        }
        if (!slot || own.empty()) return;
        for (int64_t d = 0; d < DK; ++d)
            for (int i = 0; i < NV; ++i)
                store(slot + d * DV + i * LANES, load(memory + d * ld + i * LANES, lanes), lanes);
    }
};

template <class T>
void delta_rule(const T* q, int64_t ldq, const T* k, int64_t ldk, const T* v, int64_t ldv, const T* decay, int64_t ldd,
                const T* beta, int64_t ldb, const float* a_log, const float* dt_bias, float* state, int64_t state_slot,
                const int64_t* slots, const int32_t* starts, const int32_t* lengths, T* out, int64_t R, int64_t HK,
                int64_t HV, int64_t DK, int64_t DV, bool by_channel, int threads) {
    const DeltaRule<T> rule{q,     ldq,        k,     ldk,    v,       ldv, decay, ldd, beta, ldb, a_log,    dt_bias,
                            state, state_slot, slots, starts, lengths, out, HK,    HV,  DK,   DV,  by_channel};
    constexpr int wide = 4;  // vectors
    const int64_t full = DV / (wide * LANES), blocks = full + (DV % (wide * LANES) + LANES - 1) / LANES;
    if (R == 0) return;
    parallel_tasks(threads, R * HV * blocks, std::max<int64_t>(1, starts[R] / R) * DK * LANES, [&](int64_t i) {
        const int64_t r = i / (HV * blocks), h = i / blocks % HV, block = i % blocks;
        if (block < full) return rule.template run<wide>(r, h, block * wide * LANES, LANES);
        const int64_t column = full * wide * LANES + (block - full) * LANES;
        rule.template run<1>(r, h, column, int(std::min<int64_t>(LANES, DV - column)));
    });
}

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

// ---- norm, activation, rotary, cache writes ------------------------------------------------------------------------

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

// One head: pairs (i, i + half) or (2i, 2i + 1) turned by (cos[i], sin[i]); what follows the pairs is copied.
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

template <class T>
void write_kv(const T* k, int64_t ldk, const T* v, int64_t ldv, T* k_cache, T* v_cache, const int64_t* slots,
              int64_t tokens, int64_t width, int threads) {
    parallel_ranges(threads, tokens, width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            std::memcpy(k_cache + slots[t] * width, k + t * ldk, width * sizeof(T));
            std::memcpy(v_cache + slots[t] * width, v + t * ldv, width * sizeof(T));
        }
    });
}

struct Kernel {
    const char* name;
    void *float32, *bfloat16;
};

#define KERNEL(name) {#name, reinterpret_cast<void*>(name<float>), reinterpret_cast<void*>(name<bf16>)}

}  // namespace

// What the library exports: the kernels by name, ended by a null one, and whether bf16 products run on AMX.
extern "C" {
int lamella_has_tiles() {
#ifdef __AMX_BF16__
    return have_tiles();
#else
    return 0;
#endif
}

extern const Kernel lamella_kernels[];
const Kernel lamella_kernels[] = {KERNEL(decode_attention), KERNEL(short_conv), KERNEL(add_rms_norm), KERNEL(silu_mul),
                                  KERNEL(linear),           KERNEL(wide_linear), KERNEL(rotary),    KERNEL(write_kv),
                                  KERNEL(delta_rule),       KERNEL(selective_scan), {}};
}
