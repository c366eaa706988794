// accept_candidates on the GPU, one launch. A cluster of blocks (one block before sm_90) shares a
// row of logits, so that what a reduction over the vocabulary costs is a few reads of L1 and of the
// neighbours' shared memory.
//
// For few requests, clusters first measure the rows of all inner nodes of greedy and typical
// requests in parallel, and the last one to arrive walks the tree. For many requests, and for
// sampling, one cluster a request measures only the rows that its walk comes to. Leaves are never
// measured, except for the token after the path's end.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "acceptance_args.h"
#include "arrivals.h"

namespace medusa_kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxCluster = 8;  // portable
constexpr int kColdLoads = 4;   // 16-byte loads in flight a thread while a row comes from memory
static_assert(kThreads >= kMaxTreeNodes, "a thread has at most one node");

// Clusters of a request that have measured their rows; 0 between launches. Two halves: eager
// launches, captured ones.
__device__ uint32_t accept_arrivals[2 * kArrivals];

struct AcceptParams {
    AcceptArgs a;
    Distribution* measured;  // [batch, size] where there are several groups of blocks a request
    int32_t first_arrival;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename scalar_t>
constexpr int kDropBits = 0;  // low bits of an order key in which no two logits differ
template <>
inline constexpr int kDropBits<__nv_bfloat16> = 16;
template <>
inline constexpr int kDropBits<__half> = 13;

struct Shared {
    Distribution dist[kMaxTreeNodes];  // of measured nodes
    int64_t tokens[kMaxTreeNodes];
    uint64_t partial[kWarps][kPivots];
    uint64_t block[2][kPivots];  // what other blocks of the cluster read, in turns
    uint64_t units[kWarps];      // weight of each warp's part of a row
    uint64_t draw, offset;
    int64_t next;
    int32_t parents[kMaxTreeNodes], depth[kMaxTreeNodes], path[kMaxTreeNodes];
    float score[kMaxTreeNodes];
    uint32_t weights[kMaxTreeNodes];
    uint32_t inner[kNodeWords], accepted[kNodeWords], kids[kNodeWords], measured[kNodeWords];
    int32_t picked, length, unit;
    uint32_t last;
    bool finished;
};

// The blocks that share a row.
struct Cluster {
    __device__ static int rank() {
#if __CUDA_ARCH__ >= 900
        return cg::this_cluster().block_rank();
#else
        return 0;
#endif
    }
    __device__ static int blocks() {
#if __CUDA_ARCH__ >= 900
        return cg::this_cluster().num_blocks();
#else
        return 1;
#endif
    }
    __device__ static void sync() {
#if __CUDA_ARCH__ >= 900
        cg::this_cluster().sync();
#else
        __syncthreads();
#endif
    }
    template <typename T>
    __device__ static T* of(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
        return cg::this_cluster().map_shared_rank(shared, rank);
#else
        return shared;
#endif
    }
};

__device__ __forceinline__ uint64_t warp_shuffle_xor(uint64_t x, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(x), mask);
}

struct Sum {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Max {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

template <typename scalar_t>
struct Accept {
    static constexpr int kVector = 16 / sizeof(scalar_t);

    const AcceptParams& p;
    Shared& s;
    const int b, warp, lane, rank, blocks;
    Request r;
    int turn = 0;  // of s.block

    __device__ Accept(const AcceptParams& params, Shared& shared)
        : p(params),
          s(shared),
          b(blockIdx.z),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          rank(Cluster::rank()),
          blocks(Cluster::blocks()) {}

    __device__ const scalar_t* row(int node) const {
        return static_cast<const scalar_t*>(p.a.logits) + b * p.a.logits_stride_b +
               node * p.a.logits_stride_t;
    }

    // A row as 16-byte vectors from the aligned address at or before its start; each warp of the
    // cluster, a "unit", has a contiguous range of them.
    struct Span {
        const uint4* vectors;
        int skew, each, begin, end;
    };
    __device__ Span span(const scalar_t* row) const {
        Span x;
        x.skew = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(scalar_t));
        x.vectors = reinterpret_cast<const uint4*>(row - x.skew);
        const int count = (x.skew + p.a.vocab + kVector - 1) / kVector, units = blocks * kWarps;
        x.each = (count + units - 1) / units;
        x.begin = min((rank * kWarps + warp) * x.each, count);
        x.end = min(x.begin + x.each, count);
        return x;
    }
    // Vector v; what of it is outside the row is not read.
    __device__ uint4 load(const Span& x, int v) const {
        const int first = v * kVector - x.skew;
        if (first >= 0 && first + kVector <= p.a.vocab) return __ldg(x.vectors + v);
        uint4 raw{};
        const scalar_t* from = reinterpret_cast<const scalar_t*>(x.vectors + v);
        uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            if (static_cast<unsigned>(first + e) < static_cast<unsigned>(p.a.vocab)) {
                if constexpr (sizeof(scalar_t) == 4) {
                    words[e] = __float_as_uint(from[e]);
                } else {
                    words[e / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(from)[e])
                                    << (e % 2 * 16);
                }
            }
        }
        raw.x = words[0], raw.y = words[1], raw.z = words[2], raw.w = words[3];
        return raw;
    }
    __device__ static float element(const uint4& raw, int e) {
        const uint32_t word = sizeof(scalar_t) == 4 ? (&raw.x)[e] : (&raw.x)[e / 2];
        if constexpr (sizeof(scalar_t) == 4) {
            return __uint_as_float(word);
        } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
            return __uint_as_float(e % 2 ? word & 0xFFFF0000u : word << 16);
        } else {
            return __half2float(
                __ushort_as_half(static_cast<unsigned short>(e % 2 ? word >> 16 : word)));
        }
    }
    template <int kLoads = 1, typename F>
    __device__ void for_each(const Span& x, F&& f) const {
#pragma unroll 1
        for (int v = x.begin + lane; v < x.end; v += 32 * kLoads) {
            uint4 raw[kLoads];
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                if (v + 32 * i < x.end) raw[i] = load(x, v + 32 * i);
            }
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                if (v + 32 * i >= x.end) break;
                const int first = (v + 32 * i) * kVector - x.skew;
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    if (static_cast<unsigned>(first + e) < static_cast<unsigned>(p.a.vocab))
                        f(first + e, element(raw[i], e));
                }
            }
        }
    }

    // Of all threads of the cluster, to all of them.
    template <int kValues, typename Op>
    __device__ void all_reduce(uint64_t* values, Op op) {
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
            for (int mask = 16; mask > 0; mask /= 2)
                values[k] = op(values[k], warp_shuffle_xor(values[k], mask));
            if (lane == 0) s.partial[warp][k] = values[k];
        }
        __syncthreads();
        if (warp < kValues) {
            uint64_t value = lane < kWarps ? s.partial[lane][warp] : 0;
            for (int mask = 16; mask > 0; mask /= 2)
                value = op(value, warp_shuffle_xor(value, mask));
            if (lane == 0) s.block[turn][warp] = value;
        }
        Cluster::sync();
        const uint64_t* others = Cluster::of(&s.block[turn][0], lane % blocks);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
            uint64_t value = lane < blocks ? others[k] : 0;
            for (int mask = kMaxCluster / 2; mask > 0; mask /= 2)
                value = op(value, warp_shuffle_xor(value, mask));
            values[k] = __shfl_sync(0xFFFFFFFFu, static_cast<unsigned long long>(value), 0);
        }
        turn ^= 1;  // a block is at most one reduction ahead of another
    }

    // What `mode` needs to know of a row. Called by the whole cluster, from one place: it is most
    // of the code.
    __device__ Distribution measure(int node, int mode) {
        const Span x = span(row(node));
        uint64_t best[2] = {0, 0};  // greatest argmax_key; whether there is a NaN
        for_each<kColdLoads>(x, [&](int i, float v) {
            const uint64_t key = argmax_key(v, i);
            best[1] |= key == 0;
            best[0] = key > best[0] ? key : best[0];
        });
        all_reduce<2>(best, Max());
        const uint32_t top = static_cast<uint32_t>(best[0] >> 32);
        Distribution d = start_distribution(best[0], best[1] != 0, key_value(top), r.scale);
        if (!d.valid || mode == kGreedy) return d;
        constexpr int kDrop = kDropBits<scalar_t>;
#pragma unroll 1
        for (int step = 0; step < 2; ++step) {  // top-k, then top-p of what it leaves
            const bool by_count = step == 0;
            const bool cuts = mode == kSampling &&
                              (by_count ? r.top_k > 0 && r.top_k < p.a.vocab : r.top_p < 1.0f);
            if (cuts) {
                const uint64_t limit = by_count ? r.top_k : top_p_limit(r.top_p, d.total);
                d.cutoff = find_cutoff(limit, d.cutoff, top, kDrop,
                                       [&](const uint32_t* pivots, uint64_t* sums) {
                                           for_each(x, [&](int, float v) {
                                               const uint32_t key = order_key(v) >> kDrop;
                                               if (key <= pivots[0]) return;
                                               const uint32_t weight = by_count ? 1 : d.weight(v);
#pragma unroll
                                               for (int j = 0; j < kPivots; ++j)
                                                   sums[j] += key > pivots[j] ? weight : 0;
                                           });
                                           all_reduce<kPivots>(sums, Sum());
                                       });
            }
            if (by_count || cuts) {
                d.total = 0;
                for_each(x, [&](int, float v) { d.total += kept_weight(d, false, v); });
                all_reduce<1>(&d.total, Sum());
            }
        }
        if (mode == kTypical) {
            set_total(d, d.total);
            int64_t entropy = 0;
            for_each(x, [&](int, float v) { entropy += d.entropy_part(v); });
            uint64_t sum = static_cast<uint64_t>(entropy);
            all_reduce<1>(&sum, Sum());
            set_bound(d, r, static_cast<int64_t>(sum));
        }
        return d;
    }

    __device__ bool is_removed(bool removes, int index) const {
        if (!removes) return false;
        for (int c = next_node(s.kids, 0); c < kMaxTreeNodes; c = next_node(s.kids, c + 1)) {
            if (s.tokens[c] == index) return true;
        }
        return false;
    }

    // A token of the kept part of a row, without s.kids' tokens if `removes`, to rank 0's s.next.
    // By the whole cluster.
    __device__ void draw_token(int node, const Distribution& d, bool typical, bool removes,
                               uint64_t random) {
        const Span x = span(row(node));
        uint64_t sum = 0;
        for_each(x, [&](int, float v) { sum += kept_weight(d, typical, v); });
        for (int mask = 16; mask > 0; mask /= 2) sum += warp_shuffle_xor(sum, mask);
        uint64_t lost = 0;
        for (int c = lane; c < r.nodes && removes; c += 32) {
            if (!(s.kids[c >> 5] >> (c & 31) & 1) || s.weights[c] == 0) continue;
            const int v = (static_cast<int>(s.tokens[c]) + x.skew) / kVector;
            if (v >= x.begin && v < x.end) lost += s.weights[c];
        }
        for (int mask = 16; mask > 0; mask /= 2) lost += warp_shuffle_xor(lost, mask);
        if (lane == 0) s.units[warp] = sum - lost;
        Cluster::sync();
        if (warp == 0) {
            constexpr int kEach = kMaxCluster * kWarps / 32;
            uint64_t own[kEach], mine = 0;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int unit = lane * kEach + i;
                own[i] =
                    unit < blocks * kWarps ? Cluster::of(s.units, unit / kWarps)[unit % kWarps] : 0;
                mine += own[i];
            }
            const uint64_t upto = scan(mine);
            const uint64_t total =
                __shfl_sync(0xFFFFFFFFu, static_cast<unsigned long long>(upto), 31);
            const uint64_t draw = mul_high(random, total);
            if (total == 0 && lane == 0) {
                s.unit = -1;
                s.next = d.argmax;
            }
            uint64_t before = upto - mine;
            if (draw >= before && draw < upto) {
#pragma unroll
                for (int i = 0; i < kEach; ++i) {
                    if (draw >= before && draw < before + own[i]) {
                        s.unit = lane * kEach + i;
                        s.draw = draw - before;
                    }
                    before += own[i];
                }
            }
        }
        __syncthreads();
        if (s.unit == rank * kWarps + warp) {
            uint64_t before = 0;
            const uint64_t draw = s.draw;
            for (int from = x.begin; from < x.end; from += 32) {
                const int v = from + lane, first = v * kVector - x.skew;
                uint32_t weights[kVector];
                uint64_t mine = 0;
                const uint4 raw = v < x.end ? load(x, v) : uint4{};
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    const bool inside = v < x.end && static_cast<unsigned>(first + e) <
                                                         static_cast<unsigned>(p.a.vocab);
                    weights[e] = inside ? kept_weight(d, typical, element(raw, e)) : 0;
                    if (weights[e] && is_removed(removes, first + e)) weights[e] = 0;
                    mine += weights[e];
                }
                const uint64_t upto = before + scan(mine);
                uint64_t at = upto - mine;
                if (draw >= at && draw < upto) {
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        if (draw >= at && draw < at + weights[e])
                            *Cluster::of(&s.next, 0) = first + e;
                        at += weights[e];
                    }
                }
                before = __shfl_sync(0xFFFFFFFFu, static_cast<unsigned long long>(upto), 31);
                if (draw < before) break;
            }
        }
    }

    // Sum of the lanes up to this one.
    __device__ uint64_t scan(uint64_t x) const {
        for (int step = 1; step < 32; step *= 2) {
            const uint64_t y =
                __shfl_up_sync(0xFFFFFFFFu, static_cast<unsigned long long>(x), step);
            if (lane >= step) x += y;
        }
        return x;
    }

    __device__ void set_bit(uint32_t* words, int node) {
        atomicOr(words + (node >> 5), 1u << (node & 31));
    }

    __device__ void load_tree() {
        const int t = threadIdx.x;
        if (t < kNodeWords) s.inner[t] = s.accepted[t] = s.kids[t] = s.measured[t] = 0;
        __syncthreads();
        if (t < r.nodes) {
            // No value may lead out of the tree: a pointer that is not topological is clamped.
            int parent = -1;
            if (t > 0) {
                parent = p.a.parents[b * p.a.parents_stride_b + t];
                parent = parent < 0 ? 0 : parent < t ? parent : t - 1;
                set_bit(s.inner, parent);
            }
            s.parents[t] = parent;
            s.tokens[t] = p.a.tokens[b * p.a.tokens_stride_b + t];
            s.depth[t] = 0;
            s.score[t] = 0.0f;
        }
        __syncthreads();
    }

    __device__ static bool has(const uint32_t* words, int node) {
        return words[node >> 5] >> (node & 31) & 1;
    }

    // After this group's share of the inner nodes: true for the last group to come, which takes
    // over all groups' results.
    __device__ bool arrive_last() {
        if (rank == 0 && threadIdx.x == 0) {
            __threadfence();
            uint32_t* arrivals = accept_arrivals + p.first_arrival + b;
            s.last = atomicAdd(arrivals, 1) == gridDim.y - 1;
            if (s.last) *arrivals = 0;
            __threadfence();
        }
        Cluster::sync();
        if (*Cluster::of(&s.last, 0) == 0) return false;
        static_assert(sizeof(Distribution) % sizeof(uint32_t) == 0);
        constexpr int kWords = sizeof(Distribution) / sizeof(uint32_t);
        const uint32_t* from =
            reinterpret_cast<const uint32_t*>(p.measured + int64_t(b) * p.a.size);
        for (int i = threadIdx.x; i < r.nodes * kWords; i += kThreads) {
            if (has(s.inner, i / kWords)) reinterpret_cast<uint32_t*>(s.dist)[i] = __ldcg(from + i);
        }
        if (threadIdx.x < kNodeWords) s.measured[threadIdx.x] = s.inner[threadIdx.x];
        __syncthreads();
        return true;
    }

    // The next inner node from `from` on that is this group's to measure.
    __device__ int next_of_share(int from, int* count) const {
        int node = next_node(s.inner, from);
        while (node < kMaxTreeNodes &&
               (*count)++ % static_cast<int>(gridDim.y) != static_cast<int>(blockIdx.y)) {
            node = next_node(s.inner, node + 1);
        }
        return node;
    }

    // Greedy, typical: accepts children of a measured node.
    __device__ void accept_children(int node) {
        const int t = threadIdx.x;
        const Distribution& d = s.dist[node];
        if (t > node && t < r.nodes && s.parents[t] == node && in_vocab(s.tokens[t], p.a.vocab)) {
            bool accepted = d.has_max && s.tokens[t] == d.argmax;
            if (r.mode == kTypical) {
                const float x = to_float(row(node)[s.tokens[t]]);
                accepted = d.valid && d.probability(x) > d.bound;
                s.score[t] = f_add(s.score[node], d.log_probability(x));
            }
            if (accepted) {
                s.depth[t] = s.depth[node] + 1;
                set_bit(s.accepted, t);
            }
        }
        __syncthreads();
    }

    // Greedy, typical: the end of the best path of accepted nodes.
    __device__ int best_end() {
        if (threadIdx.x == 0) {
            int best = 0;
            for (int node = 0; node < r.nodes; node = next_node(s.accepted, node + 1)) {
                if (is_better_end(r.mode == kTypical, s.parents, s.depth, s.score, node, best))
                    best = node;
            }
            s.picked = best;
        }
        __syncthreads();
        return s.picked;
    }

    // Sampling: the child of a measured node that the draw falls on; -1: none, and then s.kids is
    // what the node's distribution has lost.
    __device__ int sample_child(int node, uint64_t random) {
        const int t = threadIdx.x;
        const Distribution& d = s.dist[node];
        if (t < kNodeWords) s.kids[t] = 0;
        __syncthreads();
        if (d.valid && s.depth[node] < p.a.max_depth && t > node && t < r.nodes &&
            s.parents[t] == node) {
            bool again = !in_vocab(s.tokens[t], p.a.vocab);
            for (int c = node + 1; c < t && !again; ++c)
                again = s.parents[c] == node && s.tokens[c] == s.tokens[t];
            s.weights[t] = again ? 0 : kept_weight(d, false, to_float(row(node)[s.tokens[t]]));
            s.depth[t] = s.depth[node] + 1;
            set_bit(s.kids, t);
        }
        __syncthreads();
        if (t == 0) {
            uint64_t taken;
            s.picked = pick_child(s.kids, s.weights, mul_high(random, d.total), &taken);
        }
        __syncthreads();
        return s.picked;
    }

    __device__ void write(int length, int64_t next, bool finished) {
        if (rank != 0) return;
        const int columns = p.a.max_depth + 1;
        for (int i = threadIdx.x; i < columns; i += kThreads) {
            const int node = i < length ? s.path[i] : -1;
            p.a.path[int64_t(b) * columns + i] = node;
            p.a.out_tokens[int64_t(b) * columns + i] = node >= 0 ? s.tokens[node] : -1;
        }
        if (threadIdx.x == 0) {
            p.a.accept_length[b] = length - 1;
            p.a.last_node[b] = length > 0 ? s.path[length - 1] : -1;
            p.a.next_token[b] = next;
            p.a.finished[b] = finished;
        }
    }

    // One request's arrival at the generator: all read the same offset, and the last one advances
    // it.
    __device__ uint64_t take_offset() {
        using word = unsigned long long;
        word* generator = reinterpret_cast<word*>(p.a.generator);
        const word old = atomicAdd(generator + 1, word(1) << kOffsetBits);
        const word offset = old & kOffsetMask;
        if (old >> kOffsetBits == static_cast<word>(p.a.batch - 1))
            atomicExch(generator + 1, (offset + 1) & kOffsetMask);
        return offset;
    }

    __device__ void run() {
        r = load_request(p.a, b);
        const bool shares = gridDim.y > 1 && r.nodes > 0 && r.mode != kSampling;
        if (!shares && blockIdx.y > 0) return;  // the whole cluster does
        load_tree();
        uint64_t seed = static_cast<uint64_t>(p.a.seed), offset = 0;
        enum { kShare, kWalk, kLast } stage = shares ? kShare : kWalk;
        bool begins = true;  // the walk
        int node = 0, count = 0;
        while (r.nodes > 0) {
            int mode = r.mode;
            if (stage == kShare) {
                node = next_of_share(node, &count);
                if (node == kMaxTreeNodes) {
                    if (!arrive_last()) {
                        Cluster::sync();  // a block's shared memory must outlive the others' reads
                        return;
                    }
                    stage = kWalk;
                    node = 0;
                }
            }
            if (stage == kWalk && begins) {
                begins = false;
                take_seed(&seed, &offset);
                if (threadIdx.x == 0) s.accepted[0] = 1;
                __syncthreads();
            }
            bool needed = true;
            if (stage == kWalk && mode != kSampling)
                needed = has(s.inner, node) && s.depth[node] < p.a.max_depth;
            if (stage == kLast && !(mode == kTypical && p.a.has_seed)) mode = kGreedy;
            if (needed && !has(s.measured, node)) {
                const Distribution d = measure(node, mode);
                __syncthreads();
                if (threadIdx.x == 0) {
                    s.dist[node] = d;
                    set_bit(s.measured, node);
                    if (stage == kShare && rank == 0) p.measured[int64_t(b) * p.a.size + node] = d;
                }
                __syncthreads();
            }
            if (stage == kShare) {
                ++node;
            } else if (stage == kLast) {
                break;
            } else if (mode == kSampling) {
                const int child = sample_child(node, philox(seed, offset, b, node).child);
                if (child < 0) {
                    cut(node);
                    break;
                }
                node = child;
                __syncthreads();  // s.picked has been read
            } else {
                if (needed) accept_children(node);
                node = next_node(s.accepted, node + 1);
                if (node >= r.nodes) {
                    node = best_end();
                    cut(node);
                    if (s.finished) break;
                    stage = kLast;
                }
            }
        }
        if (r.nodes == 0) {
            take_seed(&seed, &offset);
            write(0, -1, true);
        } else {
            const Distribution& d = s.dist[node];
            if (!s.finished && d.valid &&
                (r.mode == kSampling || (r.mode == kTypical && p.a.has_seed))) {
                draw_token(node, d, r.mode == kTypical, r.mode == kSampling,
                           philox(seed, offset, b, node).next);
            } else if (threadIdx.x == 0) {
                s.next = s.finished ? -1 : d.argmax;
            }
            Cluster::sync();
            write(s.length, s.next, s.finished);
        }
        Cluster::sync();
    }

    __device__ void cut(int end) {
        if (threadIdx.x == 0) {
            s.length =
                cut_path(p.a, r, s.parents, s.tokens, end, s.depth[end], s.path, &s.finished);
        }
        __syncthreads();
    }

    __device__ void take_seed(uint64_t* seed, uint64_t* offset) {
        if (!p.a.generator) return;
        if (rank == 0 && threadIdx.x == 0) s.offset = take_offset();
        *seed = p.a.generator[0];
        Cluster::sync();
        *offset = *Cluster::of(&s.offset, 0);
    }
};

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    accept_kernel(const __grid_constant__ AcceptParams p) {
    __shared__ Shared shared;
    Accept<scalar_t>(p, shared).run();
}

ArrivalTurns arrival_turns;

struct Plan {
    int cluster, groups;
};

Plan plan(const AcceptArgs& a, int device) {
    int major = 0, sms = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    int widest = 1;
    if (major >= 9) {  // a vector a thread at least
        while (widest < kMaxCluster && widest * kThreads * 8 < a.vocab) widest *= 2;
    }
    // Measuring all inner nodes at once pays while it takes a few rounds; walking takes one a
    // level.
    Plan x{std::min(widest, 4), 1};
    x.groups = std::min(sms / (x.cluster * a.batch), a.size - 1);  // a block fills an SM
    const bool samples = !a.mode.values && a.mode.value == kSampling;
    if (samples || x.groups <= 1 || x.groups * 8 < a.size) {
        x = {widest, 1};
        while (x.cluster > 1 && x.cluster * a.batch > 2 * sms) x.cluster /= 2;
    }
    return x;
}

template <typename scalar_t>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(x.cluster, x.groups, params.a.batch);
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = x.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = x.cluster > 1 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, accept_kernel<scalar_t>, params));
}

Outputs accept_candidates(Tensor logits, Tensor tokens, Tensor parents,
                          std::optional<Tensor> num_nodes, int64_t max_depth,
                          std::optional<Tensor> mode_values, int64_t mode,
                          std::optional<Tensor> temperature_values, double temperature,
                          std::optional<Tensor> threshold_values, double threshold,
                          std::optional<Tensor> alpha_values, double alpha,
                          std::optional<Tensor> top_k_values, int64_t top_k,
                          std::optional<Tensor> top_p_values, double top_p,
                          std::optional<Tensor> max_tokens_values, int64_t max_tokens,
                          std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                          std::optional<Tensor> generator, std::optional<int64_t> seed) {
    AcceptParams params{};
    params.a = accept_args(logits, tokens, parents, num_nodes, max_depth, mode_values, mode,
                           temperature_values, temperature, threshold_values, threshold,
                           alpha_values, alpha, top_k_values, top_k, top_p_values, top_p,
                           max_tokens_values, max_tokens, eos_values, eos, generator, seed);
    const Outputs outputs = accept_outputs(params.a, logits);
    if (params.a.batch == 0) return outputs;
    const int device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const Plan x = plan(params.a, device);
    std::optional<Tensor> measured;
    if (x.groups > 1) {
        measured = new_tensor(logits, ScalarType::Byte,
                              int64_t(params.a.batch) * params.a.size * sizeof(Distribution));
        params.measured = static_cast<Distribution*>(measured->data_ptr());
        params.first_arrival =
            arrival_turns.claim(params.a.batch, static_cast<cudaStream_t>(stream));
    }
    switch (logits.scalar_type()) {
        case ScalarType::Half:
            launch<__half>(params, x, static_cast<cudaStream_t>(stream));
            break;
        case ScalarType::BFloat16:
            launch<__nv_bfloat16>(params, x, static_cast<cudaStream_t>(stream));
            break;
        default:
            launch<float>(params, x, static_cast<cudaStream_t>(stream));
    }
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CUDA, m) {
    m.impl("accept_candidates", TORCH_BOX(&accept_candidates));
}

}  // namespace medusa_kernels
