// Random and hostile trees through the C++ acceptance walk, under AddressSanitizer and
// UndefinedBehaviorSanitizer. Values are checked in test_acceptance.py; here that none leads out of
// a tensor, that results are well formed, and how many rounds a search for a cutoff takes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

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

void check_weight_parts() {
    Distribution d{};
    d.max = 3.0f, d.scale = 1.7f, d.lowest = -64.0f / 1.7f;
    for (int i = 0; i < 200000; ++i) {
        const float x = pick(0, 9) ? 3.0f - static_cast<float>(pick(0, 20000000)) / 1e6f : 3.0f;
        const auto [high, low] = d.weight_parts(x);
        expect(double(high) + low == d.weight(x), "parts of a weight");
        expect(std::fmod(high, 65536.0f) == 0.0f && std::fabs(low) <= 32768.0f, "exact sums");
    }
}

// How many rounds a search takes, which ends at the logit with which the sum reaches the limit.
template <typename scalar_t>
int rounds_of(std::vector<float> row, float top_p, int top_k) {
    for (float& x : row) {
        if constexpr (std::is_same_v<scalar_t, bf16_t>) {
            const uint32_t bits = float_bits(x);
            x = bits_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
        }
    }
    std::sort(row.begin(), row.end(), std::greater<float>());
    const int vocab = static_cast<int>(row.size());
    const Distribution d = start_distribution(argmax_key(row[0], 0), false, row[0], kLog2E);
    const Distribution weights = top_k > 0 ? d.flat() : d;
    std::vector<uint64_t> upto(vocab + 1);
    for (int i = 0; i < vocab; ++i) upto[i + 1] = upto[i] + weights.weight(row[i]);
    const auto search =
        find_cutoff(start_search(d, 0, top_k * kWeightOfMax, kDropBits<scalar_t>), d, vocab, top_p,
                    [&](const float* bounds, uint64_t* sums) {
                        for (int j = 0; j < kPivots; ++j) {
                            const auto below = std::partition_point(
                                row.begin(), row.end(), [&](float x) { return x >= bounds[j]; });
                            sums[j] = upto[below - row.begin()];
                        }
                    });
    const auto end = std::lower_bound(upto.begin(), upto.end(), search.limit);
    expect(end != upto.end(), "a limit that is reached");
    const float least = row[end - upto.begin() - 1];
    expect(search.first == order_key(least) >> search.drop, "the cutoff is the least logit kept");
    const auto rest =
        std::partition_point(row.begin(), row.end(), [&](float x) { return x >= least; });
    expect(search.kept == upto[rest - row.begin()], "what is kept");
    return search.round + 1;
}

template <typename F>
void check_rounds(const char* name, F&& logit, int most_bf16, int most_fp32, int top_k = 0) {
    int worst[2] = {0, 0};
    double mean[2] = {0, 0};
    constexpr int kRows = 4;
    for (int i = 0; i < kRows; ++i) {
        for (int vocab : {32000, 128256}) {
            std::vector<float> row(vocab);
            for (int j = 0; j < vocab; ++j) row[j] = logit(j);
            for (float top_p : {0.9f, 0.5f}) {
                const int rounds[2] = {rounds_of<bf16_t>(row, top_p, top_k),
                                       rounds_of<float>(row, top_p, top_k)};
                for (int type = 0; type < 2; ++type) {
                    worst[type] = std::max(worst[type], rounds[type]);
                    mean[type] += rounds[type] / (4.0 * kRows);
                }
            }
        }
    }
    std::printf("%-28s rounds in bf16 %4.1f, %d at most; in fp32 %4.1f, %d\n", name, mean[0],
                worst[0], mean[1], worst[1]);
    expect(worst[0] <= most_bf16 && worst[1] <= most_fp32, name);
}

// The first round also finds what everything weighs.
void check_searches() {
    std::normal_distribution<float> normal;
    const auto peaked = [&](int i) { return i == 7 ? 14.0f : normal(rng); };
    check_rounds("one likely, a flat tail", peaked, 3, 10);
    check_rounds("normal", [&](int) { return normal(rng); }, 4, 10);
    check_rounds("normal, sigma 3", [&](int) { return 3 * normal(rng); }, 3, 10);
    check_rounds("normal, sigma 8", [&](int) { return 8 * normal(rng); }, 3, 12);
    check_rounds("uniform", [&](int i) { return static_cast<float>(i) * 8e-5f - 5; }, 4, 10);
    check_rounds("power law", [&](int i) { return -std::log(static_cast<float>(i + 1)); }, 4, 10);
    check_rounds("few values", [&](int) { return std::round(normal(rng)); }, 10, 15);
    check_rounds("all equal", [&](int) { return -2.5f; }, 1, 1);
    check_rounds("one-hot", [&](int i) { return i == 7 ? 10.0f : 0.0f; }, 10, 15);
    check_rounds("top-k of a flat tail", peaked, 4, 12, 50);
    check_rounds("top-k of few values", [&](int) { return std::round(normal(rng)); }, 10, 15, 50);
}

}  // namespace

int main() {
    check_functions();
    check_weight_parts();
    check_searches();
    for (int i = 0; i < 3000; ++i) {
        run_case<float>();
        run_case<bf16_t>();
        run_case<fp16_t>();
    }
    std::puts("ok");
}
