// accept_candidates on the GPU, one launch. A cluster of blocks (one block before sm_90) shares a
// row of logits: each thread keeps its part in registers while the row is reduced over and over,
// which costs an exchange through the cluster's shared memory each.
//
// For few requests, clusters first measure the rows of all nodes of greedy and typical requests in
// parallel, and a block of the last one to arrive walks the tree. For many requests, and for
// sampling, one cluster a request measures only the rows that its walk comes to: leaves never, but
// for the token after the path's end.
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

constexpr int kThreads = 512, kWarps = kThreads / 32, kBlocksPerSM = 2;
constexpr int kMaxCluster = 16;  // more than 8 is not portable: see launch()
constexpr int kResident = 4;     // 16-byte vectors of a row that a thread keeps
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
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
    Request request;
    Distribution dist[kMaxTreeNodes];  // of measured nodes
    int64_t tokens[kMaxTreeNodes];
    uint64_t partial[kWarps][kPivots];
    uint64_t block[2][kMaxCluster][kPivots];  // each block's part, which it puts here; in turns
    uint64_t units[kWarps];                   // weight of each warp's part of a row
    uint64_t draw, seed, offset;
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
    // A block may put something into another's shared memory only once that has begun: it says so
    // with start(), and started() waits for all of them.
    __device__ static void start() {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
    }
    __device__ static void started() {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
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

__device__ __forceinline__ uint64_t shuffle(uint64_t x, int lane) {
    return __shfl_sync(kAllLanes, static_cast<unsigned long long>(x), lane);
}

// Reductions over a warp, each of kValues values, to all lanes.
struct Max {
    template <int kValues>
    __device__ static void reduce(uint64_t* values) {
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
            const uint32_t mine = static_cast<uint32_t>(values[k] >> 32);
            const uint32_t high = __reduce_max_sync(kAllLanes, mine);
            const uint32_t low =
                __reduce_max_sync(kAllLanes, mine == high ? static_cast<uint32_t>(values[k]) : 0u);
            values[k] = uint64_t(high) << 32 | low;
        }
    }
};
struct Sum {  // in pieces of 22 bits, whose sums fit in 32
    template <int kValues>
    __device__ static void reduce(uint64_t* values) {
        constexpr uint32_t kMask = (1 << 22) - 1;
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
            const uint64_t x = values[k];
            const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x) & kMask);
            const uint32_t mid =
                __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x >> 22) & kMask);
            const uint32_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x >> 44));
            values[k] = low + (uint64_t(mid) << 22) + (uint64_t(high) << 44);
        }
    }
};

// `kKeeps`: a row fits in kResident vectors a thread; else it is read again for every reduction.
template <typename scalar_t, bool kKeeps>
struct Accept {
    static constexpr int kVector = 16 / sizeof(scalar_t);

    const AcceptParams& p;
    Shared& s;
    const int warp, lane;
    int blocks;              // of the cluster, as long as it works together
    const Request& r;        // in shared memory, after load_tree()
    int turn = 0;            // of s.block
    uint4 raw[kResident];    // of the row at hand
    int fetched = -1;        // whose row that is
    float own_logit = 0.0f;  // of node threadIdx.x under its parent

    __device__ Accept(const AcceptParams& params, Shared& shared)
        : p(params),
          s(shared),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          blocks(Cluster::blocks()),
          r(shared.request) {}

    __device__ static int b() { return blockIdx.z; }
    __device__ static int rank() { return Cluster::rank(); }

    __device__ void sync() const {
        if (blocks > 1) {
            Cluster::sync();
        } else {
            __syncthreads();
        }
    }

    __device__ const scalar_t* row(int node) const {
        return static_cast<const scalar_t*>(p.a.logits) + b() * p.a.logits_stride_b +
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
        x.begin = min((rank() * kWarps + warp) * x.each, count);
        x.end = min(x.begin + x.each, count);
        return x;
    }
    // Vector v; what of it is outside the row is not read, and counts as -inf.
    __device__ uint4 load(const Span& x, int v) const {
        const int first = v * kVector - x.skew;
        if (first >= 0 && first + kVector <= p.a.vocab) return __ldg(x.vectors + v);
        constexpr bool kHalf = std::is_same_v<scalar_t, __half>;
        constexpr uint32_t kLowest = sizeof(scalar_t) == 4 ? 0xFF800000u
                                     : kHalf               ? 0xFC00FC00u
                                                           : 0xFF80FF80u;
        const scalar_t* from = reinterpret_cast<const scalar_t*>(x.vectors + v);
        uint32_t words[4] = {kLowest, kLowest, kLowest, kLowest};
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            if (static_cast<unsigned>(first + e) < static_cast<unsigned>(p.a.vocab)) {
                if constexpr (sizeof(scalar_t) == 4) {
                    words[e] = __float_as_uint(from[e]);
                } else {
                    const uint32_t bits = reinterpret_cast<const uint16_t*>(from)[e];
                    words[e / 2] = __byte_perm(words[e / 2], bits, e % 2 ? 0x5410 : 0x3254);
                }
            }
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
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

    // Starts the loads of a row that is to be kept.
    __device__ void fetch(int node) {
        if constexpr (kKeeps) {
            if (fetched == node) return;
            const Span x = span(row(node));
#pragma unroll
            for (int i = 0; i < kResident; ++i) {
                const int v = x.begin + lane + 32 * i;
                if (v < x.end) raw[i] = load(x, v);
            }
            fetched = node;
        }
    }
    // f(index, logit) for this thread's part of a row, in order of the index; -inf for indices
    // outside the row.
    template <typename F>
    __device__ void for_each_in(const Span& x, int from, F&& f) const {
#pragma unroll
        for (int i = 0; i < kResident; ++i) {
            const int v = from + 32 * i;
            if (v < x.end) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) f(v * kVector - x.skew + e, element(raw[i], e));
            }
        }
    }
    // Of any row.
    template <typename F>
    __device__ void for_each_read(const Span& x, F&& f) {
        fetched = -1;
#pragma unroll 1
        for (int from = x.begin + lane; from < x.end; from += 32 * kResident) {
#pragma unroll
            for (int i = 0; i < kResident; ++i) {
                if (from + 32 * i < x.end) raw[i] = load(x, from + 32 * i);
            }
            for_each_in(x, from, f);
        }
    }
    // Of the row that was fetched last.
    template <typename F>
    __device__ void for_each(const Span& x, F&& f) {
        if constexpr (kKeeps) {
            // Else the compiler may keep all elements as floats, twice as many registers.
#pragma unroll
            for (uint4& v : raw) asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
            for_each_in(x, x.begin + lane, f);
        } else {
            for_each_read(x, f);
        }
    }

    // Of all threads of the cluster, to all of them. Blocks put their parts into each other's
    // shared memory before the barrier and read only their own after it, so that one may end while
    // another still reads.
    template <typename Op, int kValues>
    __device__ void all_reduce(uint64_t (&values)[kValues]) {
        Op::template reduce<kValues>(values);
        if (lane == 0) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) s.partial[warp][k] = values[k];
        }
        __syncthreads();
        if (warp < kValues) {
            uint64_t value[1] = {lane < kWarps ? s.partial[lane][warp] : 0};
            Op::template reduce<1>(value);
            if (lane < blocks) *Cluster::of(&s.block[turn][rank()][warp], lane) = value[0];
        }
        sync();
        if (blocks == 1) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) values[k] = s.block[turn][0][k];
        } else {
#pragma unroll
            for (int k = 0; k < kValues; ++k)
                values[k] = lane < blocks ? s.block[turn][lane][k] : 0;
            Op::template reduce<kValues>(values);
        }
        turn ^= 1;  // a block is at most one reduction ahead of another
    }

    // argmax_key of the greatest of this thread's logits; sets `nan` if there is a NaN.
    __device__ uint64_t greatest(const Span& x, bool* nan) {
        float best = -INFINITY;
        int at = -1;
        bool has_nan = false;
        for_each(x, [&](int i, float v) {
            if (v > best) {
                best = v;
                at = i;
            }
            has_nan |= v != v;
        });
        if (at < 0) {  // nothing above -inf
            for_each(x, [&](int i, float v) {
                if (at < 0 && v == v && static_cast<unsigned>(i) < static_cast<unsigned>(p.a.vocab))
                    at = i;
            });
        }
        *nan = has_nan;
        return at < 0 ? 0 : argmax_key(best, at);
    }

    // What `mode` needs to know of a row. Called by the whole cluster, from one place: it is most
    // of the code.
    __device__ Distribution measure(int node, int mode) {
        fetch(node);
        const Span x = span(row(node));
        bool nan;
        uint64_t best[2];
        best[0] = greatest(x, &nan);
        best[1] = nan;
        all_reduce<Max>(best);
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
                d.cutoff = find_cutoff(
                    limit, d.cutoff, top, kDrop, &d.total,
                    [&](const uint32_t* pivots, uint32_t last, uint64_t (&sums)[kPivots]) {
                        for_each(x, [&](int, float v) {
                            const uint32_t key = order_key(v) >> kDrop;
                            if (key <= pivots[0] || key > last) return;
                            const uint32_t weight = by_count ? 1 : d.weight(v);
#pragma unroll
                            for (int j = 0; j < kPivots; ++j)
                                sums[j] += key > pivots[j] ? weight : 0;
                        });
                        all_reduce<Sum>(sums);
                    });
            }
            if (by_count) {
                uint64_t total[1] = {0};
                for_each(x, [&](int, float v) { total[0] += kept_weight(d, false, v); });
                all_reduce<Sum>(total);
                d.total = total[0];
            }
        }
        if (mode == kTypical) {
            set_total(d, d.total);
            uint64_t entropy[1] = {0};
            for_each(x, [&](int, float v) {
                entropy[0] += static_cast<uint64_t>(int64_t(d.entropy_part(v)));
            });
            all_reduce<Sum>(entropy);
            set_bound(d, r, static_cast<int64_t>(entropy[0]));
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
        for_each_read(x, [&](int, float v) { sum += kept_weight(d, typical, v); });
        uint64_t lost = 0;
        for (int c = lane; c < r.nodes && removes; c += 32) {
            if (!(s.kids[c >> 5] >> (c & 31) & 1) || s.weights[c] == 0) continue;
            const int v = (static_cast<int>(s.tokens[c]) + x.skew) / kVector;
            if (v >= x.begin && v < x.end) lost += s.weights[c];
        }
        uint64_t left[1] = {sum - lost};
        Sum::reduce<1>(left);
        if (lane == 0) s.units[warp] = left[0];
        sync();
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
            const uint64_t total = shuffle(upto, 31);
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
        if (s.unit == rank() * kWarps + warp) {
            uint64_t before = 0;
            const uint64_t draw = s.draw;
            for (int from = x.begin; from < x.end; from += 32) {
                const int v = from + lane, first = v * kVector - x.skew;
                uint32_t weights[kVector];
                uint64_t mine = 0;
                const uint4 part = v < x.end ? load(x, v) : uint4{};
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    weights[e] = v < x.end ? kept_weight(d, typical, element(part, e)) : 0;
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
                before = shuffle(upto, 31);
                if (draw < before) break;
            }
        }
    }

    // Sum of the lanes up to this one.
    __device__ uint64_t scan(uint64_t x) const {
        for (int step = 1; step < 32; step *= 2) {
            const uint64_t y = __shfl_up_sync(kAllLanes, static_cast<unsigned long long>(x), step);
            if (lane >= step) x += y;
        }
        return x;
    }

    __device__ void set_bit(uint32_t* words, int node) {
        atomicOr(words + (node >> 5), 1u << (node & 31));
    }

    __device__ void load_tree(const Request& request) {
        const int t = threadIdx.x;
        if (t < kNodeWords) s.inner[t] = s.accepted[t] = s.kids[t] = s.measured[t] = 0;
        __syncthreads();
        if (t < request.nodes) {
            // No value may lead out of the tree: a pointer that is not topological is clamped.
            int parent = -1;
            if (t > 0) {
                parent = p.a.parents[b() * p.a.parents_stride_b + t];
                parent = parent < 0 ? 0 : parent < t ? parent : t - 1;
                set_bit(s.inner, parent);
            }
            const int64_t token = p.a.tokens[b() * p.a.tokens_stride_b + t];
            if (t > 0 && request.mode != kGreedy && in_vocab(token, p.a.vocab))
                own_logit = to_float(row(parent)[token]);
            s.parents[t] = parent;
            s.tokens[t] = token;
            s.depth[t] = 0;
            s.score[t] = 0.0f;
        }
        __syncthreads();
    }

    __device__ static bool has(const uint32_t* words, int node) {
        return words[node >> 5] >> (node & 31) & 1;
    }

    // After this cluster's share of the nodes, by its first block: true in the last one to come,
    // which takes over all results.
    __device__ bool arrive_last() {
        if (threadIdx.x == 0) s.last = arrive(accept_arrivals + p.first_arrival + b(), gridDim.y);
        __syncthreads();
        if (!s.last) return false;
        constexpr int kWords = sizeof(Distribution) / sizeof(unsigned long long);
        static_assert(sizeof(Distribution) % sizeof(unsigned long long) == 0);
        const auto* from =
            reinterpret_cast<const unsigned long long*>(p.measured + int64_t(b()) * p.a.size);
        for (int i = threadIdx.x; i < r.nodes * kWords; i += kThreads)
            reinterpret_cast<unsigned long long*>(s.dist)[i] = __ldcg(from + i);
        __syncthreads();
        return true;
    }

    // Greedy, typical: whether node threadIdx.x, which has a parent, is accepted if that is;
    // typical: its log probability, too.
    __device__ bool passes(const Distribution& parent, float* log_p) const {
        const int64_t token = s.tokens[threadIdx.x];
        if (!in_vocab(token, p.a.vocab)) return false;
        if (r.mode != kTypical) return parent.has_max && token == parent.argmax;
        *log_p = parent.log_probability(own_logit);
        return parent.valid && parent.probability(own_logit) > parent.bound;
    }

    // Greedy, typical: accepts children of a measured node.
    __device__ void accept_children(int node) {
        const int t = threadIdx.x;
        float log_p = 0.0f;
        if (t > node && t < r.nodes && s.parents[t] == node && passes(s.dist[node], &log_p)) {
            s.score[t] = f_add(s.score[node], log_p);
            s.depth[t] = s.depth[node] + 1;
            set_bit(s.accepted, t);
        }
        __syncthreads();
    }

    // The same for all nodes at once, every node being measured: each finds out, with strides that
    // double, whether all nodes above it pass. Leaves the deepest accepted ones in s.accepted.
    __device__ void accept_all() {
        const int t = threadIdx.x;
        float log_p = 0.0f;
        int above = 0, depth = 0;  // the next node to look at, and how far up it is; -1: rejected
        if (t > 0 && t < r.nodes) {
            depth = 1;
            above = passes(s.dist[s.parents[t]], &log_p) ? s.parents[t] : -1;
            s.score[t] = log_p;
        }
        if (t == 0) s.unit = 0;
        if (t < kNodeWords) s.accepted[t] = 0;
        for (int stride = 1;; stride *= 2) {
            if (t < r.nodes) {
                s.path[t] = above;
                s.depth[t] = depth;
            }
            __syncthreads();
            if (stride > p.a.max_depth) break;
            if (above > 0) {
                depth += s.depth[above];
                above = s.path[above];
            }
            __syncthreads();
        }
        const bool accepted = t < r.nodes && above == 0 && depth <= p.a.max_depth;
        const int deepest =
            __reduce_max_sync(kAllLanes, static_cast<unsigned>(accepted ? depth : 0));
        if (lane == 0 && deepest > 0) atomicMax(&s.unit, deepest);
        __syncthreads();
        if (accepted && depth == s.unit) set_bit(s.accepted, t);
        __syncthreads();
        if (t == 0 && r.mode == kTypical) {  // scores of whole paths
            for (int end = next_node(s.accepted, 0); end < r.nodes;
                 end = next_node(s.accepted, end + 1)) {
                for (int i = s.depth[end], node = end; i > 0; --i, node = s.parents[node])
                    s.path[i] = node;
                float score = 0.0f;
                for (int i = 1; i <= s.depth[end]; ++i) score = f_add(score, s.score[s.path[i]]);
                s.score[end] = score;
            }
        }
    }

    // Greedy, typical: the end of the best path of accepted nodes.
    __device__ int best_end() {
        if (threadIdx.x == 0) {
            int best = next_node(s.accepted, 0);
            for (int node = best; node < r.nodes; node = next_node(s.accepted, node + 1)) {
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
            s.weights[t] = again ? 0 : kept_weight(d, false, own_logit);
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
        if (rank() != 0) return;
        const int columns = p.a.max_depth + 1;
        for (int i = threadIdx.x; i < columns; i += kThreads) {
            const int node = i < length ? s.path[i] : -1;
            p.a.path[int64_t(b()) * columns + i] = node;
            p.a.out_tokens[int64_t(b()) * columns + i] = node >= 0 ? s.tokens[node] : -1;
        }
        if (threadIdx.x == 0) {
            p.a.accept_length[b()] = length - 1;
            p.a.last_node[b()] = length > 0 ? s.path[length - 1] : -1;
            p.a.next_token[b()] = next;
            p.a.finished[b()] = finished;
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
        // Parameters come from memory, a miss a line: all misses at once.
        if (threadIdx.x < sizeof(AcceptParams) / 64) {
            const int32_t word = reinterpret_cast<const int32_t*>(&p)[threadIdx.x * 16];
            asm volatile("" ::"r"(word));
        }
        const Request request = load_request(p.a, b());
        const bool shares = gridDim.y > 1 && request.nodes > 0 && request.mode != kSampling;
        if (!shares && blockIdx.y > 0) return;  // the whole cluster does
        if (threadIdx.x == 0) {
            s.request = request;
            s.seed = static_cast<uint64_t>(p.a.seed);
            s.offset = 0;
        }
        Cluster::start();
        enum { kShare, kWalk, kLast } stage = shares ? kShare : kWalk;
        int node = shares ? blockIdx.y : 0;
        if (node < request.nodes) fetch(node);
        load_tree(request);
        Cluster::started();
        bool begins = true;  // the walk
        while (r.nodes > 0) {
            int mode = r.mode;
            if (stage == kShare) {
                if (node >= r.nodes) {
                    if (rank() > 0 || !arrive_last()) return;
                    blocks = 1;  // no other block is left
                    take_seed();
                    accept_all();
                    node = best_end();
                    cut(node);
                    break;
                } else if (!p.a.has_seed && !has(s.inner, node)) {
                    mode = kGreedy;  // no child to accept, no token to draw
                }
            }
            if (stage == kWalk && begins) {
                begins = false;
                take_seed();
                if (threadIdx.x == 0) s.accepted[0] = 1;
                __syncthreads();
            }
            bool needed = true;
            if (stage == kWalk && mode != kSampling)
                needed = has(s.inner, node) && s.depth[node] < p.a.max_depth;
            if (stage == kLast && !(mode == kTypical && p.a.has_seed)) mode = kGreedy;
            if (needed && !has(s.measured, node)) {
                const Distribution d = measure(node, mode);
                if (stage == kShare) {
                    if (rank() == 0 && threadIdx.x == 0)
                        p.measured[int64_t(b()) * p.a.size + node] = d;
                } else {
                    __syncthreads();
                    if (threadIdx.x == 0) {
                        s.dist[node] = d;
                        set_bit(s.measured, node);
                    }
                    __syncthreads();
                }
            }
            if (stage == kShare) {
                node += gridDim.y;
            } else if (stage == kLast) {
                break;
            } else if (mode == kSampling) {
                const int child = sample_child(node, philox(s.seed, s.offset, b(), node).child);
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
            take_seed();
            write(0, -1, true);
        } else {
            const Distribution& d = s.dist[node];
            if (!s.finished && d.valid &&
                (r.mode == kSampling || (r.mode == kTypical && p.a.has_seed))) {
                draw_token(node, d, r.mode == kTypical, r.mode == kSampling,
                           philox(s.seed, s.offset, b(), node).next);
            } else if (threadIdx.x == 0) {
                s.next = s.finished ? -1 : d.argmax;
            }
            sync();
            write(s.length, s.next, s.finished);
        }
        sync();  // a block's shared memory must outlive the others' reads and writes
    }

    __device__ void cut(int end) {
        if (threadIdx.x == 0) {
            s.length =
                cut_path(p.a, r, s.parents, s.tokens, end, s.depth[end], s.path, &s.finished);
        }
        __syncthreads();
    }

    // s.seed and s.offset, in all blocks.
    __device__ void take_seed() {
        if (!p.a.generator) return;
        if (rank() == 0 && threadIdx.x == 0) {
            const uint64_t offset = take_offset();
            for (int i = 0; i < blocks; ++i) *Cluster::of(&s.offset, i) = offset;
        }
        if (threadIdx.x == 0) s.seed = p.a.generator[0];
        sync();
    }
};

template <typename scalar_t, bool kKeeps>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    accept_kernel(const __grid_constant__ AcceptParams p) {
    __shared__ Shared shared;
    Accept<scalar_t, kKeeps>(p, shared).run();
}

ArrivalTurns arrival_turns;

struct Plan {
    int cluster, groups;
    bool keeps;
};

Plan plan(const AcceptArgs& a, int itemsize, int device) {
    int major = 0, sms = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    const int slots = sms * kBlocksPerSM, vector = 16 / itemsize;
    const int vectors = (a.vocab + vector - 1) / vector + 1;  // of a row that is not aligned
    const auto keeps = [&](int cluster) { return vectors <= cluster * kThreads * kResident; };
    int widest = 1;
    if (major >= 9) {  // a vector a thread at least
        while (widest < kMaxCluster && widest * kThreads * vector < a.vocab) widest *= 2;
    }
    const bool one_mode = !a.mode.values;
    // Measuring all nodes at once pays while it takes a round or two; a walk takes one a level.
    // Small clusters start sooner; greedy acceptance reads a row once, so it need not be kept.
    int cluster = std::min(widest, 8);
    const int most = one_mode && a.mode.value == kGreedy ? 2 * kResident : kResident;
    while (cluster > 1 && vectors <= cluster / 2 * kThreads * most) cluster /= 2;
    const int groups = std::min(slots / (cluster * a.batch), a.size);
    const bool samples = one_mode && a.mode.value == kSampling;
    if (!samples && groups > 1 && 2 * groups >= a.size) return {cluster, groups, keeps(cluster)};
    while (widest > 1 && widest * a.batch > slots) widest /= 2;
    return {widest, 1, keeps(widest)};
}

template <typename scalar_t, bool kKeeps>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    const auto kernel = accept_kernel<scalar_t, kKeeps>;
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
    if (x.cluster > 8) {
        STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

template <typename scalar_t>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    if (x.keeps) {
        launch<scalar_t, true>(params, x, stream);
    } else {
        launch<scalar_t, false>(params, x, stream);
    }
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
    const ScalarType type = logits.scalar_type();
    const Plan x = plan(params.a, type == ScalarType::Float ? 4 : 2, device);
    std::optional<Tensor> measured;
    if (x.groups > 1) {
        measured = new_tensor(logits, ScalarType::Byte,
                              int64_t(params.a.batch) * params.a.size * sizeof(Distribution));
        params.measured = static_cast<Distribution*>(measured->data_ptr());
        params.first_arrival =
            arrival_turns.claim(params.a.batch, static_cast<cudaStream_t>(stream));
    }
    switch (type) {
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
