// What the blocks of accept_candidates on the GPU share: parameters, mail, shared memory, clusters,
// reductions over a warp.
#pragma once

#include "acceptance.h"
#include "acceptance_ptx.h"

namespace medusa_kernels {

template <>
inline constexpr int kDropBits<__nv_bfloat16> = 16;
template <>
inline constexpr int kDropBits<__half> = 13;

}  // namespace medusa_kernels

namespace medusa_kernels::gpu {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32, kBlocksPerSM = 2;
constexpr int kPortableCluster = 8, kMaxCluster = 16;
constexpr int kResident = 8;  // 16-byte vectors of a row that a thread keeps at most
constexpr int kLoads = 4;     // of those, at once
constexpr int kMaxAhead = 8;  // groups of blocks, each with a node of a sampled path
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
static_assert(kThreads >= kMaxTreeNodes, "a thread has at most one node");

// What is mailed where a request has several groups of blocks: [batch, size] words, or for greedy
// acceptance alone [batch, size, blocks of a row]. Never 0; 0 between launches. No word depends on
// another, so that nothing is to be ordered. Each launch has its own; two halves: eager launches,
// captured ones.
//   greedy    argmax_key of the row, or of a block's part of it; kNoNumber
//   sampling  lower half: kSent, and the child that is taken with kIsChild, or the next token
//   typical   lower half: kSent and the next token; upper half, from the parent's row: log p of the
//             node, NaN where it does not pass
// The group that waits is the last of its request. Blocks begin in the order of their index, so all
// that it waits for have begun before it.
constexpr uint32_t kMail = 1 << 19;
__device__ uint64_t accept_mail[2 * kMail];
constexpr uint64_t kNoNumber = 1;
constexpr uint32_t kSent = 1u << 31, kIsChild = 1u << 30, kRejected = 0x7FFFFFFFu;

struct AcceptParams {
    int32_t blocks;  // of a cluster; 1 where the blocks of a row work by themselves
    int32_t first_mail;
    int32_t each;   // 16-byte vectors of a row that a warp has
    int32_t ahead;  // a request's groups measure a likely path's nodes, not all
    AcceptArgs a;
};

struct Shared {
    Request request;
    Distribution dist[kMaxTreeNodes];  // of measured nodes
    int64_t tokens[kMaxTreeNodes];
    uint64_t mail[kMaxTreeNodes];  // ahead: of a node's children, argmax_key of their logits
    uint32_t draws[kMaxAhead];     // ahead: what is sent of a likely path's nodes
    uint64_t partial[kWarps][kPivots];
    uint64_t block[2][kMaxCluster][kPivots];  // each block's part, which it puts here; in turns
    ptx::mbarrier_t came[2];                  // all of them
    CutoffSearch search;
    uint32_t pivots[kPivots];
    float bounds[kPivots];   // the least logit above each
    float top;               // and above the search's last key
    uint32_t first[2];       // where the block's greatest logit is; in turns
    uint64_t units[kWarps];  // weight of each warp's part of a row
    uint64_t draw, seed, offset;
    int64_t next;
    int32_t parents[kMaxTreeNodes], depth[kMaxTreeNodes];
    short2 hops[2][kMaxTreeNodes];  // the node that far up, -1 if one below it is rejected; how far
    float score[kMaxTreeNodes];
    uint32_t weights[kMaxTreeNodes];
    uint32_t inner[kNodeWords], accepted[kNodeWords], kids[kNodeWords], measured[kNodeWords];
    uint32_t again[kNodeWords];  // sampling: a sibling before it has its token
    uint32_t deepest, first_eos;
    int32_t picked, unit;
    int32_t fetched;  // whose row is in or on its way to the memory of rows
};

// The blocks that share a row.
struct Cluster {
    __device__ static void sync() {
#if MK_CLUSTERS
        cg::this_cluster().sync();
#else
        __syncthreads();
#endif
    }
    // A block may put something into another's shared memory only once that has begun: it says so
    // with start(), and started() waits for all of them.
    __device__ static void start(ptx::mbarrier_t (&barriers)[2]) {
#if MK_CLUSTERS
        if (threadIdx.x == 0) {
            ptx::init(&barriers[0]);
            ptx::init(&barriers[1]);
        }
        ptx::cluster_arrive();
#endif
    }
    __device__ static void expect(ptx::mbarrier_t* barrier, uint32_t bytes) {
#if MK_CLUSTERS
        ptx::expect(barrier, bytes);
#endif
    }
    __device__ static void wait(ptx::mbarrier_t* barrier, uint32_t parity) {
#if MK_CLUSTERS
        ptx::wait(barrier, parity);
#endif
    }
    __device__ static void put(uint64_t* to, uint64_t word, ptx::mbarrier_t* barrier, int rank) {
#if MK_CLUSTERS
        ptx::put(to, word, barrier, rank);
#endif
    }
    __device__ static void started() {
#if MK_CLUSTERS
        ptx::cluster_wait();
#endif
    }
    template <typename T>
    __device__ static T* of(T* shared, int rank) {
#if MK_CLUSTERS
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

}  // namespace medusa_kernels::gpu
