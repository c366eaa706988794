// The warpgroups of Hopper's tree attention that fill the ring of tiles, and convert V of an fp8
// cache.
#pragma once

#include "tree_attention_sm90_work.h"

namespace medusa_kernels::sm90 {

template <typename C>
struct Producer {
    using T = typename C::T;
    using Cached = typename C::Cached;
    static constexpr int kElements = 16 / sizeof(Cached);  // of a unit of 16 bytes
    static constexpr int kUnits = C::kDim / kElements;     // of a row
    static constexpr int kPass = kGroupThreads / kUnits;   // rows copied at once

    const AttentionParams& p;
    Work w;
    uint32_t tiles, barriers;
    int thread;
    Next next;
    const int32_t* table = nullptr;  // of this request
    Ring ring = {};
    // Of the boxes that this thread copies: K (0) or V, which half of the dims, the barrier and the
    // place in the first stage.
    int lane, my_v, half, slot_in_tile, boxes;
    uint32_t my_full, my_tile;
    // Where blocks have few tiles: all of the request's pages, if its table has no more than these,
    // asked for along with its length. Lane l has every 32nd, from the l-th on.
    static constexpr int kKnown = C::kSmall ? 4 : 0;
    int32_t known[kKnown + 1];

    __device__ __forceinline__ uint32_t full(int v) const { return barrier_of(barriers, v, ring); }
    __device__ __forceinline__ uint32_t free(int v) const { return full(v + 2); }
    __device__ __forceinline__ uint32_t tile_of(int v) const { return C::tile(tiles, v, ring); }

    // What the table says, clamped.
    __device__ __forceinline__ int clamped(int entry) const {
        return min(max(entry, 0), p.num_blocks - 1);
    }
    __device__ __forceinline__ int page(int slot) const {
        return clamped(table[slot >> p.page_shift]);
    }

    __device__ __forceinline__ int max_blocks() const { return p.capacity >> p.page_shift; }
    __device__ __forceinline__ bool knows_pages() const {
        return kKnown && max_blocks() <= kKnown * 32;
    }
    // Begins to load them.
    __device__ __forceinline__ void load_pages() {
        if (!table || !knows_pages()) return;
#pragma unroll
        for (int i = 0; i < kKnown; ++i) {
            const int at = i * 32 + lane;
            known[i] = at < max_blocks() ? table[at] : 0;
        }
    }
    // As `page`, by all lanes of a warp.
    __device__ __forceinline__ int known_page(int slot) const {
        const int at = slot >> p.page_shift;
        int found = 0;
#pragma unroll
        for (int i = 0; i < kKnown; ++i) {
            const int x = __shfl_sync(~0u, known[i], at & 31);
            if (at >> 5 == i) found = x;
        }
        return clamped(found);
    }

    __device__ __forceinline__ void find_table() {
        if (p.block_table) table = p.block_table + w.batch * p.table_stride;
        pin(table);
    }

    // What tiles that the cache holds are copied with: by one warp for K and one for V, or one for
    // each half of rows of 256 bytes, every lane a box, [1 << box_shift] slots of 128 bytes, as a
    // warp's boxes are copied one after another.
    __device__ __forceinline__ void begin() {
        find_table();
        lane = thread % 32;
        my_v = thread / 32 % 2;
        half = thread / 64;
        slot_in_tile = lane << p.box_shift;
        boxes = kKeys >> p.box_shift;
        my_full = barrier_of(barriers, my_v, {});
        my_tile =
            C::tile(tiles, my_v, {}) + half * kHalfBytes + slot_in_tile * min(C::kRowBytes, 128);
        pin(slot_in_tile);
        pin(boxes);
        pin(my_full);
        pin(my_tile);
    }

    // Tiles [first, end). Lane l looks up the page of the l-th of the next 32 boxes: `pages`.
    __device__ __forceinline__ void cached_tiles(const CUtensorMap& k_map, const CUtensorMap& v_map,
                                                 int first, int end, int& pages) {
        if (thread >= (C::kRowBytes > 128 ? 128 : 64)) {
            ring.advance(p.stages, end - first);
            return;
        }
        int slot = first * kKeys + slot_in_tile;
#pragma unroll 1
        for (int tile = first; tile < end; ++tile) {
            int inside = slot, block = w.batch;
            if (table) {
                const int at = (tile - w.lo) * boxes % 32;
                if (at == 0) {
                    if (knows_pages()) {
                        pages = known_page(slot);
                    } else if (slot < w.tail(p) * kKeys) {
                        pages = page(slot);
                    }
                }
                inside = in_page(slot);
                block = __shfl_sync(~0u, pages, at + lane);
            }
            slot += kKeys;
            const uint32_t full = my_full + ring.stage * 8;
            barrier_wait(full + kFree, ring.phase ^ 1);
            if (lane == 0 && half == 0) {
                if constexpr (C::kFullArrivals > 1) barrier_arrive(full, C::kFullArrivals - 1);
                barrier_expect(full, C::kTileBytes);
            }
            __syncwarp();
            if (lane < boxes) {
                copy_box(my_tile + ring.stage * 2 * C::kTileBytes, my_v ? v_map : k_map, half * 64,
                         inside, w.head_kv, block, full);
            }
            // All blocks fill their rings at once: where matrix products bound, two tiles come
            // before the rest. Where memory does, it never idles.
            if (C::kGroups == 2 && tile == w.lo + 1) {
                barrier_wait(barrier_of(barriers, 0, ring), ring.phase);
            }
            ring.advance<1>(p.stages.value);
        }
    }

    // Which block a slot lies in.
    __device__ __forceinline__ int block_of(int slot) const { return table ? page(slot) : w.batch; }

    // How far this thread's unit of a row lies from where the tensor begins; a row of pages, by its
    // place in its own, `in_page`.
    __device__ __forceinline__ int64_t place(const RowStrides& s, int slot, int block) const {
        return block * s.block + slot * s.slot + w.head_kv * s.head + thread % kUnits * kElements;
    }
    __device__ __forceinline__ int in_page(int slot) const {
        return table ? slot & ((1 << p.page_shift) - 1) : slot;
    }
    __device__ __forceinline__ const T* new_row(int v, int slot) const {
        return static_cast<const T*>(p.new_rows[v]) +
               place(p.new_strides[v], slot - w.length, w.batch);
    }

    // Where this thread's unit of a row of a tile goes, as the TMA would put it. From a row to that
    // of the next pass it is always as far.
    __device__ __forceinline__ uint32_t unit_of(int v, int row) const {
        const int unit = thread % kUnits;
        if constexpr (!C::kFp8) {
            return tile_of(v) + unit / 8 * kHalfBytes + row * 128 + ((unit ^ row) & 7) * 16;
        }
        const int swizzle = v ? 0 : C::kRowBytes == 128 ? row % 8 : row / 2 % 4;
        return tile_of(v) + row * C::kRowBytes + (unit ^ swizzle) * 16;
    }
    static constexpr int kPassBytes = kPass * (C::kRowBytes < 128 ? C::kRowBytes : 128);
    static_assert(kPass % 8 == 0);

    // blocks: of a tile's slots by lanes, of the upper 32 of them the second
    __device__ __forceinline__ static int block_of_row(int row, const int (&blocks)[2]) {
        return __shfl_sync(~0u, row < 32 ? blocks[0] : blocks[1], row % 32);
    }

    // Begins to copy a tile row by row, from `k` and `v` where they have it.
    __device__ __forceinline__ void copy_tail(int v, int start, const int (&blocks)[2]) const {
        const Cached* const cache = static_cast<const Cached*>(p.cache[v]);
        const RowStrides& s = p.strides[v];
        int row = thread / kUnits;
        uint32_t to = unit_of(v, row);
        const Cached* old = cache;
        const T* fresh = !C::kFp8 && p.new_rows[v] ? new_row(v, start + row) : nullptr;
        const int first_new = p.new_rows[v] ? w.length : w.keys;
#pragma unroll 1
        for (int i = 0; i < kKeys / kPass; ++i) {
            const int slot = start + row;
            if (begins_page(i)) old = cache + place(s, in_page(slot), block_of_row(row, blocks));
            const bool is_new = slot >= first_new;  // of fp8, `append_fp8` rounds those
            const bool ok = slot < w.keys && !(C::kFp8 && is_new);
            const void* at = cache;
            if (ok) at = !C::kFp8 && is_new ? static_cast<const void*>(fresh) : old;
            copy_16_bytes(to, at, ok);
            row += kPass;
            to += kPassBytes;
            old += kPass * s.slot;
            if (!C::kFp8) fresh += kPass * p.new_strides[v].slot;
        }
    }

    // Whether the rows of the i-th pass begin a page, or all.
    __device__ __forceinline__ bool begins_page(int i) const {
        return i == 0 || (table && !(i * kPass & ((1 << p.page_shift) - 1)));
    }

    // Appends the nodes of a tile to the cache. Nobody reads their slots there in this launch.
    __device__ __forceinline__ void append(int v, int start, const int (&blocks)[2]) const {
        const RowStrides& s = p.strides[v];
        int row = thread / kUnits;
        uint32_t from = unit_of(v, row);
        T* to = nullptr;
#pragma unroll 1
        for (int i = 0; i < kKeys / kPass; ++i) {
            const int slot = start + row;
            if (begins_page(i)) {
                to = static_cast<T*>(p.cache[v]) +
                     place(s, in_page(slot), block_of_row(row, blocks));
            }
            if (slot >= w.length && slot < w.keys) {
                *reinterpret_cast<uint4*>(to) = load_shared_4(from);
            }
            row += kPass;
            from += kPassBytes;
            to += kPass * s.slot;
        }
    }

    // A unit of an appended row, as the cache takes it.
    __device__ __forceinline__ uint4 rounded(int v, int slot) const {
        const float scale = w.cache_scale(p, v);
        const T* from = new_row(v, slot);
        uint4 x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float f[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) f[j] = float(from[i * 4 + j]) / scale;
            (&x.x)[i] = pack_e4m3(f[0], f[1], f[2], f[3]);
        }
        return x;
    }

    // Puts the nodes of a tile into it, and into an fp8 cache.
    __device__ __forceinline__ void append_fp8(int v, int start) const {
        Cached* cache = static_cast<Cached*>(p.cache[v]);
        const int end = min(start + kKeys, w.keys);
#pragma unroll 1
        for (int row = thread / kUnits; start + row < end; row += kPass) {
            const int slot = start + row;
            if (slot < w.length) continue;
            const uint4 x = rounded(v, slot);
            store_shared(unit_of(v, row), x);
            if (w.first_row == 0) {  // nobody reads its slot there in this launch
                *reinterpret_cast<uint4*>(cache +
                                          place(p.strides[v], in_page(slot), block_of(slot))) = x;
            }
        }
    }

    __device__ __forceinline__ void row_block(const CUtensorMap& k_map, const CUtensorMap& v_map) {
        int pages = 0;
        if (!C::kStay && w.tail(p) == w.hi) {
            cached_tiles(k_map, v_map, w.lo, w.hi, pages);
            return;
        }
        cached_tiles(k_map, v_map, w.lo, w.template head<C>(p), pages);
        sync_threads<kCopyBarrier,
                     kGroupThreads>();  // a parity says nothing of a phase further ahead
        // What the copies below are computed from is not to take registers above.
        pin(w.batch);
        pin(w.head_kv);
        pin(thread);
#pragma unroll 1
        for (int tile = w.tail(p); tile < w.hi; ++tile) {
            int blocks[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                blocks[i] = block_of(min(tile * kKeys + i * 32 + thread % 32, w.keys - 1));
            }
#pragma unroll 1
            for (int v = 0; v < 2; ++v) {
                barrier_wait(free(v), ring.phase ^ 1);
                copy_tail(v, tile * kKeys, blocks);
            }
            wait_copies();
            if (C::kFp8 && p.new_rows[0]) {
#pragma unroll 1
                for (int v = 0; v < 2; ++v) append_fp8(v, tile * kKeys);
            }
            fence_for_wgmma();
            if constexpr (C::kFullArrivals == 1) sync_threads<kCopyBarrier, kGroupThreads>();
            if (C::kFullArrivals > 1 || thread == 0) {
                barrier_arrive(full(0));
                barrier_arrive(full(1));
            }
            if (!C::kFp8 && p.new_rows[0] && w.first_row == 0) {
#pragma unroll 1
                for (int v = 0; v < 2; ++v) append(v, tile * kKeys, blocks);
                sync_threads<kCopyBarrier, kGroupThreads>();  // who has read it may fill it again
            }
            ring.advance<1>(p.stages.value);
        }
        if constexpr (C::kTailThird) {
            cached_tiles(k_map, v_map, w.template head<C>(p), w.tail(p), pages);
        }
    }

    __device__ __forceinline__ void run(const CUtensorMap& k_map, const CUtensorMap& v_map) {
        w.set_tiles(p);
        if (w.idle(p)) return;
        row_block(k_map, v_map);
        if constexpr (C::kStay) {
            while (p.items) {
                if (thread == 0) next.draw();
                __syncwarp();  // who waits at a barrier first would hold up the thread that draws
                const int item = next.take();
                if (item >= p.items) break;
                w.template set_rows<C>(p, item);
                w.load_lengths(p);
                w.set_tiles(p);
                find_table();
                row_block(k_map, v_map);
            }
        }
    }
};

// Of an fp8 cache: V as fp16.
template <typename C>
struct Converter {
    static constexpr int kUnits = C::kDim / 16;           // of a row, of 16 numbers
    static constexpr int kPass = kGroupThreads / kUnits;  // rows converted at once

    const AttentionParams& p;
    Work w;
    uint32_t tiles, converted_tiles, barriers, converted_barriers;
    int thread;
    Next next;
    Ring ring = {}, converted = {};
    int second;  // half of the dims that comes first
    uint32_t first_from, first_to[2];

    // Where this thread's units lie in the first stage, and where the two that one becomes go:
    // first one of either half, so that no banks collide.
    __device__ __forceinline__ void begin() {
        const int row = thread / kUnits, unit = thread % kUnits * 2;
        second = unit / 8;
        first_from = C::tile(tiles, 1, {}) + thread * 16;
        const uint32_t to = converted_tiles + unit / 8 * kHalfBytes + row * 128;
        first_to[0] = to + ((unit + second ^ row) & 7) * 16;
        first_to[1] = to + ((unit + 1 - second ^ row) & 7) * 16;
        pin(first_from);
        pin(first_to[0]);
        pin(first_to[1]);
    }

    __device__ __forceinline__ void convert(uint32_t from, const uint32_t (&to)[2]) const {
        uint4 x[kKeys / kPass];
#pragma unroll
        for (int i = 0; i < kKeys / kPass; ++i) {
            x[i] = load_shared_4(from + i * kGroupThreads * 16);
        }
#pragma unroll
        for (int i = 0; i < kKeys / kPass; ++i) {
            const uint2 y[4] = {unpack_e4m3(x[i].x), unpack_e4m3(x[i].y), unpack_e4m3(x[i].z),
                                unpack_e4m3(x[i].w)};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const bool high = j != second;
                store_shared(to[j] + i * kPass * 128,
                             uint4{high ? y[2].x : y[0].x, high ? y[2].y : y[0].y,
                                   high ? y[3].x : y[1].x, high ? y[3].y : y[1].y});
            }
        }
    }

    __device__ __forceinline__ void run() {
        w.set_tiles(p);
        if (w.idle(p)) return;
        for (;;) {
#pragma unroll 1
            for (int left = w.count(); left > 0; --left) {
                const uint32_t full = barrier_of(barriers, 1, ring);
                const uint32_t into = converted_barriers + converted.stage * 8;
                uint32_t from = first_from + ring.stage * 2 * C::kTileBytes;
                const uint32_t further = converted.stage * C::kConvertedBytes;
                uint32_t to[2] = {first_to[0] + further, first_to[1] + further};
                pin(from);
                pin(to[0]);
                pin(to[1]);
                barrier_wait(full, ring.phase);
                barrier_wait(into + C::kConverted * 8, converted.phase ^ 1);
                convert(from, to);
                barrier_arrive(full + kFree);
                fence_for_wgmma();
                __syncwarp();
                if (thread % 32 == 0) barrier_arrive(into);
                ring.advance<1>(p.stages.value);
                converted.advance<1>(C::kConverted);
            }
            if (!C::kStay || !p.items) break;
            const int item = next.take_and_free();
            if (item >= p.items) break;
            w.template set_rows<C>(p, item);
            w.load_lengths(p);
            w.set_tiles(p);
        }
    }
};

}  // namespace medusa_kernels::sm90
