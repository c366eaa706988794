// The arguments of Hopper's tree attention, and the maps by which the TMA reads the caches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "checks.h"

namespace medusa_kernels {

// Of a tensor [batch or block, node or slot, head, D], in elements; D is contiguous. 0 where there
// is one at most.
struct RowStrides {
    int64_t block, slot, head;
};

// Splits are by a request's length: levels, longest first, the first for any length, others for up
// to so many tiles.
constexpr int kLevels = 3;

// All of a call but its addresses. `_Plan` in medusa_kernels/_sm90.py has the same fields, and has
// checked that the kernel can serve them.
struct AttentionPlan {
    int64_t bytes;  // of this struct
    int64_t device;
    int64_t half;  // else bfloat16
    int64_t fp8;   // a cache of e4m3
    int64_t batch, size, heads_kv, group, dim;
    int64_t num_blocks, block_size, max_blocks;  // max_blocks: of a request; 0: not paged
    int64_t words;                               // of a row's mask
    int64_t groups;                              // of 64 rows in a row block
    int64_t row_blocks;                          // of a KV head
    int64_t num_splits;                          // of a row block, the most of all levels
    int64_t level_tiles[kLevels], level_splits[kLevels];
    int64_t cluster;   // whether a row block's splits are one
    int64_t stages;    // of the ring of tiles
    int64_t resident;  // blocks that the device holds at once
    RowStrides q, k_cache, v_cache, k, v, out;
    int64_t mask_stride, table_stride;  // of a request
    int64_t scale_stride;               // of a KV head's scales
    double scale;                       // of scores, for exponents of 2
};

// Where a call's tensors lie, in the order of tree_attention's launch; 0: None.
enum Address {
    kQ,
    kKCache,
    kVCache,
    kK,
    kV,
    kMask,
    kDepths,
    kNumNodes,
    kCacheSeqlens,
    kBlockTable,
    kSinks,
    kKScale,
    kVScale,
    kOut,
    kLse
};

// Divides by multiplying: x / value for 0 <= x and x * value < 2^32.
struct Divisor {
    int32_t value;
    uint32_t inverse;  // 2^32 / value, rounded up; 0 for 1
};

inline Divisor divisor(int64_t value) {
    const uint64_t inverse = ((uint64_t(1) << 32) + uint64_t(value) - 1) / uint64_t(value);
    return {static_cast<int32_t>(value), static_cast<uint32_t>(inverse)};
}

#ifdef __CUDACC__
__device__ __forceinline__ int operator/(int x, const Divisor& by) {
    return by.inverse ? static_cast<int>(__umulhi(x, by.inverse)) : x;
}
#endif

struct AttentionParams {
    const void* q;                 // [B, T, H, D]
    void* cache[2];                // K, V: [B or blocks, slots, Hkv, D]
    const void* new_rows[2];       // K, V of the tree's nodes: [B, T, Hkv, D], or null
    const uint64_t* mask;          // [B or 1, T, words]: bit j: the row's node attends to node j
    const int32_t* num_nodes;      // [B] or null
    const int32_t* cache_seqlens;  // [B]
    const int32_t* block_table;    // [B, max_blocks] or null
    const float* scales[2];        // K, V, of an fp8 cache: [1 or Hkv], or null
    void* out;                     // [B, T, H, D]
    float* lse;                    // [B, H, T] or null
    // Results of splits that merge through memory, or null: [row blocks, splits, rows * D / 4], and
    // of each row a reference and a sum.
    float4* partial;
    float2* stats;
    RowStrides q_strides, strides[2], new_strides[2], out_strides;
    int64_t mask_stride, table_stride;  // of a request
    int64_t scale_stride;               // of a KV head
    int32_t size;                       // T
    int32_t words;
    int32_t capacity;  // slots of a request
    int32_t num_blocks, page_shift;
    int32_t box_shift;  // log2 of the slots that the TMA copies at once
    Divisor heads_kv;
    Divisor group;       // query heads of a KV head
    Divisor num_splits;  // of a row block, the most of all levels
    int32_t level_tiles[kLevels];
    Divisor level_splits[kLevels];
    Divisor stages;         // of the ring of tiles
    Divisor row_blocks;     // of a KV head
    int32_t first_arrival;  // of this launch's counters in `split_arrivals`
    int32_t items;          // row blocks of all, drawn by blocks that stay; 0: a block for each
    float scale;            // of scores, for exponents of 2
};

inline AttentionParams attention_params(const AttentionPlan& plan, const uint64_t* addresses) {
    AttentionParams p{};
    const auto at = [&](Address which) { return reinterpret_cast<void*>(addresses[which]); };
    p.q = at(kQ);
    p.cache[0] = at(kKCache);
    p.cache[1] = at(kVCache);
    p.new_rows[0] = at(kK);
    p.new_rows[1] = at(kV);
    p.mask = static_cast<const uint64_t*>(at(kMask));
    p.num_nodes = static_cast<const int32_t*>(at(kNumNodes));
    p.cache_seqlens = static_cast<const int32_t*>(at(kCacheSeqlens));
    p.block_table = static_cast<const int32_t*>(at(kBlockTable));
    p.scales[0] = static_cast<const float*>(at(kKScale));
    p.scales[1] = static_cast<const float*>(at(kVScale));
    p.out = at(kOut);
    p.lse = static_cast<float*>(at(kLse));
    p.q_strides = plan.q;
    p.strides[0] = plan.k_cache;
    p.strides[1] = plan.v_cache;
    p.new_strides[0] = plan.k;
    p.new_strides[1] = plan.v;
    p.out_strides = plan.out;
    p.mask_stride = plan.mask_stride;
    p.table_stride = plan.table_stride;
    p.scale_stride = plan.scale_stride;
    p.size = static_cast<int32_t>(plan.size);
    p.heads_kv = divisor(plan.heads_kv);
    p.group = divisor(plan.group);
    p.words = static_cast<int32_t>(plan.words);
    p.num_blocks = static_cast<int32_t>(plan.num_blocks);
    p.capacity = static_cast<int32_t>(plan.block_size);
    p.num_splits = divisor(plan.num_splits);
    for (int i = 0; i < kLevels; ++i) {
        p.level_tiles[i] = static_cast<int32_t>(plan.level_tiles[i]);
        p.level_splits[i] = divisor(plan.level_splits[i]);
    }
    p.stages = divisor(plan.stages);
    p.row_blocks = divisor(plan.row_blocks);
    p.box_shift = 6;
    if (plan.max_blocks) {
        p.capacity *= static_cast<int32_t>(plan.max_blocks);
        p.page_shift = std::countr_zero(static_cast<uint64_t>(plan.block_size));
        p.box_shift = std::min(p.page_shift, p.box_shift);
    }
    p.scale = static_cast<float>(plan.scale);
    return p;
}

// Of K (0) or V (1): rows [blocks, Hkv, slots, D], in boxes of 128 bytes, or a row of less, of 1 <<
// box_shift slots. The L2 asks memory for 128 bytes at once: for 256, it would ask for both halves
// of a row with each of its two boxes, and lose 7%. Rows of 128 and of 64 bytes are swizzled as
// wgmma takes them, but for V of an fp8 cache, which is converted first.
inline CUtensorMap tensor_map(const AttentionPlan& plan, int v, const AttentionParams& p) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                        cudaEnableDefault, &result));
        MK_CHECK_VALUE(result == cudaDriverEntryPointSuccess,
                       "tree_attention: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(function);
    }();
    // A stride that is never used may not be 0 here.
    const int64_t bytes = plan.fp8 ? 1 : 2;
    const auto step = [&](int64_t stride) { return uint64_t(stride ? stride : plan.dim) * bytes; };
    const RowStrides& strides = p.strides[v];
    const uint64_t sizes[4] = {uint64_t(plan.dim), uint64_t(plan.block_size),
                               uint64_t(plan.heads_kv), uint64_t(plan.num_blocks)};
    const uint64_t steps[3] = {step(strides.slot), step(strides.head), step(strides.block)};
    const uint32_t box[4] = {plan.fp8 ? uint32_t(plan.dim) : 64, 1u << p.box_shift, 1, 1};
    const uint32_t every[4] = {1, 1, 1, 1};
    const CUtensorMapDataType type = plan.fp8    ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                     : plan.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUtensorMapSwizzle swizzle = plan.fp8 && v                ? CU_TENSOR_MAP_SWIZZLE_NONE
                                       : plan.fp8 && plan.dim == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                    : CU_TENSOR_MAP_SWIZZLE_128B;
    CUtensorMap map;
    const CUresult error =
        encode(&map, type, 4, p.cache[v], sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    MK_CHECK_VALUE(error == CUDA_SUCCESS, "k_cache: no TMA map of it, CUDA error ", int(error));
    return map;
}

}  // namespace medusa_kernels
