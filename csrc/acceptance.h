// Which path of a draft tree is accepted: the arithmetic and the decisions, the same code in the
// CUDA kernel and in the C++ one, and at the end the serial walk that the C++ one is.
//
// A row's probabilities are integers: weight 2**31 for its largest logit, rounded for the others,
// so that their sums depend on no order, a draw is exact, and both kernels give the same bits. For
// that every float operation here is rounded by itself: fused multiply-adds are spelt out, others
// must not be contracted (-ffp-contract=off off x86).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__CUDACC__)
#define MK_HD __host__ __device__ __forceinline__
#else
#define MK_HD inline
#endif
#if defined(__CUDA_ARCH__)
#define MK_ROLLED _Pragma("unroll 1")
#else
#define MK_ROLLED
#endif

namespace medusa_kernels {

constexpr int kMaxTreeNodes = 512;
constexpr int kNodeWords = kMaxTreeNodes / 32;  // of a set of nodes, a bit each
constexpr int kMaxEos = 16;                     // end tokens passed by value
constexpr int kOffsetBits =
    40;  // of a generator's offset; the bits above count arrivals in the CUDA kernel
constexpr uint64_t kOffsetMask = (uint64_t(1) << kOffsetBits) - 1;

enum AcceptMode : int32_t { kGreedy = 0, kTypical = 1, kSampling = 2 };

// A parameter of each request, or one for all of them.
template <typename T>
struct PerRequest {
    const T* values;  // [batch] or nullptr
    T value;
    MK_HD T operator[](int b) const { return values ? values[b] : value; }
};

// In the order of use: on a GPU the first touch of every 64 bytes is a miss.
struct AcceptArgs {
    const int32_t* num_nodes;  // [batch] or nullptr
    int32_t batch, size;
    PerRequest<int32_t> max_tokens;
    PerRequest<float> temperature;
    const int64_t* tokens;  // [batch, size]
    int64_t tokens_stride_b;
    const int32_t* parents;  // [batch, size], or [size] with stride 0
    int64_t parents_stride_b;
    const void* logits;  // [batch, size, vocab], last dimension contiguous; strides in elements
    int64_t logits_stride_b, logits_stride_t;
    int32_t vocab, max_depth;
    PerRequest<int8_t> mode;
    PerRequest<float> threshold, alpha, top_p;
    PerRequest<int32_t> top_k;
    bool has_seed;
    int64_t seed;            // where generator is nullptr
    uint64_t* generator;     // [2], seed and offset, or nullptr
    int32_t* accept_length;  // [batch]
    int32_t* path;           // [batch, max_depth + 1]
    int32_t* last_node;      // [batch]
    int64_t* out_tokens;     // [batch, max_depth + 1]
    int64_t* next_token;     // [batch]
    bool* finished;          // [batch]
    const int64_t* eos;      // [num_eos] or nullptr: those by value
    int32_t num_eos;
    int64_t eos_value[kMaxEos];
};

// ---- floats, each operation rounded once ----

MK_HD float f_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

MK_HD float f_add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

MK_HD float f_div(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// About a / b; 0 on a GPU where b is above 2**126.
MK_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

MK_HD float f_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

MK_HD float f_max(float a, float b) {  // b where a is NaN
#if defined(__CUDA_ARCH__)
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}

MK_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

MK_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

// To the nearest integer, ties to even.
MK_HD uint32_t round_unsigned(float x) {  // 0 <= x <= 2**31
#if defined(__CUDA_ARCH__)
    return __float2uint_rn(x);
#else
    const double shifted =
        double(x) + 4503599627370496.0;  // 2**52: the integer ends up in the last bits
    uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint32_t>(bits);
#endif
}

MK_HD int32_t round_signed(float x) {  // |x| < 2**31
#if defined(__CUDA_ARCH__)
    return __float2int_rn(x);
#else
    return x < 0.0f ? -static_cast<int32_t>(round_unsigned(-x))
                    : static_cast<int32_t>(round_unsigned(x));
#endif
}

MK_HD uint64_t mul_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

constexpr float kLn2 = 0.693147182f, kLog2E = 1.44269502f;
constexpr float kEntropyEpsilon = 1e-5f;  // the paper's code: log(p + 1e-5)

// 2**(a * b + shift) for -125 <= a * b <= 1, to 1.5e-7 of its value; exactly 2**shift at 0.
template <int shift>
MK_HD float exp2_product(float a, float b) {
    constexpr float kOne = static_cast<float>(uint32_t(1) << shift);
    // 1.5 * 2**23: the integer nearest to a * b ends up in the last bits.
    const float t = f_fma(a, b, 12582912.0f);
    const float r = f_fma(a, b, -f_add(t, -12582912.0f));
    float q = f_fma(r, 0.00132647273f * kOne, 0.00967151299f * kOne);
    q = f_fma(r, q, 0.0555073358f * kOne);
    q = f_fma(r, q, 0.240222424f * kOne);
    q = f_fma(r, q, 0.693147004f * kOne);
    return bits_float(float_bits(f_fma(r, q, kOne)) + (float_bits(t) << 23));
}

// Natural logarithm of a positive normal number, to 1e-7.
MK_HD float ln(float x) {
    const int32_t e =
        static_cast<int32_t>(float_bits(x) - 0x3F2AAAABu) >> 23;  // x / 2**e in [2/3, 4/3)
    const float s = f_add(bits_float(float_bits(x) - (static_cast<uint32_t>(e) << 23)), -1.0f);
    float q = f_fma(s, -0.15918611f, 0.171943009f);
    q = f_fma(s, q, -0.163074523f);
    q = f_fma(s, q, 0.197843462f);
    q = f_fma(s, q, -0.250143409f);
    q = f_fma(s, q, 0.333380431f);
    q = f_fma(s, q, -0.499998331f);
    // An integer below 2**22 as a float, without a conversion, which is slow on a GPU.
    const float exponent = f_add(bits_float(0x4B400000u + static_cast<uint32_t>(e)), -12582912.0f);
    return f_fma(exponent, kLn2, f_fma(f_mul(s, s), q, s));
}

// ---- a row of logits ----

// Order of logits as integers; 0 for NaN, which is thus below -inf. Adding 0 makes -0 equal to 0.
MK_HD uint32_t order_key(float x) {
    const uint32_t bits = float_bits(f_add(x, 0.0f));
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The greatest of these is the greatest logit, the lowest index where equal; 0: no number.
MK_HD uint64_t argmax_key(float x, int index) {
    const uint32_t key = order_key(x);
    return key ? uint64_t(key) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index)) : 0;
}

MK_HD float key_value(uint32_t key) {
    return bits_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

constexpr uint32_t kKeyOfMinusInf = 0x007FFFFFu, kKeyOfInf = 0xFF800000u;

constexpr uint64_t kWeightOfMax = uint64_t(1) << 31;
constexpr int kExactSums = 512;  // weights that Distribution::Parts add up without rounding

struct Distribution {
    uint64_t total;    // of the weights that are kept
    uint32_t cutoff;   // sampling: the least order key that is kept
    int32_t argmax;    // 0 without a number in the row
    bool has_max;      // the row holds a number
    bool valid;        // and no NaN nor +inf, and something above -inf: its softmax exists
    uint16_t padding;  // named, so that a copy by words reads nothing that was never written
    float max, scale;  // of a logit x: log2 of its weight is (x - max) * scale, + 31
    float lowest;      // of x - max: what is lower, or NaN, weighs nothing
    float inv_total, ln_total;  // typical: of the sum of exp(x - max)
    float bound;                // typical: a probability must be greater

    MK_HD float below_max(float x) const { return f_max(f_add(x, -max), lowest); }
    // 2**31 at the maximum; 0 from 2**-32 of it downwards, and for NaN.
    MK_HD uint32_t weight(float x) const {
        return round_unsigned(exp2_product<31>(below_max(x), scale));
    }
    // The same in two parts: `high` a multiple of 2**16 up to 2**31, `low` within 2**15 of 0. Sums
    // of kExactSums of each fit in a float's 24 bits, and a GPU adds floats, under a predicate,
    // several times as fast as 64-bit integers.
    struct Parts {
        float high, low;
    };
    MK_HD Parts weight_parts(float x) const {
        const float weight = exp2_product<31>(below_max(x), scale);
        const float high = f_add(f_add(weight, 824633720832.0f), -824633720832.0f);  // 1.5 * 2**39
        const float low = f_add(weight, -high);
        return {high, f_add(f_add(low, 12582912.0f), -12582912.0f)};  // 1.5 * 2**23
    }
    // All logits weigh the same, 2**31.
    MK_HD Distribution flat() const {
        Distribution d = *this;
        d.scale = 0.0f;
        return d;
    }
    MK_HD float log2_weight(float x) const { return f_mul(f_add(x, -max), scale); }
    MK_HD float probability(float x) const {
        const float y = log2_weight(x);
        return y >= -125.0f ? f_mul(exp2_product<0>(y, 1.0f), inv_total) : 0.0f;
    }
    MK_HD float log_probability(float x) const { return f_fma(log2_weight(x), kLn2, -ln_total); }
    // 2**31 times this logit's part of the entropy, -p ln(p + 1e-5).
    MK_HD int32_t entropy_part(float x) const {
        const float p = probability(x);
        return round_signed(f_mul(f_mul(p, -ln(f_add(p, kEntropyEpsilon))), 2147483648.0f));
    }
};

// What typical acceptance and sampling leave of a row. (A cutoff of 0 is a NaN, and cuts nothing.)
MK_HD uint32_t kept_weight(const Distribution& d, bool typical, float x) {
    const bool kept = typical ? d.probability(x) > d.bound : !(x < key_value(d.cutoff));
    const uint32_t weight = d.weight(x);  // not in a branch: these take a GPU longer
    return kept ? weight : 0;
}

struct Request {
    int32_t mode;   // greedy where the temperature is 0
    int32_t nodes;  // 0: nothing is emitted
    int32_t max_tokens, top_k;
    float scale, threshold, alpha, top_p;  // scale = log2(e) / temperature
};

MK_HD Request load_request(const AcceptArgs& a, int b) {
    Request r;
    r.nodes = a.num_nodes ? a.num_nodes[b] : a.size;
    r.nodes = r.nodes < a.size ? r.nodes : a.size;
    r.max_tokens = a.max_tokens[b];
    if (r.max_tokens <= 0 || r.nodes < 0) r.nodes = 0;
    r.mode = a.mode[b];
    const float temperature = a.temperature[b];
    r.scale = f_max(f_div(kLog2E, temperature), 1e-20f);  // so that 64 / scale is finite
    // Not a temperature, or so low that nothing but the maximum has a weight.
    if (!(temperature > 0.0f && r.scale <= 3e38f)) r.mode = kGreedy;
    if (r.mode != kTypical && (r.mode != kSampling || !a.has_seed)) r.mode = kGreedy;
    r.threshold = a.threshold[b];
    r.alpha = a.alpha[b];
    r.top_k = a.top_k[b];
    r.top_p = a.top_p[b];
    return r;
}

MK_HD Distribution start_distribution(uint64_t best, bool has_nan, float max, float scale) {
    Distribution d{};
    d.argmax = best ? static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(best)) : 0;
    d.has_max = best != 0;
    const uint32_t key = static_cast<uint32_t>(best >> 32);
    d.valid = !has_nan && key > kKeyOfMinusInf && key < kKeyOfInf;
    d.max = max;
    d.scale = scale;
    d.lowest = f_div(-64.0f, scale);
    d.total = 0;
    d.cutoff = 0;
    d.inv_total = d.ln_total = d.bound = 0.0f;
    return d;
}

MK_HD void set_total(Distribution& d, uint64_t total) {
    d.total = total;
    const float sum = f_mul(static_cast<float>(total), 4.65661287e-10f);  // 2**-31
    d.inv_total = f_div(1.0f, sum);
    d.ln_total = ln(sum);
}

MK_HD void set_bound(Distribution& d, const Request& r, int64_t entropy) {
    const float h = f_mul(static_cast<float>(entropy), 4.65661287e-10f);
    const float typical = f_mul(r.alpha, exp2_product<0>(h, -kLog2E));
    d.bound = r.threshold < typical ? r.threshold : typical;
}

// Of typical acceptance's bound without the exact entropy: within low .. high it may lie.
struct BoundRange {
    float low, high;
};

// From the entropy without the paper's epsilon, which makes it smaller, by ln(1 + vocab * epsilon)
// at most (Jensen's inequality). mean: of -log2 of the weights' 2**-31ths, each counted by its
// weight; it and what rounds the exact one leave them 1e-4 and 2**-30 a logit apart at most.
MK_HD BoundRange bound_range(const Distribution& d, const Request& r, float mean, int vocab) {
    const float size = static_cast<float>(vocab);
    const float slack = 1e-4f + size * 9.3132257e-10f;
    const float least = r.alpha * exp2_product<0>(d.ln_total * -kLog2E - mean, 1.0f);
    const float low = least * (1.0f - slack);
    const float high = least * (1.0f + slack) * (1.0f + size * kEntropyEpsilon);
    return {low, r.threshold < high ? r.threshold : high};
}

// What the tokens above top-p's cutoff must weigh less than.
MK_HD uint64_t top_p_limit(float top_p, uint64_t total) {
    const double limit = ceil(static_cast<double>(top_p) * static_cast<double>(total));
    return limit >= 1.0 ? static_cast<uint64_t>(limit) : 1;
}

constexpr int kPivots = 8;
constexpr int kRoundsByValue = 4;

// Looks for a cutoff: the least key for which what lies above it measures less than `limit`. Each
// round measures what lies above each of kPivots keys. Where these are is a guess, which may cost
// rounds but does not change the cutoff. Keys are without their last `drop` bits here, in which
// those of 16-bit logits do not differ.
struct CutoffSearch {
    uint64_t limit;        // 0: a part of everything, which the first round measures
    uint32_t first, last;  // the cutoff is one of these; nothing is above the first `last`
    int drop;
    int round;
    uint64_t kept, above;  // what is from `first` on, and above `last`, measures
    bool by_value;         // how the pivots are spaced, by value or by key:
    float highest, step;   // the last one, and from each to the next

    MK_HD void place_pivots(const Distribution& d, int vocab) {
        const float bottom = key_value(first << drop), top = key_value((last + 1) << drop);
        const float width = top - bottom;
        if (++round == 0) {
            // A whole vocabulary of logits that weigh 2**-5 / vocab of the maximum is a 32nd of it:
            // few nuclei end below that.
            const int log2 = static_cast<int>(float_bits(static_cast<float>(vocab)) >> 23) - 127;
            const float range = quotient(static_cast<float>(log2 + 5), d.scale);
            by_value = true;
            step = (range < width ? range : width) * (1.0f / (kPivots - 2));
            highest = d.max;
            return;
        }
        // Logits are spread more evenly than their keys, of which half are below 1; but near 0, or
        // among many equal ones, only dividing the keys comes to an end soon.
        by_value = round < kRoundsByValue && width > 0.0f && width < INFINITY;
        // The cutoff is near where a straight line between both ends' measures meets the limit: off
        // by an eighth of the width's square, in e-folds of weight, if the slope changes by a
        // factor of e in each. Half of the pivots' range is a little more than that.
        const float share =
            quotient(static_cast<float>(limit - above), static_cast<float>(kept - above));
        const float apart = width * d.scale * (0.25f / kPivots);
        constexpr float kLeast = 0.02f, kMost = 1.0f / (kPivots + 1);
        step = width * (apart < kLeast ? kLeast : apart < kMost ? apart : kMost);
        highest = top - share * width + step * (0.5f * (kPivots - 1));
        highest = highest < top - step ? highest : top - step;
        highest = highest > bottom + step * kPivots ? highest : bottom + step * kPivots;
    }
    MK_HD uint32_t key_at(int i) const {
        return order_key(highest - step * static_cast<float>(kPivots - 1 - i)) >> drop;
    }
    // In increasing order; the first round's first one has everything above it, and its last one
    // only the maximum.
    MK_HD uint32_t pivot(int i) const {
        if (round == 0 && i == 0) return first - 1;
        uint32_t key = first + (i + 1) * ((last - first + kPivots) / (kPivots + 1)) - 1;
        if (by_value) {
            const uint32_t beside = key_at(kPivots / 2) + i - kPivots / 2;  // at least a key apart
            key = key_at(i);
            if (i < kPivots / 2 ? key > beside : key < beside) key = beside;
        }
        key = key > first ? key : first;
        return key < last ? key : last - 1;
    }
    // The least logit above a pivot.
    MK_HD float bound(uint32_t pivot) const { return key_value((pivot + 1) << drop); }

    // What is above a pivot measures so much: the limit at least, or less.
    MK_HD void set_first(uint32_t pivot, uint64_t measure) {
        first = pivot + 1;
        kept = measure;
    }
    MK_HD void set_last(uint32_t pivot, uint64_t measure) {
        last = pivot;
        above = measure;
    }
};

// Among what has a weight and is not below key `low`. `limit` 0: top-p's, as yet unknown.
MK_HD CutoffSearch start_search(const Distribution& d, uint32_t low, uint64_t limit, int drop) {
    const uint32_t least = order_key(f_add(d.max, f_div(-34.0f, d.scale)));
    CutoffSearch search{};
    search.round = -1;
    search.limit = limit;
    search.last = order_key(d.max) >> drop;
    search.first = (low > least ? low : least) >> drop;
    // The maximum alone reaches it: one round, of what is near the maximum, counts its equals.
    if (limit > 0 && limit <= kWeightOfMax) search.first = search.last - 1;
    search.drop = drop;
    return search;
}

// ---- draws ----

struct Draws {
    uint64_t child, next;  // which child, if any, is taken; what comes after the path's end
};

// Philox4x32-10 (Salmon et al., 2011): a pure function of the seed, its offset, the request and the
// node.
MK_HD Draws philox(uint64_t seed, uint64_t offset, uint32_t request, uint32_t node) {
    uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32),
             c2 = request, c3 = node;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {uint64_t(c1) << 32 | c0, uint64_t(c3) << 32 | c2};
}

// ---- the tree ----

MK_HD int lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __ffs(static_cast<int>(word)) - 1;
#else
    return __builtin_ctz(word);
#endif
}

// The first node >= from of a set, kMaxTreeNodes if there is none.
MK_HD int next_node(const uint32_t* words, int from) {
    int w = from >> 5;
    if (w >= kNodeWords) return kMaxTreeNodes;
    uint32_t word = words[w] & (0xFFFFFFFFu << (from & 31));
    MK_ROLLED
    while (word == 0) {
        if (++w == kNodeWords) return kMaxTreeNodes;
        word = words[w];
    }
    return w * 32 + lowest_bit(word);
}

MK_HD bool in_vocab(int64_t token, int vocab) { return token >= 0 && token < vocab; }

// Sampling: children in order of their index take intervals of their weights; which of them, if
// any, holds the draw. weights[c]: 0 where a sibling before it has the same token. Sets `taken`,
// the weight of all of them.
MK_HD int pick_child(const uint32_t* kids, const uint32_t* weights, int nodes, uint64_t draw,
                     uint64_t* taken) {
    uint64_t sum = 0;
    MK_ROLLED
    for (int w = 0; w * 32 < nodes; ++w) {
        MK_ROLLED
        for (uint32_t rest = kids[w]; rest; rest &= rest - 1) {
            const int c = w * 32 + lowest_bit(rest);
            sum += weights[c];
            if (draw < sum) return c;
        }
    }
    *taken = sum;
    return -1;
}

// Greedy and typical: whether the path to node `a` goes before the one to `b`, both accepted.
// Longest first; typical: then the highest sum of log p, then the lowest end; greedy: then the
// lower node where they part.
MK_HD bool is_better_end(bool typical, const int32_t* parents, const int32_t* depth,
                         const float* score, int a, int b) {
    if (depth[a] != depth[b]) return depth[a] > depth[b];
    if (typical) return score[a] != score[b] ? score[a] > score[b] : a < b;
    int x = a, y = b;
    MK_ROLLED
    while (x != y && parents[x] != parents[y]) {
        x = parents[x];
        y = parents[y];
    }
    return x < y;
}

MK_HD bool is_eos(const AcceptArgs& a, int64_t token) {
    MK_ROLLED
    for (int i = 0; i < a.num_eos; ++i) {
        if ((a.eos ? a.eos[i] : a.eos_value[i]) == token) return true;
    }
    return false;
}

// The path to `end`, cut after its first end token and to max_tokens. Returns its nodes, 1 at
// least.
MK_HD int cut_path(const AcceptArgs& a, const Request& r, const int32_t* parents,
                   const int64_t* tokens, int end, int depth, int32_t* path, bool* finished) {
    for (int i = depth, node = end; i >= 0; --i, node = parents[node]) path[i] = node;
    int length = depth + 1 < r.max_tokens ? depth + 1 : r.max_tokens;
    *finished = length == r.max_tokens;
    if (a.num_eos > 0) {
        for (int i = 0; i < length; ++i) {
            if (is_eos(a, tokens[path[i]])) {
                length = i + 1;
                *finished = true;
            }
        }
    }
    return length;
}

template <typename scalar_t>
constexpr int kDropBits = 0;  // low bits of an order key in which no two logits differ

// ---- the C++ kernel: one request, serially ----

#if !defined(__CUDACC__)

struct bf16_t {
    uint16_t bits;
};
struct fp16_t {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16_t x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return bits_float(sign | 0x7F800000u | rest << 13);
    const float magnitude =
        bits_float(rest << 13) * 5.19229686e33f;  // 2**112: subnormal numbers come out right, too
    return bits_float(sign | float_bits(magnitude));
}

template <>
inline constexpr int kDropBits<bf16_t> = 16;
template <>
inline constexpr int kDropBits<fp16_t> = 13;

// measure(bounds, sums) adds what is at least each of kPivots logits.
template <typename Measure>
CutoffSearch find_cutoff(CutoffSearch search, const Distribution& d, int vocab, float top_p,
                         Measure&& measure) {
    do {
        search.place_pivots(d, vocab);
        uint32_t pivots[kPivots];
        float bounds[kPivots];
        uint64_t sums[kPivots] = {};
        for (int i = 0; i < kPivots; ++i) {
            pivots[i] = search.pivot(i);
            bounds[i] = search.bound(pivots[i]);
        }
        measure(bounds, sums);
        if (search.limit == 0) search.limit = top_p_limit(top_p, sums[0]);
        int reached = 0;
        while (reached < kPivots && sums[reached] >= search.limit) ++reached;
        if (reached > 0) search.set_first(pivots[reached - 1], sums[reached - 1]);
        if (reached < kPivots) search.set_last(pivots[reached], sums[reached]);
    } while (search.first < search.last);
    return search;
}

template <typename scalar_t>
class SerialAcceptance {
 public:
    SerialAcceptance(const AcceptArgs& args, int b, uint64_t seed, uint64_t offset)
        : a_(args),
          b_(b),
          seed_(seed),
          offset_(offset),
          r_(load_request(args, b)),
          tokens_(args.tokens + b * args.tokens_stride_b),
          parents_(r_.nodes) {
        // No value may lead out of the tree: a pointer that is not topological is clamped.
        for (int i = 0; i < r_.nodes; ++i) {
            const int parent = args.parents[b * args.parents_stride_b + i];
            parents_[i] = i == 0 ? -1 : parent < 0 ? 0 : parent < i ? parent : i - 1;
        }
    }

    void run() {
        if (r_.nodes == 0) {
            emit(0, nullptr, true, -1);
            return;
        }
        const bool sampling = r_.mode == kSampling;
        uint32_t removed[kNodeWords] =
            {};  // children whose tokens the last node's distribution has lost
        uint64_t taken = 0;
        Distribution d{};
        int end = 0, depth = 0;
        if (sampling) {
            end = sample(removed, &taken, &d, &depth);
        } else {
            end = longest(&depth);
        }
        int32_t path[kMaxTreeNodes];
        bool finished;
        const int length = cut_path(a_, r_, parents_.data(), tokens_, end, depth, path, &finished);
        emit(length, path, finished, finished ? -1 : draw_next(end, d, removed, taken));
    }

 private:
    const scalar_t* row(int node) const {
        return static_cast<const scalar_t*>(a_.logits) + b_ * a_.logits_stride_b +
               node * a_.logits_stride_t;
    }

    Distribution measure(int node, int mode) const {
        const scalar_t* x = row(node);
        uint64_t best = 0;
        bool has_nan = false;
        for (int i = 0; i < a_.vocab; ++i) {
            const uint64_t key = argmax_key(to_float(x[i]), i);
            has_nan |= key == 0;
            best = key > best ? key : best;
        }
        Distribution d = start_distribution(best, has_nan,
                                            key_value(static_cast<uint32_t>(best >> 32)), r_.scale);
        if (!d.valid || mode == kGreedy) return d;
        const auto total = [&] {
            uint64_t sum = 0;
            for (int i = 0; i < a_.vocab; ++i) sum += kept_weight(d, false, to_float(x[i]));
            return sum;
        };
        if (mode == kTypical) {
            set_total(d, total());
            int64_t entropy = 0;
            for (int i = 0; i < a_.vocab; ++i) entropy += d.entropy_part(to_float(x[i]));
            set_bound(d, r_, entropy);
            return d;
        }
        const auto cut = [&](int top_k) {
            const Distribution counts = top_k > 0 ? d.flat() : d;
            const CutoffSearch search =
                find_cutoff(start_search(d, d.cutoff, top_k * kWeightOfMax, kDropBits<scalar_t>), d,
                            a_.vocab, r_.top_p, [&](const float* bounds, uint64_t* sums) {
                                for (int i = 0; i < a_.vocab; ++i) {
                                    const float v = to_float(x[i]);
                                    const uint32_t weight = counts.weight(v);
                                    for (int j = 0; j < kPivots; ++j)
                                        sums[j] += v >= bounds[j] ? weight : 0;
                                }
                            });
            d.cutoff = search.first << search.drop;
            return search.kept;
        };
        if (r_.top_k > 0 && r_.top_k < a_.vocab) cut(r_.top_k);
        d.total = r_.top_p < 1.0f ? cut(0) : total();
        return d;
    }

    // Greedy, typical: the end of the best accepted path.
    int longest(int* end_depth) const {
        uint32_t accepted[kNodeWords] = {1};
        std::vector<int32_t> depth(r_.nodes, 0);
        std::vector<float> score(r_.nodes, 0.0f);
        int best = 0;
        for (int node = 0; node < r_.nodes; node = next_node(accepted, node + 1)) {
            if (is_better_end(r_.mode == kTypical, parents_.data(), depth.data(), score.data(),
                              node, best))
                best = node;
            bool measured = false;
            Distribution d{};
            for (int c = node + 1; c < r_.nodes && depth[node] < a_.max_depth; ++c) {
                if (parents_[c] != node || !in_vocab(tokens_[c], a_.vocab)) continue;
                if (!measured) d = measure(node, r_.mode);
                measured = true;
                if (r_.mode == kTypical) {
                    const float x = to_float(row(node)[tokens_[c]]);
                    if (!d.valid || !(d.probability(x) > d.bound)) continue;
                    score[c] = f_add(score[node], d.log_probability(x));
                } else if (!d.has_max || tokens_[c] != d.argmax) {
                    continue;
                }
                depth[c] = depth[node] + 1;
                accepted[c >> 5] |= 1u << (c & 31);
            }
        }
        *end_depth = depth[best];
        return best;
    }

    int sample(uint32_t* removed, uint64_t* taken, Distribution* d, int* depth) const {
        std::vector<uint32_t> weights(r_.nodes);
        for (int node = 0;; ++*depth) {
            *d = measure(node, kSampling);
            uint32_t kids[kNodeWords] = {};
            for (int c = node + 1; c < r_.nodes && *depth < a_.max_depth && d->valid; ++c) {
                if (parents_[c] != node) continue;
                bool again = !in_vocab(tokens_[c], a_.vocab);
                for (int s = next_node(kids, 0); s < c && !again; s = next_node(kids, s + 1))
                    again = tokens_[s] == tokens_[c];
                weights[c] = again ? 0 : kept_weight(*d, false, to_float(row(node)[tokens_[c]]));
                kids[c >> 5] |= 1u << (c & 31);
            }
            const uint64_t draw = mul_high(philox(seed_, offset_, b_, node).child, d->total);
            const int child = pick_child(kids, weights.data(), r_.nodes, draw, taken);
            if (child < 0) {
                std::memcpy(removed, kids, sizeof kids);
                return node;
            }
            node = child;
        }
    }

    int64_t draw_next(int node, Distribution d, const uint32_t* removed, uint64_t taken) const {
        const bool typical = r_.mode == kTypical;
        const bool draws = r_.mode == kSampling || (typical && a_.has_seed);
        if (r_.mode != kSampling) d = measure(node, draws ? r_.mode : kGreedy);
        if (!draws || !d.valid) return d.argmax;
        const auto weight = [&](int i) -> uint64_t {
            for (int c = next_node(removed, 0); c < kMaxTreeNodes; c = next_node(removed, c + 1)) {
                if (tokens_[c] == i) return 0;
            }
            return kept_weight(d, typical, to_float(row(node)[i]));
        };
        uint64_t total = 0;
        for (int i = 0; i < a_.vocab; ++i) total += typical ? weight(i) : 0;
        if (!typical) total = d.total - taken;
        if (total == 0) return d.argmax;
        uint64_t draw = mul_high(philox(seed_, offset_, b_, node).next, total);
        for (int i = 0; i < a_.vocab; ++i) {
            const uint64_t w = weight(i);
            if (draw < w) return i;
            draw -= w;
        }
        return d.argmax;  // not reached: draw < total
    }

    void emit(int length, const int32_t* path, bool finished, int64_t next) const {
        const int columns = a_.max_depth + 1;
        for (int i = 0; i < columns; ++i) {
            a_.path[int64_t(b_) * columns + i] = i < length ? path[i] : -1;
            a_.out_tokens[int64_t(b_) * columns + i] = i < length ? tokens_[path[i]] : -1;
        }
        a_.accept_length[b_] = length - 1;
        a_.last_node[b_] = length > 0 ? path[length - 1] : -1;
        a_.next_token[b_] = next;
        a_.finished[b_] = finished;
    }

    const AcceptArgs& a_;
    int b_;
    uint64_t seed_, offset_;
    Request r_;
    const int64_t* tokens_;
    std::vector<int32_t> parents_;
};

#endif

}  // namespace medusa_kernels
