// How the splits of a row block become one in Hopper's tree attention.
#pragma once

#include "tree_attention_sm90_work.h"

namespace medusa_kernels::sm90 {

// Merges this block's share of the splits' results, in the order of the splits, and writes it. A
// warp takes 16 rows of a quarter of the dims at a time, of which a thread has two rows that are 8
// apart, and two dims of each 8.
//
// partial, stats: [splits, rows / 16, D / 8, 32] and [splits, rows], of each row a reference and a
// sum; nothing of it may come out of the L1
// wait: until all of it is there; what does not depend on it is done before
template <typename C, typename Wait>
__device__ __forceinline__ void merge(const AttentionParams& p, const Work& w,
                                      const float4* partial, const float2* stats, int warp,
                                      int lane, Wait&& wait) {
    using T = typename C::T;
    constexpr int kColumns = C::kDim / 32;          // of 8 dims
    constexpr int kSplit = C::kRows * C::kDim / 4;  // of one split's results
    constexpr int kSplits = 8;                      // at once
    const int parts = (num_rows<C>(p, w) + 15) / 16 * 4;
    const int last = parts * (w.split + 1) / p.num_splits;
    int part = parts * w.split / p.num_splits + warp;
    RowPlace place[2];
    const auto set_places = [&] {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            place[r] = row_place(p, w, part / 4 * 16 + lane / 4 + r * 8);
            pin(place[r].out);
        }
    };
    set_places();
    const float v_scale = C::kFp8 ? w.cache_scale(p, 1) : 1.0f;
    wait();
#pragma unroll 1
    while (part < last) {
        const float4* from = partial + part * kColumns * 32 + lane;
        const float2* stat = stats + part / 4 * 16 + lane / 4;
        float total[2][kColumns][2] = {}, reference[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll 1
        for (int left = p.num_splits.value; left > 0; left -= kSplits) {
            float4 x[kSplits][kColumns];
            float2 its[2][kSplits];
#pragma unroll
            for (int i = 0; i < kSplits; ++i) {
                its[0][i] = its[1][i] = {-INFINITY, 0.0f};
                if (i < left) {
                    its[0][i] = __ldcg(stat + i * C::kRows);
                    its[1][i] = __ldcg(stat + i * C::kRows + 8);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) x[i][j] = __ldcg(from + i * kSplit + j * 32);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float moved = reference[r];
#pragma unroll
                for (int i = 0; i < kSplits; ++i) moved = fmaxf(moved, its[r][i].x);
                const float base = moved == -INFINITY ? 0.0f : moved;
                const float shrink = exp2_approx(reference[r] - base);
                reference[r] = moved;
                sum[r] *= shrink;
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    total[r][j][0] *= shrink;
                    total[r][j][1] *= shrink;
                }
#pragma unroll
                for (int i = 0; i < kSplits; ++i) {
                    if (i >= left) break;
                    const float weight = exp2_approx(its[r][i].x - base);
                    sum[r] = fmaf(its[r][i].y, weight, sum[r]);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const float4& y = x[i][j];
                        total[r][j][0] = fmaf(r ? y.z : y.x, weight, total[r][j][0]);
                        total[r][j][1] = fmaf(r ? y.w : y.y, weight, total[r][j][1]);
                    }
                }
            }
            from += kSplits * kSplit;
            stat += kSplits * C::kRows;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!place[r].exists) continue;
            const bool real = place[r].node < w.nodes && sum[r] != 0.0f;  // NaN stays NaN
            const float norm = real ? v_scale / sum[r] : 0.0f;
            T* to = static_cast<T*>(p.out) + place[r].out + part % 4 * kColumns * 8 + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                *reinterpret_cast<uint32_t*>(to + j * 8) =
                    real ? pack<T>(total[r][j][0] * norm, total[r][j][1] * norm) : 0;
            }
            if (p.lse && part % 4 == 0 && lane % 4 == 0) {
                p.lse[place[r].lse] = real ? (reference[r] + log2f(sum[r])) * kLn2 : -INFINITY;
            }
        }
        part += C::kComputing * 4;
        if (part < last) set_places();
    }
}

}  // namespace medusa_kernels::sm90
