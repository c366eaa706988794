// What a block of Hopper's tree attention does, and where its tiles lie in shared memory.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "arrivals.h"
#include "tree_attention_sm90_args.h"
#include "tree_attention_sm90_ptx.h"

namespace medusa_kernels::sm90 {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr float kLn2 = 0.6931471805599453f;

// Named barriers: of the warpgroup that copies, of those that compute, and of the block, once its
// tiles' memory is free. Two, by warpgroup, of those that compute and take turns to begin matrix
// products (FlashAttention-3's ping-pong): left alone they fall into step, both in their softmax at
// once, which costs up to 20%.
constexpr int kCopyBarrier = 1, kComputeBarrier = 2, kBlockBarrier = 3, kTurnBarriers = 5;

// Blocks of a row block that have their part, or row blocks that blocks which stay have drawn; 0
// between launches.
static __device__ uint32_t split_arrivals[2 * kArrivals];

constexpr int kMostCluster = 8;          // splits that merge in a cluster
constexpr int kMostStages = 12;          // of the ring of tiles
constexpr int kFree = kMostStages * 16;  // from its barriers to those that say that a tile is free
constexpr int kKeys = 64;                // of a tile, which lies as [D / 64][keys][64]
constexpr int kHalfBytes = 128 * kKeys;  // 64 dims of a tile

// A place in the ring of tiles, and the parity of the phase in which it is filled.
struct Ring {
    int stage = 0;
    uint32_t phase = 0;

    template <int kStep>
    __device__ __forceinline__ void advance(int stages) {
        stage += kStep;
        if (stage >= stages) {
            stage -= stages;
            phase ^= 1;
        }
    }
    __device__ __forceinline__ void advance(const Divisor& stages, int count) {
        const int rounds = (stage + count) / stages;
        stage += count - rounds * stages.value;
        phase ^= rounds & 1;
    }
};

// The barrier that says that K's (0) or V's (1) tile there is full; or, 2 further on, free.
__device__ __forceinline__ uint32_t barrier_of(uint32_t barriers, int v, const Ring& ring) {
    return barriers + (v * kMostStages + ring.stage) * 8;
}

// T: of q, k, v and the results. Fp8: the cache's, e4m3, which fp16 holds exactly. Cluster: a row
// block's splits are one, and merge in its shared memory; else through the GPU's.
template <typename T_, int kDim_, int kGroups_, bool kFp8_, bool kCluster_ = false>
struct Config {
    using T = T_;
    static constexpr bool kFp8 = kFp8_;
    using Operand = std::conditional_t<kFp8, __half, T>;  // of products with V
    using Cached = std::conditional_t<kFp8, uint8_t, T>;
    static constexpr int kDim = kDim_;
    static constexpr int kGroups = kGroups_;  // of 64 rows
    static constexpr bool kCluster = kCluster_;
    // One warpgroup computes, for what the memory bounds: two blocks share a multiprocessor, with a
    // short ring and few tiles each.
    static constexpr bool kSmall = kGroups == 1 && !kFp8;
    static_assert(!kCluster || kSmall);
    static constexpr int kRows = 64 * kGroups;
    // Where the ring is short the tail comes third, as it takes longest to copy; else last.
    static constexpr bool kTailThird = kSmall;
    // Whether a tile's softmax has the next one's scores under it as well. Where products bound
    // that pays; elsewhere less code does (Consumer::attend_in_turn).
    static constexpr bool kPipelined = kGroups == 2;
    static constexpr bool kStay = kPipelined;  // more would not fit a small block's registers
    // Warpgroups that compute. Two that share 64 rows take tiles in turn: one alone would be slower
    // than half of the bytes.
    static constexpr int kComputing = kFp8 ? 2 : kGroups;
    static constexpr bool kShares = kComputing > kGroups;
    static constexpr int kStep = kShares ? 2 : 1;    // from a warpgroup's tile to its next one
    static constexpr int kProducers = kFp8 ? 2 : 1;  // for fp8, one that converts
    static constexpr int kThreads = (kComputing + kProducers) * kGroupThreads;
    static constexpr int kBlocks = kSmall ? 2 : 1;
    // A thread's; at entry all have as many, and none grows beyond what another has given away.
    static constexpr int kEntryRegisters = 65536 / kBlocks / kThreads / 8 * 8;
    static constexpr int kConsumerRegisters = kBlocks == 2             ? 192
                                              : kEntryRegisters == 128 ? 208
                                                                       : 216;
    static constexpr int kProducerRegisters = kBlocks == 2 ? 64 : kEntryRegisters == 128 ? 48 : 72;
    static_assert(kComputing * kConsumerRegisters + kProducers * kProducerRegisters <=
                  (kComputing + kProducers) * kEntryRegisters);
    static constexpr int kTerms = kFp8 ? 2 : 1;  // matrices that make up Q
    // At the barrier of a tile that is full: one thread for all; all where others read with plain
    // loads what these have stored, an order that compute-sanitizer's racecheck must see.
    static constexpr int kFullArrivals = kFp8 ? kGroupThreads : 1;
    // Of a row of K or V as it comes, and of a tile.
    static constexpr int kRowBytes = kDim * (kFp8 ? 1 : 2);
    static constexpr int kTileBytes = kKeys * kRowBytes;
    static constexpr int kConverted = kFp8 ? 5 : 0;  // stages of the ring of V as fp16
    static constexpr int kConvertedBytes = kKeys * kDim * 2;
    // A warpgroup still has V of its last tile when it waits for what its next one needs.
    static constexpr int kLeastStages = kFp8 ? 4 : 2 * kStep + 1;
    static_assert(!kFp8 || kConverted >= 2 * kStep + 1);
    // From the V of a stage to the next one's, in the ring that is multiplied.
    static constexpr int kVStep = kFp8 ? kConvertedBytes : 2 * kTileBytes;

    // Shared memory, from a multiple of 1024 on: barriers of both rings, `Next`, the barrier at
    // which a cluster's results arrive, converted tiles, of each stage K and V, and these results.
    static constexpr int kConvertedBarriers = 4 * kMostStages * 8;
    // From the barriers of the V that is multiplied to those that say that it is free.
    static constexpr int kFreeV = kFp8 ? kConverted * 8 : kFree;
    static constexpr int kNext = kConvertedBarriers + 2 * kConverted * 8;
    static constexpr int kArrived = kNext + 24;
    static constexpr int kConvertedTiles = 1024;
    static constexpr int kTiles = kConvertedTiles + kConverted * kConvertedBytes;
    // What splits of a cluster exchange: parts of 16 rows and an eighth of the dims, and of these
    // rows references and sums. Of all splits a block merges at most 6 parts of 6 splits.
    static constexpr int kPartBytes = kDim / 64 * 32 * 16 + 8 * 16;
    static constexpr int kMostParts = 36;
    static constexpr int shared_bytes(int stages) {
        return 1024 + kTiles + 2 * stages * kTileBytes + (kCluster ? kMostParts * kPartBytes : 0);
    }
    static_assert(kArrived + 8 <= kConvertedTiles);
    // Where K (0) or V (1) lies in the ring, as it comes.
    __device__ __forceinline__ static uint32_t tile(uint32_t tiles, int v, const Ring& ring) {
        return tiles + (2 * ring.stage + v) * kTileBytes;
    }
};

// What a block does: these rows of a KV head and tiles [lo, hi), of which those below `whole` hold
// committed tokens alone. Those from `tail` on hold more than the cache does, or are not whole.
struct Work {
    int batch, head_kv, first_row;
    int split;
    int length, nodes, keys;
    int whole, lo, hi;

    // Which rows. The grid has the first splits of all row blocks first: where shorter requests
    // have no others, blocks with work do not share a multiprocessor while others have none.
    template <typename C>
    __device__ __forceinline__ void set_rows(const AttentionParams& p, int row_block) {
        const int head = row_block / p.row_blocks;
        batch = head / p.heads_kv;
        head_kv = head - batch * p.heads_kv.value;
        first_row = (row_block - head * p.row_blocks.value) * C::kRows;
        split = blockIdx.y;
    }

    // Has the L2 ask memory for them: where they were written before does not matter.
    __device__ __forceinline__ void prefetch_lengths(const AttentionParams& p) const {
        prefetch_l2(p.cache_seqlens + batch);
        if (p.num_nodes) prefetch_l2(p.num_nodes + batch);
    }

    // Begins to load their request's lengths, which `set_tiles` needs.
    __device__ __forceinline__ void load_lengths(const AttentionParams& p) {
        nodes = 0;  // not p.size, which would make who comes next wait for the other
        if (p.num_nodes) nodes = p.num_nodes[batch];
        length = p.cache_seqlens[batch];
        // Else the length would be asked for once the number of nodes is there, and is not 0.
        pin(nodes);
        pin(length);
    }

    __device__ __forceinline__ void set_tiles(const AttentionParams& p) {
        // Clamped, so that no value reaches outside the cache.
        if (!p.num_nodes) nodes = p.size;
        nodes = min(min(max(nodes, 0), p.size), p.capacity);
        length = nodes > 0 ? min(max(length, 0), p.capacity - nodes) : 0;
        keys = length + nodes;
        const int tiles = tiles_of(keys + kKeys - 1);
        whole = tiles_of(length);
        const Divisor splits = this->splits(p);
        // The last split, whose tiles hold the nodes, has none too many.
        const int more = splits.value - 1;
        lo = (tiles * split + more) / splits;
        hi = (tiles * (split + 1) + more) / splits;
    }

    // Of its row blocks, by the request's length.
    __device__ __forceinline__ Divisor splits(const AttentionParams& p) const {
        const int tiles = tiles_of(keys + kKeys - 1);
        Divisor splits = p.level_splits[0];
#pragma unroll
        for (int i = 1; i < kLevels; ++i) {
            if (tiles <= p.level_tiles[i]) splits = p.level_splits[i];
        }
        return splits;
    }

    // Whether this block has no part of its row block: the grid is for the longest request.
    __device__ __forceinline__ bool idle(const AttentionParams& p) const {
        return split >= splits(p).value;
    }
    // Whether it has one of several, which are to be merged.
    __device__ __forceinline__ bool merges(const AttentionParams& p) const {
        return splits(p).value > 1 && !idle(p);
    }

    // Whole ones. (A signed division would take three instructions.)
    __device__ __forceinline__ static int tiles_of(int keys) { return unsigned(keys) / kKeys; }

    __device__ __forceinline__ int count() const { return hi - lo; }

    // The first tile of the tail; those before it are what the cache holds.
    __device__ __forceinline__ int tail(const AttentionParams& p) const {
        return min(max(p.new_rows[0] ? whole : tiles_of(keys), lo), hi);
    }
    // The end of the tiles that come before the tail.
    template <typename C>
    __device__ __forceinline__ int head(const AttentionParams& p) const {
        return C::kTailThird ? min(tail(p), lo + 2) : tail(p);
    }

    // What K's (0) or V's numbers in an fp8 cache are to be multiplied with.
    __device__ __forceinline__ float cache_scale(const AttentionParams& p, int v) const {
        return p.scales[v] ? p.scales[v][head_kv * p.scale_stride] : 1.0f;
    }
};

// The number of the row block that a block which stays goes on with: one thread draws it and leaves
// it in shared memory, behind a barrier that says that it is there and one that all have read it.
struct Next {
    const AttentionParams& p;
    uint32_t full;
    uint32_t phase = 0;

    __device__ __forceinline__ uint32_t free() const { return full + 8; }
    __device__ __forceinline__ uint32_t number() const { return full + 16; }

    // By one thread; each launch draws `items` times in all.
    __device__ __forceinline__ void draw() const {
        const uint32_t drawn = atomicInc(split_arrivals + p.first_arrival, p.items - 1);
        barrier_wait(free(), phase ^ 1);
        store_shared(number(), gridDim.x + drawn);
        barrier_arrive(full);
    }
    __device__ __forceinline__ int take() {
        barrier_wait(full, phase);
        phase ^= 1;
        return static_cast<int>(load_shared(number()));
    }
    // By the threads of another warpgroup than that thread's: says that it has read it, too.
    __device__ __forceinline__ int take_and_free() {
        const int item = take();
        barrier_arrive(free());
        return item;
    }
};

// Rows of a row block that are there, the last one's being fewer.
template <typename C>
__device__ __forceinline__ int num_rows(const AttentionParams& p, const Work& w) {
    return min(C::kRows, p.size * p.group.value - w.first_row);
}

// Where the results of a row of a row block go.
struct RowPlace {
    int node;
    bool exists;
    int64_t out, lse;
};

__device__ __forceinline__ RowPlace row_place(const AttentionParams& p, const Work& w, int row) {
    const int of_head = w.first_row + row, node = of_head / p.group;
    const int head = w.head_kv * p.group.value + of_head - node * p.group.value;
    return {node, node < p.size,
            w.batch * p.out_strides.block + node * p.out_strides.slot + head * p.out_strides.head,
            (int64_t(w.batch) * p.heads_kv.value * p.group.value + head) * p.size + node};
}

}  // namespace medusa_kernels::sm90
