// How the splits of a row block become one in Hopper's tree attention.
#pragma once

#include "tree_attention_sm90_work.h"

namespace medusa_kernels::sm90 {

constexpr int kMostSplits = 64;

// What a block does once all splits of its row block are in memory: it merges its share of them, in
// the order of the splits, and writes it. The share is parts of 16 rows and a quarter of the dims.
// A warp takes four splits of a part at a time, of D 64 eight: a unit, which is 16 loads of a
// thread. Where there are more splits, what the units of a part come to meets in shared memory.
template <typename C>
struct Merge {
    using T = typename C::T;
    static constexpr int kColumns = C::kDim / 32;          // of 8 dims, of a part
    static constexpr int kSplit = C::kRows * C::kDim / 4;  // of one split's results
    static constexpr int kSplits = 512 / C::kDim;          // of a unit
    static constexpr int kWarps = C::kComputing * 4;
    static constexpr int kUnitBytes = (kColumns + 1) * 32 * 16;
    // Of a block, where parts are more than one: two of 8 where 29 splits share 128 rows, one
    // of 16.
    static constexpr int kMostUnits = kMostSplits / kSplits;
    static_assert(kMostUnits * kUnitBytes <= 2 * C::kLeastStages * C::kTileBytes);

    // Of two rows that are 8 apart, as a thread has them: two dims of each 8, of the first row,
    // then of the second; what the rows' exponents refer to, and the sums of these.
    struct Rows {
        float4 total[kColumns] = {};
        float reference[2] = {-INFINITY, -INFINITY}, sum[2] = {};

        __device__ __forceinline__ void add(int column, const float4& x, const float (&weight)[2]) {
            float4& t = total[column];
            t = {fmaf(x.x, weight[0], t.x), fmaf(x.y, weight[0], t.y), fmaf(x.z, weight[1], t.z),
                 fmaf(x.w, weight[1], t.w)};
        }
    };

    const AttentionParams& p;
    const Work& w;
    const float4* partial;  // [splits, rows / 16, D / 8, 32]
    const float2* stats;    // [splits, rows]: reference and sum; nothing of either in the L1
    uint32_t shared;        // memory of kMostUnits
    int warp, lane;
    Divisor splits;
    int first, count, units;  // parts; their units
    RowPlace place[2];        // of the part that is written next
    float v_scale;

    // What does not depend on the splits.
    __device__ __forceinline__ void begin() {
        splits = w.splits(p);
        const int parts = (num_rows<C>(p, w) + 15) / 16 * 4;
        first = parts * w.split / splits;
        count = parts * (w.split + 1) / splits - first;
        units = count * ((splits.value + kSplits - 1) / kSplits);
        find_place(warp);
        v_scale = C::kFp8 ? w.cache_scale(p, 1) : 1.0f;
    }

    __device__ __forceinline__ void find_place(int part) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            place[r] = row_place(p, w, (first + part) / 4 * 16 + lane / 4 + r * 8);
            pin(place[r].out);
        }
    }

    // Of this thread: the i-th 16 bytes of what a unit comes to.
    __device__ __forceinline__ uint32_t place_of(int unit, int i) const {
        return shared + unit * kUnitBytes + (i * 32 + lane) * 16;
    }

    // A unit's splits. Units are in the order of the splits, and of parts.
    __device__ __forceinline__ Rows merge_splits(int unit) const {
        int part = unit, split = 0;
        for (; part >= count; part -= count) split += kSplits;
        part += first;
        const float4* from = partial + split * kSplit + part * kColumns * 32 + lane;
        const float2* stat = stats + split * C::kRows + part / 4 * 16 + lane / 4;
        float4 x[kSplits][kColumns] = {};
        float2 its[2][kSplits];
#pragma unroll
        for (int i = 0; i < kSplits; ++i) {
            its[0][i] = its[1][i] = {-INFINITY, 0.0f};
            if (split + i < splits.value) {
                its[0][i] = __ldcg(stat + i * C::kRows);
                its[1][i] = __ldcg(stat + i * C::kRows + 8);
#pragma unroll
                for (int j = 0; j < kColumns; ++j) x[i][j] = __ldcg(from + i * kSplit + j * 32);
            }
        }
        Rows rows;
        float weight[kSplits][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < kSplits; ++i) {
                rows.reference[r] = fmaxf(rows.reference[r], its[r][i].x);
            }
            const float base = rows.reference[r] == -INFINITY ? 0.0f : rows.reference[r];
#pragma unroll
            for (int i = 0; i < kSplits; ++i) {
                weight[i][r] = exp2_approx(its[r][i].x - base);
                rows.sum[r] = fmaf(its[r][i].y, weight[i][r], rows.sum[r]);
            }
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int i = 0; i < kSplits; ++i) rows.add(j, x[i][j], weight[i]);
        }
        return rows;
    }

    __device__ __forceinline__ void leave(const Rows& rows, int unit) const {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) store_shared(place_of(unit, j), rows.total[j]);
        store_shared(place_of(unit, kColumns),
                     float4{rows.reference[0], rows.reference[1], rows.sum[0], rows.sum[1]});
    }

    // A part's units.
    __device__ __forceinline__ Rows merge_units(int part) const {
        Rows rows;
#pragma unroll 1
        for (int unit = part; unit < units; unit += count) {
            const float4 its = load_shared_float4(place_of(unit, kColumns));
            const float its_reference[2] = {its.x, its.y}, its_sum[2] = {its.z, its.w};
            float keep[2], weight[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float moved = fmaxf(rows.reference[r], its_reference[r]);
                const float base = moved == -INFINITY ? 0.0f : moved;
                keep[r] = exp2_approx(rows.reference[r] - base);
                weight[r] = exp2_approx(its_reference[r] - base);
                rows.reference[r] = moved;
                rows.sum[r] = fmaf(its_sum[r], weight[r], rows.sum[r] * keep[r]);
            }
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                const float4 before = rows.total[j];
                rows.total[j] = {};
                rows.add(j, before, keep);
                rows.add(j, load_shared_float4(place_of(unit, j)), weight);
            }
        }
        return rows;
    }

    __device__ __forceinline__ void write(const Rows& rows, int part) const {
        const int quarter = (first + part) % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!place[r].exists) continue;
            const float sum = rows.sum[r];
            const bool real = place[r].node < w.nodes && sum != 0.0f;  // NaN stays NaN
            const float norm = real ? v_scale * reciprocal(sum) : 0.0f;
            T* to = static_cast<T*>(p.out) + place[r].out + quarter * kColumns * 8 + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                const float4& t = rows.total[j];
                *reinterpret_cast<uint32_t*>(to + j * 8) =
                    real ? pack<T>((r ? t.z : t.x) * norm, (r ? t.w : t.y) * norm) : 0;
            }
            if (p.lse && quarter == 0 && lane % 4 == 0) {
                p.lse[place[r].lse] = real ? (rows.reference[r] + log2f(sum)) * kLn2 : -INFINITY;
            }
        }
    }

    // Once all splits are there. One loop for both of its passes, so that `write` is there once.
    __device__ __forceinline__ void run() {
        const bool one_pass = units == count;  // each part is one unit
        bool writes = one_pass;                // else the first pass leaves what it comes to
        int part = warp;                       // or unit, in a first pass
#pragma unroll 1
        for (;;) {
            if (part >= (writes ? count : units)) {
                if (writes) break;
                sync_threads<kComputeBarrier, kWarps * 32>();
                writes = true;
                part = warp;
                continue;
            }
            Rows rows;
            if (writes && !one_pass) {
                rows = merge_units(part);
            } else {
                rows = merge_splits(part);
            }
            if (!writes) {
                leave(rows, part);
            } else {
                if (part != warp) find_place(part);
                write(rows, part);
            }
            part += kWarps;
        }
    }
};

}  // namespace medusa_kernels::sm90
