// Writing new keys and values to a paged cache.
#include "common.h"

namespace {

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

}  // namespace

EXPORT(write_kv)
