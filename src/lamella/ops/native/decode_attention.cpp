// Attention of one new token per request over paged keys and values.
#include "common.h"

namespace {

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
void decode_attention(const T* q, int64_t ldq, const T* k_cache, const T* v_cache, const int32_t* block_table,
                      int64_t max_blocks, const int32_t* seq_lens, T* out, int64_t R, int64_t H, int64_t KV, int64_t D,
                      int64_t block, float scale, int64_t window, int64_t chunk, int threads) {
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

    // A task takes as many kv heads of a split as leave every thread some tasks: neighbours share memory blocks.
    const int64_t heads = std::clamp<int64_t>(splits * KV / (4 * threads), 1, KV), per_split = (KV + heads - 1) / heads;
    parallel_tasks(threads, splits * per_split, all_visible / splits * heads * group * D, [&](int64_t task) {
        const int64_t split = task / per_split, kv_begin = task % per_split * heads;
        const int64_t r = std::upper_bound(first, first + R + 1, split) - first - 1;
        const int64_t begin = seq_lens[r] - visible(r) + (split - first[r]) * SPLIT;
        Split<T> tokens;
        tokens.tokens = int(std::min<int64_t>(SPLIT, seq_lens[r] - begin));
        tokens.D = int(D);
        tokens.scale = scale;
        int64_t offset = begin % block;
        const int32_t* blocks = block_table + r * max_blocks + begin / block;
        for (int t = 0; t < tokens.tokens; ++t) {
            tokens.offsets[t] = (*blocks * block + offset) * KV * D;
            if (++offset == block) offset = 0, ++blocks;
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

}  // namespace

EXPORT(decode_attention)
