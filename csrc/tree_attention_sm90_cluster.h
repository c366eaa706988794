// How the splits of a row block become one in Hopper's tree attention where they are a cluster of
// blocks: each sends its results to the shared memory of the blocks that merge them, in a third of
// the time that it takes through the GPU's memory (tree_attention_sm90_merge.h).
#pragma once

#include "tree_attention_sm90_consumer.h"
#include "tree_attention_sm90_work.h"

namespace medusa_kernels::sm90 {

// Results are exchanged in parts of 16 rows and an eighth of the dims. Of s splits, block b merges
// parts b, b + s, ..., a warp one at a time. A part lies as [D / 64][32] of what a thread has of
// the accumulator, then, of 8 times two rows, their references and sums; parts as [this
// block's][splits].
template <typename C>
struct ClusterMerge {
    using T = typename C::T;
    static constexpr int kWarps = 4, kColumns = 8;  // of parts
    static constexpr int kWide = C::kDim / 64;      // a part's columns of 8 dims
    static constexpr int kStats = kWide * 32 * 16;  // from a part to its rows' references and sums

    const AttentionParams& p;
    Consumer<C>& consumer;
    const Work& w;
    uint32_t arrived, parts;  // the barrier, and where parts lie
    int warp, lane;
    Divisor splits;
    int rows, merged;                             // in all, parts by this block
    uint32_t to[kColumns], to_barrier[kColumns];  // where this warp's parts go
    RowPlace place[2];                            // of the part that is written next

    __device__ __forceinline__ uint32_t place_of(int mine, int split) const {
        return parts + (mine * splits.value + split) * C::kPartBytes;
    }

    __device__ __forceinline__ float4 of_columns(int column) const {
        const float* from = consumer.out + column * 4;
        return {from[0], from[1], from[2], from[3]};
    }

    // What does not depend on the results, while the first tile comes.
    __device__ __forceinline__ void begin() {
        if (!w.merges(p)) return;
        splits = w.splits(p);
        rows = num_rows<C>(p, w);
        const int count = (rows + 15) / 16 * kColumns;
        merged = (count + splits.value - 1 - w.split) / splits;
        if (threadIdx.x == 0) barrier_expect(arrived, merged * splits.value * C::kPartBytes);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int part = warp * kColumns + i, mine = part / splits;
            const int block = part - mine * splits.value;
            to[i] = in_block(place_of(mine, w.split) + lane * 16, block);
            to_barrier[i] = in_block(arrived, block);
            pin(to[i]);
            pin(to_barrier[i]);
        }
    }

    // What this warp has of this split.
    __device__ __forceinline__ void send() const {
        const float4 stats = {consumer.reference(0), consumer.row_sum(0), consumer.reference(1),
                              consumer.row_sum(1)};
        const int to_stats = kStats + (lane / 4 - lane) * 16;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                store_async(to[i] + j * 32 * 16, of_columns(i * kWide + j), to_barrier[i]);
            }
            if (lane % 4 == i % 4) store_async(to[i] + to_stats, stats, to_barrier[i]);
        }
    }

    __device__ __forceinline__ void find_place(int part) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            place[r] = row_place(p, w, part / kColumns * 16 + lane / 4 + r * 8);
            pin(place[r].out);
        }
    }

    // All splits' of a part, in their order, and writes it.
    __device__ __forceinline__ void merge(int mine, int part) const {
        float4 x[kMostCluster][kWide] = {}, its[kMostCluster];
        uint32_t from = place_of(mine, 0), from_stats = from + kStats + lane / 4 * 16;
        from += lane * 16;
        pin(from);
        pin(from_stats);
#pragma unroll
        for (int i = 0; i < kMostCluster; ++i) {
            its[i] = {-INFINITY, 0.0f, -INFINITY, 0.0f};
            if (i < splits.value) {
                its[i] = load_shared_float4(from_stats + i * C::kPartBytes);
#pragma unroll
                for (int j = 0; j < kWide; ++j) {
                    x[i][j] = load_shared_float4(from + i * C::kPartBytes + j * 32 * 16);
                }
            }
        }
        float reference[2] = {-INFINITY, -INFINITY}, sum[2] = {}, weight[kMostCluster][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < kMostCluster; ++i) {
                reference[r] = fmaxf(reference[r], r ? its[i].z : its[i].x);
            }
            const float base = reference[r] == -INFINITY ? 0.0f : reference[r];
#pragma unroll
            for (int i = 0; i < kMostCluster; ++i) {
                weight[i][r] = exp2_approx((r ? its[i].z : its[i].x) - base);
                sum[r] = fmaf(r ? its[i].w : its[i].y, weight[i][r], sum[r]);
            }
        }
        float total[kWide][4] = {};
#pragma unroll
        for (int i = 0; i < kMostCluster; ++i) {
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                const float4& y = x[i][j];
                total[j][0] = fmaf(y.x, weight[i][0], total[j][0]);
                total[j][1] = fmaf(y.y, weight[i][0], total[j][1]);
                total[j][2] = fmaf(y.z, weight[i][1], total[j][2]);
                total[j][3] = fmaf(y.w, weight[i][1], total[j][3]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!place[r].exists) continue;
            const bool real = place[r].node < w.nodes && sum[r] != 0.0f;  // NaN stays NaN
            const float norm = real ? reciprocal(sum[r]) : 0.0f;
            T* to =
                static_cast<T*>(p.out) + place[r].out + part % kColumns * kWide * 8 + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                *reinterpret_cast<uint32_t*>(to + j * 8) =
                    real ? pack<T>(total[j][r * 2] * norm, total[j][r * 2 + 1] * norm) : 0;
            }
            if (p.lse && part % kColumns == 0 && lane % 4 == 0) {
                p.lse[place[r].lse] = real ? (reference[r] + log2f(sum[r])) * kLn2 : -INFINITY;
            }
        }
    }

    // By the threads that have computed, all blocks' barriers being there. A block ends once what
    // is for it has arrived: nobody sends to one that has ended, nor reads what it has.
    __device__ __forceinline__ void run() {
        if (!w.merges(p)) return;
        if (warp * 16 < rows) send();
        find_place(w.split + warp * splits.value);
        barrier_wait(arrived, 0);  // an acquire of the cluster's would empty the L1 as well
#pragma unroll 1
        for (int mine = warp; mine < merged; mine += kWarps) {
            const int part = w.split + mine * splits.value;
            if (mine != warp) find_place(part);
            merge(mine, part);
        }
    }
};

}  // namespace medusa_kernels::sm90
