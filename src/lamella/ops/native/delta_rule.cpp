// Gated delta rule, token after token, with a matrix per slot.
#include "common.h"

namespace {

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

}  // namespace

EXPORT(delta_rule)
