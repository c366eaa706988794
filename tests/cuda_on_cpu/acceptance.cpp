// The CUDA kernel of accept_candidates, run thread by thread on the CPU, against the serial C++
// one: random trees, rows and options, in every form in which the kernel is launched.
#include "acceptance_kernel.h"
#include "cuda_on_cpu.h"

using namespace medusa_kernels;

namespace {

std::mt19937 rng(1);
int pick(int low, int high) { return low + static_cast<int>(rng() % (high - low + 1)); }
bool chance(int percent) { return pick(1, 100) <= percent; }

// Which of the kernel's paths the cases went through, from what they ended in.
int num_cases = 0, num_deep = 0, num_drawn = 0, num_close = 0;

struct Launch {
    int width, groups;      // blocks that share a row, and groups of them
    bool clustered = true;  // else each works by itself
    bool ahead = false;     // a group has a node of a likely path
};

const gpu::AcceptParams* params;
template <typename scalar_t, bool kKeeps, bool kGreedyOnly>
void kernel(char* shared) {
    auto* row = reinterpret_cast<uint4*>(shared + (sizeof(gpu::Shared) + 63) / 64 * 64);
    gpu::Accept<scalar_t, kKeeps, kGreedyOnly> accept(*params,
                                                      *reinterpret_cast<gpu::Shared*>(shared), row);
    accept.run();
}

template <typename scalar_t, bool kKeeps>
void launch(gpu::AcceptParams p, const Launch& x) {
    params = &p;
    const int vectors = p.a.vocab * static_cast<int>(sizeof(scalar_t)) / 16 + 2;
    const int units = x.width * gpu::kWarps;
    p.each = (vectors + units - 1) / units;
    const size_t row_bytes = kKeeps ? size_t(p.each) * gpu::kWarps * 16 : 0;
    const bool greedy = p.a.mode.value == kGreedy && chance(50);
    cuda_on_cpu::grid = {x.width, x.groups, p.a.batch};
    // In random order, but a request's last group, which waits for the others, after them.
    std::vector<int> order = cuda_on_cpu::shuffled(x.groups * p.a.batch);
    std::stable_partition(order.begin(), order.end(),
                          [&](int group) { return (group + 1) % x.groups != 0; });
    for (const int group : order) {
        std::vector<int> blocks(x.width);
        std::iota(blocks.begin(), blocks.end(), group * x.width);
        const auto run = [&](const std::vector<int>& which) {
            cuda_on_cpu::run_blocks(
                greedy ? kernel<scalar_t, kKeeps, true> : kernel<scalar_t, kKeeps, false>, which,
                gpu::kThreads, (sizeof(gpu::Shared) + 63) / 64 * 64 + row_bytes);
        };
        if (x.clustered) {
            run(blocks);
        } else {  // the first, which waits, last
            for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) run({*block});
        }
    }
}

template <typename host_t>
host_t make(float x) {
    if constexpr (sizeof(host_t) == 4) {
        return x;
    } else if constexpr (std::is_same_v<host_t, bf16_t>) {
        return {static_cast<uint16_t>(float_bits(x) >> 16)};
    } else {
        const _Float16 half = static_cast<_Float16>(x);
        host_t result;
        std::memcpy(&result, &half, sizeof result);
        return result;
    }
}

template <typename scalar_t, typename host_t, bool kKeeps>
void run_case(int mode, const Launch& x) {
    // A row of which a thread has many logits, or more than it may sum up at once.
    const bool is_long = mode == kSampling && x.width * x.groups == 1;
    const int batch = chance(25) ? 2 : 1;
    const int size = is_long ? 2 : chance(10) ? pick(64, 70) : pick(1, 14);
    const int vocab = is_long      ? gpu::kThreads * (kKeeps ? 32 : kExactSums) + pick(1, 9999)
                      : chance(30) ? pick(1, 40)
                                   : pick(100, 3000);
    const int stride = vocab + pick(0, 5);
    const int64_t skew = pick(0, 7);

    std::vector<int32_t> parents(size, -1), depths(size, 0);
    const bool slim = chance(40);
    for (int i = 1; i < size; ++i) {
        parents[i] = slim ? std::max(0, i - pick(1, 3)) : pick(0, i - 1);
        depths[i] = depths[parents[i]] + 1;
    }
    const int deepest = *std::max_element(depths.begin(), depths.end());

    const float spread = chance(30) ? 0.0f : chance(50) ? 1.0f : 4.0f;
    std::normal_distribution<float> normal(chance(50) ? 0.0f : 7.0f, 1.0f);
    std::vector<host_t> logits(skew + int64_t(batch) * size * stride);
    for (host_t& logit : logits) logit = make<host_t>(chance(1) ? -INFINITY : spread * normal(rng));
    const auto row = [&](int b, int node) {
        return logits.data() + skew + (int64_t(b) * size + node) * stride;
    };
    for (int b = 0; b < batch; ++b) {
        for (int node = 0; node < size; ++node) {
            if (chance(30)) row(b, node)[pick(0, vocab - 1)] = make<host_t>(6.0f * spread + 7.0f);
            if (chance(3)) row(b, node)[pick(0, vocab - 1)] = make<host_t>(NAN);
            if (chance(2)) row(b, node)[pick(0, vocab - 1)] = make<host_t>(INFINITY);
            if (chance(3)) std::fill_n(row(b, node), vocab, make<host_t>(-INFINITY));
        }
    }

    // Mostly a parent's likeliest tokens, so that paths grow; siblings with the same one.
    std::vector<int64_t> tokens(batch * size);
    for (int b = 0; b < batch; ++b) {
        for (int i = 0; i < size; ++i) {
            const host_t* above = row(b, std::max(parents[i], 0));
            int64_t token = pick(0, vocab - 1);
            for (int tries = chance(80) ? vocab : pick(0, 8); tries > 0; --tries) {
                const int other = (token + tries) % vocab;
                if (to_float(above[other]) > to_float(above[token])) token = other;
            }
            tokens[b * size + i] = chance(3) ? vocab + 3 : chance(3) ? -1 : token;
        }
    }

    AcceptArgs a{};
    a.logits = logits.data() + skew;
    a.logits_stride_b = int64_t(size) * stride;
    a.logits_stride_t = stride;
    a.tokens = tokens.data();
    a.tokens_stride_b = size;
    a.parents = parents.data();
    std::vector<int32_t> num_nodes(batch);
    for (int32_t& nodes : num_nodes) nodes = chance(80) ? size : pick(0, size);
    a.num_nodes = chance(50) ? num_nodes.data() : nullptr;
    a.batch = batch;
    a.size = size;
    a.vocab = vocab;
    a.max_depth = chance(80) ? deepest : pick(0, deepest);
    a.mode.value = static_cast<int8_t>(mode);
    a.temperature.value = chance(5) ? 0.0f : chance(50) ? 1.0f : 0.7f;
    a.threshold.value = chance(30) ? 0.0f : 0.09f;
    a.alpha.value = 0.3f;
    a.top_k.value = chance(70) ? 0 : pick(1, 60);
    a.top_p.value = chance(30) ? 1.0f : chance(50) ? 0.9f : 0.3f;
    a.max_tokens.value = chance(80) ? 1 << 30 : pick(0, 3);
    a.num_eos = chance(70) ? 0 : 1;
    a.eos_value[0] = tokens[pick(0, size - 1)];
    a.has_seed = mode == kSampling || chance(50);
    a.seed = static_cast<int64_t>(rng());
    const uint64_t offset = chance(50) || x.width > 1 ? 5 : 0;

    if (mode == kTypical && size > 1 && chance(75)) {
        // Alpha so that the bound lies at a child's probability, where only the exact entropy
        // tells.
        const int c = pick(1, size - 1), token = static_cast<int>(tokens[c]);
        const host_t* above = row(0, parents[c]);
        double total = 0, entropy = 0;
        const float scale = 1 / std::max(a.temperature.value, 0.1f);
        float most = -INFINITY;
        for (int i = 0; i < vocab; ++i) most = std::max(most, to_float(above[i]));
        const auto p = [&](int i) { return std::exp((to_float(above[i]) - most) * scale); };
        for (int i = 0; i < vocab; ++i) total += p(i);
        for (int i = 0; i < vocab; ++i)
            entropy -= p(i) / total * std::log(p(i) / total + kEntropyEpsilon);
        if (in_vocab(token, vocab) && std::isfinite(entropy)) {
            const double factor = 1 + (pick(-10, 10) * 1e-3) * std::min(1.0, vocab * 1e-5);
            a.alpha.value = static_cast<float>(p(token) / total * std::exp(entropy) * factor);
            a.threshold.value = 1.0f;
            ++num_close;
        }
    }

    const int columns = a.max_depth + 1;
    struct Results {
        std::vector<int32_t> ints;
        std::vector<int64_t> longs;
        bool finished[2];
    } results[2];
    for (Results& r : results) {
        r.ints.assign(batch * (2 + columns), -7);
        r.longs.assign(batch * (1 + columns), -7);
    }
    const auto put_into = [&](Results& r) {
        a.accept_length = r.ints.data();
        a.last_node = r.ints.data() + batch;
        a.path = r.ints.data() + 2 * batch;
        a.next_token = r.longs.data();
        a.out_tokens = r.longs.data() + batch;
        a.finished = r.finished;
    };
    put_into(results[0]);
    for (int b = 0; b < batch; ++b) SerialAcceptance<host_t>(a, b, a.seed, offset).run();

    put_into(results[1]);
    uint64_t generator[2] = {static_cast<uint64_t>(a.seed), offset};
    if (offset) a.generator = generator;
    launch<scalar_t, kKeeps>({x.clustered ? x.width : 1, pick(0, 9), 0, x.ahead, a}, x);

    bool same = results[0].ints == results[1].ints && results[0].longs == results[1].longs;
    for (int b = 0; b < batch; ++b) same &= results[0].finished[b] == results[1].finished[b];
    same &= !offset || generator[1] == offset + 1;
    for (int i = 0; i < 1000; ++i) same &= gpu::accept_mail[i] == 0;
    if (!same) {
        std::printf(
            "case %d differs: mode %d, %d blocks%s x %d, %zu-byte logits, batch %d, %d nodes, "
            "vocabulary %d, depth %d\n",
            num_cases, mode, x.width, x.clustered ? "" : " apart", x.groups, sizeof(host_t), batch,
            size, vocab, a.max_depth);
        for (int b = 0; b < batch; ++b) {
            for (const Results& r : results)
                std::printf("  accept_length %d, last_node %d, next_token %ld, finished %d\n",
                            r.ints[b], r.ints[batch + b], static_cast<long>(r.longs[b]),
                            r.finished[b]);
        }
        std::exit(1);
    }
    ++num_cases;
    num_deep += results[0].ints[0] >= 3;
    num_drawn += a.has_seed && mode != kGreedy && !results[0].finished[0];
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
    for (int mode : {kTypical, kSampling, kGreedy}) {
        for (int round = 0; round < rounds; ++round) {
            // A walk, alone and with nodes ahead, and all nodes at once with one and with several
            // rows a cluster.
            for (const Launch& x :
                 {Launch{1, 1}, Launch{1, 3}, Launch{1, 80}, Launch{2, 1}, Launch{2, 4},
                  Launch{4, 1}, Launch{2, 80, false}, Launch{1, 2, true, true},
                  Launch{2, 4, true, true}, Launch{1, 7, true, true}}) {
                if (!x.clustered && mode != kGreedy) continue;
                if (x.ahead && mode != kSampling) continue;
                run_case<__nv_bfloat16, bf16_t, true>(mode, x);
                if (round % 3 == 0) run_case<__half, fp16_t, true>(mode, x);
                if (round % 3 == 1) run_case<float, float, true>(mode, x);
                if (round % 3 == 2) run_case<__nv_bfloat16, bf16_t, false>(mode, x);
            }
        }
    }
    std::printf("%d cases: %d with long paths, %d with a draw, %d near typical's bound\n",
                num_cases, num_deep, num_drawn, num_close);
    const bool covered =
        num_deep * 20 > num_cases && num_drawn * 10 > num_cases && num_close * 20 > num_cases;
    return covered ? 0 : 3;
}
