// Short causal convolution over the tokens of requests, with a history per slot.
#include "common.h"

namespace {

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

}  // namespace

EXPORT(short_conv)
