// Random and hostile trees through the C++ acceptance walk, for a build with sanitizers:
//   g++ -std=c++20 -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all -I
//   csrc tests/host_acceptance.cpp
// Values are checked in test_acceptance.py; here that none leads out of a tensor, and that results
// are well formed.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "acceptance.h"

using namespace medusa_kernels;

namespace {

std::mt19937_64 rng(1);
int64_t pick(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng() % static_cast<uint64_t>(high - low + 1));
}

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// An array of exactly n elements, so that the sanitizer sees every step over its end.
template <typename T>
struct Array {
    explicit Array(int64_t n) : data(new T[n]()) {}
    std::unique_ptr<T[]> data;
    T* get() { return data.get(); }
    T& operator[](int64_t i) { return data[i]; }
};

float hostile_float() {
    static const float values[] = {0.0f,   -0.0f,  1.0f,     -3.5f,     1e38f,
                                   -1e38f, 1e-40f, INFINITY, -INFINITY, NAN};
    return pick(0, 3) ? static_cast<float>(pick(-4000, 4000)) / 1000 : values[pick(0, 9)];
}

template <typename scalar_t>
scalar_t make(float x) {
    if constexpr (std::is_same_v<scalar_t, float>) {
        return x;
    } else {
        return {static_cast<uint16_t>(pick(0, 3) ? float_bits(x) >> 16
                                                 : static_cast<uint32_t>(pick(0, 65535)))};
    }
}

template <typename scalar_t>
void run_case() {
    const int batch = pick(1, 3), size = pick(0, 9) ? pick(1, 12) : pick(500, 512),
              vocab = pick(1, 20);
    const int max_depth = pick(0, size - 1);
    const bool hostile = pick(0, 1);
    Array<scalar_t> logits(int64_t(batch) * size * vocab);
    Array<int64_t> tokens(batch * size), eos(2), out_tokens(batch * (max_depth + 1)), next(batch);
    Array<int32_t> parents(batch * size), nodes(batch), top_k(batch), limits(batch), length(batch),
        path(batch * (max_depth + 1)), last(batch);
    Array<int8_t> modes(batch);
    Array<float> temperature(batch), threshold(batch), alpha(batch), top_p(batch);
    Array<bool> finished(batch);
    const auto number = [&](float x) { return hostile ? hostile_float() : x; };
    for (int64_t i = 0; i < int64_t(batch) * size * vocab; ++i) {
        logits[i] = make<scalar_t>(hostile ? hostile_float() : static_cast<float>(pick(-3, 3)));
    }
    for (int b = 0; b < batch; ++b) {
        for (int i = 0; i < size; ++i) {
            parents[b * size + i] = hostile  ? static_cast<int32_t>(pick(-600, 600))
                                    : i == 0 ? -1
                                             : static_cast<int32_t>(pick(0, i - 1));
            tokens[b * size + i] =
                hostile && pick(0, 3) == 0 ? static_cast<int64_t>(rng()) : pick(0, vocab - 1);
        }
        nodes[b] = hostile ? static_cast<int32_t>(pick(-5, size + 5))
                           : static_cast<int32_t>(pick(0, size));
        modes[b] = static_cast<int8_t>(hostile ? pick(-128, 127) : pick(0, 2));
        top_k[b] = static_cast<int32_t>(hostile ? pick(-2, 100) : pick(0, vocab));
        limits[b] = static_cast<int32_t>(hostile ? pick(-2, 3) : pick(1, size + 1));
        temperature[b] = number(0.7f);
        threshold[b] = number(0.01f);
        alpha[b] = number(0.3f);
        top_p[b] = number(0.8f);
    }
    eos[0] = pick(-1, vocab);
    AcceptArgs a{};
    a.logits = logits.get(), a.logits_stride_b = int64_t(size) * vocab, a.logits_stride_t = vocab;
    a.tokens = tokens.get(), a.tokens_stride_b = size;
    a.parents = parents.get(), a.parents_stride_b = size;
    a.num_nodes = pick(0, 1) ? nodes.get() : nullptr;
    a.batch = batch, a.size = size, a.vocab = vocab, a.max_depth = max_depth;
    a.mode = {modes.get(), 0};
    a.temperature = {temperature.get(), 0}, a.threshold = {threshold.get(), 0};
    a.alpha = {alpha.get(), 0}, a.top_p = {top_p.get(), 0};
    a.top_k = {top_k.get(), 0}, a.max_tokens = {limits.get(), 0};
    a.eos = eos.get(), a.num_eos = static_cast<int32_t>(pick(0, 2));
    a.has_seed = pick(0, 1);
    a.accept_length = length.get(), a.path = path.get(), a.last_node = last.get(),
    a.out_tokens = out_tokens.get();
    a.next_token = next.get(), a.finished = finished.get();
    for (int b = 0; b < batch; ++b) {
        SerialAcceptance<scalar_t>(a, b, rng(), rng()).run();
        const int count = length[b] + 1;
        expect(count >= 0 && count <= max_depth + 1, "accept_length in range");
        for (int i = 0; i <= max_depth; ++i) {
            const int node = path[b * (max_depth + 1) + i];
            expect(i < count
                       ? node >= (i ? path[b * (max_depth + 1) + i - 1] + 1 : 0) && node < size
                       : node == -1,
                   "path increases");
        }
        expect(last[b] == (count ? path[b * (max_depth + 1) + count - 1] : -1),
               "last_node ends the path");
        expect(finished[b] ? next[b] == -1 : next[b] >= 0 && next[b] < vocab,
               "next_token in the vocabulary");
        expect(count > 0 || finished[b], "nothing emitted is finished");
    }
}

void check_functions() {
    for (int i = 0; i < 200000; ++i) {
        const float y = -static_cast<float>(pick(0, 125000000)) / 1e6f;
        expect(std::fabs(exp2_product<0>(y, 1.0f) / std::exp2(double(y)) - 1) < 3e-7, "exp2");
        const float x = std::exp2(-static_cast<float>(pick(0, 20000000)) / 1e6f + 1.0f);
        expect(std::fabs(ln(x) - std::log(double(x))) < 2e-7 * (1 + std::fabs(std::log(double(x)))),
               "ln");
    }
    expect(exp2_product<31>(0.0f, 1.0f) == 2147483648.0f && ln(1.0f) == 0.0f, "exact values");
    expect(round_unsigned(2147483648.0f) == 2147483648u && round_unsigned(2.5f) == 2 &&
               round_signed(-3.5f) == -4,
           "rounding");
    expect(order_key(-0.0f) == order_key(0.0f) && order_key(NAN) == 0 &&
               order_key(-INFINITY) == kKeyOfMinusInf && order_key(INFINITY) == kKeyOfInf &&
               key_value(order_key(-2.5f)) == -2.5f,
           "order of logits");
}

}  // namespace

int main() {
    check_functions();
    for (int i = 0; i < 3000; ++i) {
        run_case<float>();
        run_case<bf16_t>();
        run_case<fp16_t>();
    }
    std::puts("ok");
}
