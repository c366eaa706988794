// Which row of a KV cache moves where when a tree is compacted to its accepted path: the same code
// in the CUDA kernel and in the C++ one. Nothing here trusts a value that comes from a tensor.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MK_HD __host__ __device__ __forceinline__
#else
#define MK_HD inline
#endif

namespace medusa_kernels {

constexpr int kMaxNodes = 512;  // of a tree
constexpr int kMaxOuterDims = 2;

// Where the slots of every request are. Contiguous: first = request, second = slot. Paged: first =
// block, second = slot in the block, and the block table says which block holds slot s of request
// b: block_table[b][s / block_size].
struct KvSlots {
    int32_t num_first, num_second;  // [B, S] or [num_blocks, block_size]
    const int32_t* block_table;     // [B, max_blocks] or nullptr
    int64_t block_table_stride;     // in elements
    int32_t max_blocks;

    MK_HD int64_t capacity() const {  // slots of a request
        return block_table ? int64_t(max_blocks) * num_second : num_second;
    }
};

// How the bytes of one row (all of a tensor at one slot) lie: outer_size[1] x outer_size[0] runs of
// `run` contiguous vectors of vector_bytes each. Strides in bytes.
struct KvLayout {
    int64_t stride_first, stride_second;
    int64_t outer_stride[kMaxOuterDims];
    int32_t outer_size[kMaxOuterDims];
    int32_t run;
    int32_t vector_bytes;  // 16, 8, 4, 2 or 1

    MK_HD int32_t columns() const { return run * outer_size[0] * outer_size[1]; }

    // Byte offset of a column (0 .. columns() - 1) in a row.
    MK_HD int64_t column_offset(int32_t column) const {
        const int32_t outer = column / run;
        const int32_t outer_1 = outer / outer_size[0];
        return int64_t(column - outer * run) * vector_bytes +
               int64_t(outer - outer_1 * outer_size[0]) * outer_stride[0] +
               outer_1 * outer_stride[1];
    }

    friend bool operator==(const KvLayout&, const KvLayout&) = default;
};

// Byte offsets of two rows from the start of a tensor; from < 0: nothing moves.
struct Move {
    int64_t from, to;
};

// Indices of a slot in a tensor's first two dimensions; first = -1 if the cache has no such slot.
struct Place {
    int32_t first, second;
};

MK_HD Place find_slot(const KvSlots& slots, int request, int64_t slot) {
    const bool inside = slot >= 0 && slot < slots.capacity();
    const int32_t at = inside ? static_cast<int32_t>(slot) : 0;
    if (!slots.block_table) return {inside ? request : -1, at};
    const int32_t block = at / slots.num_second;
    const int32_t first = slots.block_table[request * slots.block_table_stride + block];
    const bool legal = inside && first >= 0 && first < slots.num_first;
    return {legal ? first : -1, at - block * slots.num_second};
}

// Entries of the path that count: the root and accept_length nodes; none of a padded request
// (accept_length -1).
MK_HD int kept_nodes(int accept_length, int path_size) {
    return accept_length < 0 ? 0 : accept_length < path_size ? accept_length + 1 : path_size;
}

// The move that entry i of a path asks for: slot length + i <- slot length + node.
//
// In place, entry after entry, this is right: a move needs node > i, so that its source lies above
// every destination before it (length + 0 .. length + i - 1) and no row is overwritten before it is
// read. A path strictly increases from path[0] >= 0, so path[i] >= i holds for every real one;
// path[i] == i is a row that stays. Any other value is skipped.
MK_HD Move plan_move(const KvSlots& slots, const KvLayout& layout, int request, int length, int i,
                     int node) {
    if (node <= i || node >= kMaxNodes || length < 0) return {-1, -1};
    const Place from = find_slot(slots, request, int64_t(length) + node);
    const Place to = find_slot(slots, request, int64_t(length) + i);
    if (from.first < 0 || to.first < 0) return {-1, -1};
    return {from.first * layout.stride_first + from.second * layout.stride_second,
            to.first * layout.stride_first + to.second * layout.stride_second};
}

// The request's committed tokens afterwards; a length that the cache cannot have stays as it is.
MK_HD int32_t new_length(const KvSlots& slots, int32_t length, int kept) {
    if (length < 0 || length > slots.capacity()) return length;
    const int64_t sum = int64_t(length) + kept;
    return static_cast<int32_t>(sum < slots.capacity() ? sum : slots.capacity());
}

}  // namespace medusa_kernels
