// Products of few rows with a weight matrix.
#include "common.h"

namespace {

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
void fp32_linear(const T* x, int64_t ldx, const T* w, const T* bias, float* y, int64_t M, int64_t K, int64_t N,
                 int threads) {
    linear_to(x, ldx, w, bias, y, M, K, N, threads);
}

}  // namespace

EXPORT(linear)
EXPORT(fp32_linear)

// Whether bf16 products run on AMX.
extern "C" int lamella_has_tiles() {
#ifdef __AMX_BF16__
    return have_tiles();
#else
    return 0;
#endif
}
