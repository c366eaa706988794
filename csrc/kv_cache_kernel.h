// compact_kv_cache on the GPU: its kernel. For nvcc; or for a C++ compiler, where
// tests/cuda_on_cpu/cuda_on_cpu.h has CUDA's names and those of arrivals.h.
#pragma once

#include "kv_cache_args.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "arrivals.h"
#else
#include "cuda_on_cpu.h"
#endif

namespace medusa_kernels::gpu {

constexpr int kThreads = 128;  // that move columns; one warp more writes the length
constexpr int kRows =
    8;  // in flight a thread: more than Medusa's depth of 5, so usually all of them
constexpr int kMaxLayouts = 8;

// Blocks of one request that have read its length; 0 between launches. Two halves: eager launches,
// captured ones.
__device__ uint32_t compact_arrivals[2 * kArrivals];

// A block moves kThreads columns of one tensor ("tile") for one request.
template <int kMaxCaches>
struct CompactParams {
    const int32_t* path;  // [batch, path_size]
    int64_t path_stride;
    const int32_t* accept_length;  // [batch]
    int32_t* cache_seqlens;        // [batch]
    KvSlots slots;
    int32_t path_size;
    int32_t first_arrival;  // in compact_arrivals; -1: lengths are left to a later launch
    int32_t num_layouts;
    int32_t first_cache[kMaxLayouts], first_tile[kMaxLayouts], tiles_per_cache[kMaxLayouts];
    KvLayout layouts[kMaxLayouts];
    char* caches[kMaxCaches];  // sorted by layout
};
static_assert(sizeof(CompactParams<1024>) < 32764);  // CUDA's limit on kernel parameters

// A thread moves its own column of every row, so that no two threads share an address; plan_move
// says why moving rows in order is safe in place. Loading kRows of them before the first is stored
// only makes it safer.
template <typename Vector>
__device__ void move_column(char* column, const Move* moves, int count) {
    for (int i = 0; i < count; i += kRows) {
        Move move[kRows];
        Vector row[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) move[j] = moves[i + j];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            if (move[j].from >= 0) row[j] = *reinterpret_cast<const Vector*>(column + move[j].from);
        }
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            if (move[j].from >= 0) *reinterpret_cast<Vector*>(column + move[j].to) = row[j];
        }
    }
}

// A block of kThreads + 32 threads. moves: [kMaxNodes], in shared memory. wait: until kernels
// before have ended; what it is given is found out before.
template <int kMaxCaches, typename Wait>
__device__ __forceinline__ void compact(const CompactParams<kMaxCaches>& p, Move* moves,
                                        Wait&& wait) {
    const int request = blockIdx.y;
    const int tile = blockIdx.x;
    int l = 0;
    while (l + 1 < p.num_layouts && p.first_tile[l + 1] <= tile) ++l;
    const KvLayout& layout = p.layouts[l];
    const int tile_of_layout = tile - p.first_tile[l];
    const int cache = tile_of_layout / p.tiles_per_cache[l];
    const int column = (tile_of_layout - cache * p.tiles_per_cache[l]) * kThreads + threadIdx.x;
    char* base = p.caches[p.first_cache[l] + cache] + layout.column_offset(column);
    const int32_t* path = p.path + request * p.path_stride;
    const int32_t *lengths = p.cache_seqlens, *accept_lengths = p.accept_length;
    wait(base, path, lengths, accept_lengths);

    // None of these loads waits for another.
    const int length = lengths[request];
    const int accept_length = accept_lengths[request];
    int node = threadIdx.x < p.path_size ? path[threadIdx.x] : -1;
    const int kept = kept_nodes(accept_length, p.path_size);
    if (threadIdx.x < kThreads) {
        const int end =
            (p.path_size + kRows - 1) / kRows * kRows;  // move_column reads whole groups
#pragma unroll 1
        for (int i = threadIdx.x; i < end; i += kThreads) {
            moves[i] = plan_move(p.slots, layout, request, length, i, i < kept ? node : -1);
            node = i + kThreads < p.path_size ? path[i + kThreads] : -1;
        }
    }
    __syncthreads();

    // Every block of a request reads its length; the last of them to get here, when all have read
    // it, writes it. A warp of its own does that, so that no row waits for the atomic.
    if (threadIdx.x >= kThreads) {
        if (threadIdx.x == kThreads && p.first_arrival >= 0 &&
            arrive(&compact_arrivals[p.first_arrival + request], gridDim.x)) {
            p.cache_seqlens[request] = new_length(p.slots, length, kept);
        }
        return;
    }

    if (column >= layout.columns()) return;
    switch (layout.vector_bytes) {
        case 16:
            return move_column<uint4>(base, moves, kept);
        case 8:
            return move_column<uint2>(base, moves, kept);
        case 4:
            return move_column<uint32_t>(base, moves, kept);
        case 2:
            return move_column<uint16_t>(base, moves, kept);
        default:
            return move_column<uint8_t>(base, moves, kept);
    }
}

// Sets p, but for first_arrival, to move caches begin .. end - 1 of args; how many tiles they are.
template <int kMaxCaches>
int64_t set_params(CompactParams<kMaxCaches>& p, const CompactArgs& args, int begin, int end) {
    p.path = args.path;
    p.path_stride = args.path_stride;
    p.accept_length = args.accept_length;
    p.cache_seqlens = args.cache_seqlens;
    p.slots = args.slots;
    p.path_size = args.path_size;
    p.num_layouts = 0;
    int64_t tiles = 0;
    for (size_t l = 0; l < args.layouts.size(); ++l) {
        const int first = std::max(begin, args.first_caches[l]),
                  last = std::min(end, args.first_caches[l + 1]);
        if (first >= last) continue;
        const int n = p.num_layouts++;
        p.layouts[n] = args.layouts[l];
        p.first_cache[n] = first - begin;
        p.first_tile[n] = static_cast<int32_t>(tiles);
        p.tiles_per_cache[n] = (args.layouts[l].columns() + kThreads - 1) / kThreads;
        tiles += int64_t(p.tiles_per_cache[n]) * (last - first);
    }
    std::copy(args.caches.begin() + begin, args.caches.begin() + end, p.caches);
    return tiles;
}

}  // namespace medusa_kernels::gpu
