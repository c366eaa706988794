// Tree attention for Hopper: FlashAttention-3's structure (arXiv 2407.08608) with a tree's mask on
// the last keys, and the splits of a long cache merged in the same launch.
//
// Rows are nodes times query heads of a KV head, row = node * group + head, so that K and V are
// read once for the group. A block has one or two warpgroups that compute, each on 64 rows, and one
// that fills a ring of tiles of 64 keys for them: by TMA while all of a tile's slots lie in the
// cache, else, the tail, by cp.async, which puts zeros in slots of nobody and takes appended rows
// from `k` and `v`. Slots are one sequence, committed tokens then nodes; a tile with nodes has a
// word of bits for each row, which is the only mask there is.
//
// Of an fp8 cache K is multiplied as it is, with Q as a sum of two fp8 matrices, which is exact for
// bfloat16. V, which the tensor cores take in columns of fp16 alone, is converted by one warpgroup
// more, from one ring into another. Two warpgroups compute, on 64 rows each or, where a block has
// 64 rows in all, on tiles in turn.
//
// A warpgroup keeps Q in registers and takes the softmax of tile j while the tensor cores work on
// the scores of tile j + 1 and on the probabilities of tile j - 1 with V; two warpgroups take turns
// to begin these. The maximum that a row's exponents refer to moves only when it falls behind by
// more than 2^8 (FlashAttention-4), so the accumulator is rescaled a few times in all; the result
// is the same, as its denominator has the same reference.
//
// Where there are more row blocks than multiprocessors, blocks stay and draw the next one from a
// counter: its tiles are on their way, its Q loaded under the last softmax of the one before, and
// its first scores taken while the results of that one are written.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <type_traits>

#include "arrivals.h"
#include "early_launch.h"
#include "tree_attention_sm90_args.h"
#include "tree_attention_sm90_ptx.h"

namespace medusa_kernels {
namespace {

using namespace sm90;

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr float kLazy = 8.0f;       // log2 of how far a reference may fall behind
constexpr float kLn2 = 0.6931471805599453f;
// Tiles of a block up to which it begins while the kernel before ends: worth 0.7 us. Longer ones
// lose 2%.
constexpr int kEarlyTiles = 20;

// Blocks of a row block that have their part, or row blocks that blocks which stay have drawn; 0
// between launches.
__device__ uint32_t split_arrivals[2 * kArrivals];

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

// T: of q, k, v and the results. Fp8: the cache's, e4m3, which fp16 holds exactly.
template <typename T_, int kDim_, int kGroups_, bool kFp8_>
struct Config {
    using T = T_;
    static constexpr bool kFp8 = kFp8_;
    using Operand = std::conditional_t<kFp8, __half, T>;  // of products with V
    using Cached = std::conditional_t<kFp8, uint8_t, T>;
    static constexpr int kDim = kDim_;
    static constexpr int kGroups = kGroups_;  // of 64 rows
    static constexpr int kRows = 64 * kGroups;
    // Where the ring is short the tail comes third, as it takes longest to copy; else last.
    static constexpr bool kTailThird = kGroups == 1 && !kFp8;
    static constexpr bool kStay = kGroups == 2;  // more would not fit a small block's registers
    // Warpgroups that compute. Two that share 64 rows take tiles in turn: one alone would be slower
    // than half of the bytes.
    static constexpr int kComputing = kFp8 ? 2 : kGroups;
    static constexpr bool kShares = kComputing > kGroups;
    static constexpr int kStep = kShares ? 2 : 1;    // from a warpgroup's tile to its next one
    static constexpr int kProducers = kFp8 ? 2 : 1;  // for fp8, one that converts
    static constexpr int kThreads = (kComputing + kProducers) * kGroupThreads;
    // One warpgroup is for what the memory bounds: two blocks share a multiprocessor.
    static constexpr int kBlocks = kComputing == 1 ? 2 : 1;
    // A thread's; at entry all have as many, and none grows beyond what another has given away.
    static constexpr int kEntryRegisters = 65536 / kBlocks / kThreads / 8 * 8;
    static constexpr int kConsumerRegisters = kEntryRegisters == 128 ? 208 : 216;
    static constexpr int kProducerRegisters = kEntryRegisters == 128 ? 48 : 72;
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

    // Shared memory, from a multiple of 1024 on: barriers of both rings, `Next`, converted tiles,
    // and of each stage K and V.
    static constexpr int kConvertedBarriers = 4 * kMostStages * 8;
    // From the barriers of the V that is multiplied to those that say that it is free.
    static constexpr int kFreeV = kFp8 ? kConverted * 8 : kFree;
    static constexpr int kNext = kConvertedBarriers + 2 * kConverted * 8;
    static constexpr int kConvertedTiles = 1024;
    static constexpr int kTiles = kConvertedTiles + kConverted * kConvertedBytes;
    static constexpr int shared_bytes(int stages) {
        return 1024 + kTiles + 2 * stages * kTileBytes;
    }
    static_assert(kNext + 24 <= kConvertedTiles);
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

    // Which rows: begins to load their request's lengths, which `set_tiles` needs.
    // item: of `p.items` row blocks; else there is a block for each split of each
    template <typename C>
    __device__ __forceinline__ void set_rows(const AttentionParams& p, int item) {
        if (C::kStay && p.items) {
            const int head = item / p.row_blocks;
            batch = head / p.heads_kv;
            head_kv = head - batch * p.heads_kv;
            split = 0;
            first_row = (item - head * p.row_blocks.value) * C::kRows;
        } else {
            batch = blockIdx.z;
            head_kv = static_cast<int>(blockIdx.y) / p.num_splits;
            split = blockIdx.y - head_kv * p.num_splits.value;
            first_row = blockIdx.x * C::kRows;
        }
        nodes = p.num_nodes ? p.num_nodes[batch] : p.size;
        length = p.cache_seqlens[batch];
    }

    __device__ __forceinline__ void set_tiles(const AttentionParams& p) {
        // Clamped, so that no value reaches outside the cache.
        nodes = min(min(max(nodes, 0), p.size), p.capacity);
        length = nodes > 0 ? min(max(length, 0), p.capacity - nodes) : 0;
        keys = length + nodes;
        const int tiles = (keys + kKeys - 1) / kKeys;
        whole = length / kKeys;
        // The last split, whose tiles hold the nodes, has none too many.
        const int more = p.num_splits.value - 1;
        lo = (tiles * split + more) / p.num_splits;
        hi = (tiles * (split + 1) + more) / p.num_splits;
    }

    __device__ __forceinline__ int count() const { return hi - lo; }

    // The first tile of the tail; those before it are what the cache holds.
    __device__ __forceinline__ int tail(const AttentionParams& p) const {
        return min(max(p.new_rows[0] ? whole : keys / kKeys, lo), hi);
    }
    // The end of the tiles that come before the tail.
    template <typename C>
    __device__ __forceinline__ int head(const AttentionParams& p) const {
        return C::kTailThird ? min(tail(p), lo + 2) : tail(p);
    }

    // The i-th to come.
    template <typename C>
    __device__ __forceinline__ int tile(const AttentionParams& p, int i) const {
        if constexpr (!C::kTailThird) return lo + i;
        const int first = tail(p), before = head<C>(p) - lo, behind = i - before - (hi - first);
        return i < before ? lo + i : behind < 0 ? hi + behind : lo + before + behind;
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

// ---- producer ----

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

    __device__ __forceinline__ uint32_t full(int v) const { return barrier_of(barriers, v, ring); }
    __device__ __forceinline__ uint32_t free(int v) const { return full(v + 2); }
    __device__ __forceinline__ uint32_t tile_of(int v) const { return C::tile(tiles, v, ring); }

    __device__ __forceinline__ int page(int slot) const {
        return min(max(table[slot >> p.page_shift], 0), p.num_blocks - 1);
    }

    // Tiles [first, end). One warp for K and one for V, or one for each half of rows of 256
    // bytes: every lane a box, [1 << box_shift] slots of 128 bytes, as a warp's boxes are copied
    // one after another. Lane l looks up the page of the l-th of the next 32 boxes: `pages`.
    __device__ __forceinline__ void cached_tiles(const CUtensorMap& k_map, const CUtensorMap& v_map,
                                                 int first, int end, int& pages) {
        if (thread >= (C::kRowBytes > 128 ? 128 : 64)) {
            ring.advance(p.stages, end - first);
            return;
        }
        const int v = thread / 32 % 2, half = thread / 64, lane = thread % 32;
        const int boxes = kKeys >> p.box_shift;
        int slot = first * kKeys + (lane << p.box_shift);
#pragma unroll 1
        for (int tile = first; tile < end; ++tile) {
            int inside = slot, block = w.batch;
            if (table) {
                const int at = (tile - w.lo) * boxes % 32;
                if (at == 0 && slot < w.tail(p) * kKeys) pages = page(slot);
                inside &= (1 << p.page_shift) - 1;
                block = __shfl_sync(~0u, pages, at + lane);
            }
            slot += kKeys;
            barrier_wait(free(v), ring.phase ^ 1);
            if (lane == 0 && half == 0) {
                if constexpr (C::kFullArrivals > 1) barrier_arrive(full(v), C::kFullArrivals - 1);
                barrier_expect(full(v), C::kTileBytes);
            }
            __syncwarp();
            if (lane < boxes) {
                const uint32_t to =
                    tile_of(v) + half * kHalfBytes + (lane << p.box_shift) * min(C::kRowBytes, 128);
                copy_box(to, v ? v_map : k_map, half * 64, inside, w.head_kv, block, full(v));
            }
            // All blocks fill their rings at once: where matrix products bound, two tiles come
            // before the rest. Where memory does, it never idles.
            if (C::kGroups == 2 && tile == w.lo + 1) barrier_wait(full(0), ring.phase);
            ring.advance<1>(p.stages.value);
        }
    }

    // Which block a slot lies in.
    __device__ __forceinline__ int block_of(int slot) const { return table ? page(slot) : w.batch; }

    // Where this thread's unit of a slot lies in the cache: [0], or of row `slot` of the new ones.
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
        const Cached* old = cache + place(s, table ? 0 : start + row, table ? 0 : w.batch);
        const T* fresh = !C::kFp8 && p.new_rows[v] ? new_row(v, start + row) : nullptr;
        const int first_new = p.new_rows[v] ? w.length : w.keys;
#pragma unroll 1
        for (int i = 0; i < kKeys / kPass; ++i) {
            const int slot = start + row;
            const Cached* from = old;
            if (table) from += block_of_row(row, blocks) * s.block + in_page(slot) * s.slot;
            const bool is_new = slot >= first_new;  // of fp8, `append_fp8` rounds those
            const bool ok = slot < w.keys && !(C::kFp8 && is_new);
            const void* at = cache;
            if (ok) at = !C::kFp8 && is_new ? static_cast<const void*>(fresh) : from;
            copy_16_bytes(to, at, ok);
            row += kPass;
            to += kPassBytes;
            if (!table) old += kPass * s.slot;
            if (!C::kFp8) fresh += kPass * p.new_strides[v].slot;
        }
    }

    // Appends the nodes of a tile to the cache. Nobody reads their slots there in this launch.
    __device__ __forceinline__ void append(int v, int start, const int (&blocks)[2]) const {
        const RowStrides& s = p.strides[v];
        int row = thread / kUnits;
        uint32_t from = unit_of(v, row);
        T* to =
            static_cast<T*>(p.cache[v]) + place(s, table ? 0 : start + row, table ? 0 : w.batch);
#pragma unroll 1
        for (int i = 0; i < kKeys / kPass; ++i) {
            const int slot = start + row;
            T* at = to;
            if (table) at += block_of_row(row, blocks) * s.block + in_page(slot) * s.slot;
            if (slot >= w.length && slot < w.keys) {
                *reinterpret_cast<uint4*>(at) = load_shared_4(from);
            }
            row += kPass;
            from += kPassBytes;
            if (!table) to += kPass * s.slot;
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
        if (p.block_table) table = p.block_table + w.batch * p.table_stride;
        int pages = 0;
        if (!C::kStay && w.tail(p) == w.hi) {
            cached_tiles(k_map, v_map, w.lo, w.hi, pages);
            return;
        }
        cached_tiles(k_map, v_map, w.lo, w.template head<C>(p), pages);
        sync_threads<1, kGroupThreads>();  // a parity says nothing of a phase further ahead
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
            if constexpr (C::kFullArrivals == 1) sync_threads<1, kGroupThreads>();
            if (C::kFullArrivals > 1 || thread == 0) {
                barrier_arrive(full(0));
                barrier_arrive(full(1));
            }
            if (!C::kFp8 && p.new_rows[0] && w.first_row == 0) {
#pragma unroll 1
                for (int v = 0; v < 2; ++v) append(v, tile * kKeys, blocks);
                sync_threads<1, kGroupThreads>();  // who has read it may fill it again
            }
            ring.advance<1>(p.stages.value);
        }
        if constexpr (C::kTailThird) {
            cached_tiles(k_map, v_map, w.template head<C>(p), w.tail(p), pages);
        }
    }

    __device__ __forceinline__ void run(const CUtensorMap& k_map, const CUtensorMap& v_map) {
        row_block(k_map, v_map);
        if constexpr (C::kStay) {
            while (p.items) {
                if (thread == 0) next.draw();
                __syncwarp();  // who waits at a barrier first would hold up the thread that draws
                const int item = next.take();
                if (item >= p.items) break;
                w.template set_rows<C>(p, item);
                w.set_tiles(p);
                row_block(k_map, v_map);
            }
        }
    }
};

// ---- the warpgroup that converts V of an fp8 cache ----

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

    __device__ __forceinline__ void convert() const {
        const int row = thread / kUnits, unit = thread % kUnits * 2;  // of the two that it becomes
        const int second = unit / 8;  // first, so that no banks collide
        const uint32_t from = C::tile(tiles, 1, ring) + thread * 16;
        const uint32_t to = converted_tiles + converted.stage * C::kConvertedBytes +
                            unit / 8 * kHalfBytes + row * 128;
        const uint32_t at[2] = {to + ((unit + second ^ row) & 7) * 16,
                                to + ((unit + 1 - second ^ row) & 7) * 16};
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
                store_shared(at[j] + i * kPass * 128,
                             {high ? y[2].x : y[0].x, high ? y[2].y : y[0].y,
                              high ? y[3].x : y[1].x, high ? y[3].y : y[1].y});
            }
        }
    }

    __device__ __forceinline__ void run() {
        for (;;) {
#pragma unroll 1
            for (int left = w.count(); left > 0; --left) {
                const uint32_t full = barrier_of(barriers, 1, ring);
                const uint32_t into = converted_barriers + converted.stage * 8;
                barrier_wait(full, ring.phase);
                barrier_wait(into + C::kConverted * 8, converted.phase ^ 1);
                convert();
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
            w.set_tiles(p);
        }
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
            (int64_t(w.batch) * p.heads_kv * p.group.value + head) * p.size + node};
}

// ---- consumer ----

template <typename C>
struct Consumer {
    using T = typename C::T;
    using Operand = typename C::Operand;
    static constexpr int kDim = C::kDim;
    static constexpr int kOut = kDim / 2 / C::kStep;  // results that a thread is left with
    // Two warpgroups take turns to begin matrix products (FlashAttention-3's ping-pong): left
    // alone they fall into step, both in their softmax at once, which costs up to 20%.
    static constexpr bool kTurns = C::kGroups == 2;
    static constexpr int kTurn = 5;  // barriers of the warpgroups

    const AttentionParams& p;
    Work w;
    uint32_t tiles, v_tiles, barriers, v_barriers;
    int group, lane;
    Next next;
    Ring k_ring = {}, v_ring = {};

    static constexpr int kSteps = kDim / (C::kFp8 ? 32 : 16);  // of a product with K
    uint32_t q[C::kTerms * kSteps][4];
    float scores[2][kKeys / 2];
    uint32_t probs[kKeys / 16][4];
    float out[kDim / 2];
    bool any;  // key in those tiles, else `out` has no meaning
    // Of both rows: what exponents, in base 2, refer to; what scores may not exceed without moving
    // that, -inf while no key is seen; the sum of this thread's columns.
    float base[2], limit[2], sum[2];
    float scale[2];    // of the rows' scores
    uint64_t word[2];  // the rows' first masks
    // Of a block that stays: what it goes on with, if it does. Of rows whose Q is loaded already,
    // as `word` and `scale`.
    bool goes_on = false;
    Work following;
    uint64_t next_word[2];
    float next_scale[2];

    // Row i of this thread, 0 or 1, in the block.
    __device__ __forceinline__ int row(int i) const {
        const int warp = int(threadIdx.x) / 32;
        return (C::kShares ? warp % 4 : warp) * 16 + lane / 4 + i * 8;
    }

    // Of row i: what its sum refers to, -inf if that is empty.
    __device__ __forceinline__ float reference(int i) const {
        return limit[i] == -INFINITY ? -INFINITY : base[i];
    }

    __device__ __forceinline__ int node(int i) const { return (w.first_row + row(i)) / p.group; }

    __device__ __forceinline__ void load_q(const Work& w) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = w.first_row + row(i);
            const int node = r / p.group;
            const int head = w.head_kv * p.group.value + r - node * p.group.value;
            const bool ok = node < p.size;  // what rows of absent nodes come to is not used
            const T* from = static_cast<const T*>(p.q) + w.batch * p.q_strides.block +
                            int64_t(node) * p.q_strides.slot + int64_t(head) * p.q_strides.head +
                            lane % 4 * (C::kFp8 ? 4 : 2);
            next_word[i] = ok ? p.mask[w.batch * p.mask_stride + int64_t(node) * p.words] : 0;
#pragma unroll
            for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    // Of an fp8 cache a step has 32 dims, of which a thread has 4 and 4: as pairs,
                    // which `narrow_q` takes together.
                    const int dim =
                        C::kFp8 ? k % kSteps * 32 + j * 16 + k / kSteps * 2 : k * 16 + j * 8;
                    q[k][2 * j + i] = ok ? *reinterpret_cast<const uint32_t*>(from + dim) : 0;
                }
            }
            next_scale[i] = p.scale;
        }
    }

    // Q as a sum of matrices of e4m3: rows times powers of two that bring them close to 256, which
    // the scale of their scores, made positive, makes up for.
    __device__ __forceinline__ void narrow_q(const Work& w) {
        const float k_scale = w.cache_scale(p, 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = 0.0f;
#pragma unroll
            for (int k = 0; k < kDim / 8; ++k) {
                const float2 x = unpack<T>(q[k / 2][k % 2 * 2 + i]);
                most = fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y)));
            }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const int exponent = static_cast<int>(__float_as_uint(most) >> 23);
            const int by = min(max(127 + 7 + 127 - exponent, 1), 253);
            const float factor = copysignf(__uint_as_float(by << 23), k_scale);
            next_scale[i] *= fabsf(k_scale) * __uint_as_float((254 - by) << 23);
            if (exponent == 255) next_scale[i] = NAN;  // of what e4m3 would make finite
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float2 low = unpack<T>(q[k][2 * j + i]);
                    const float2 high = unpack<T>(q[kSteps + k][2 * j + i]);
                    float x[4] = {low.x * factor, low.y * factor, high.x * factor, high.y * factor};
#pragma unroll
                    for (int term = 0; term < C::kTerms; ++term) {
                        const uint32_t rounded = pack_e4m3(x[0], x[1], x[2], x[3]);
                        q[term * kSteps + k][2 * j + i] = rounded;
                        const uint2 back = unpack_e4m3(rounded);
                        const float2 y[2] = {unpack<__half>(back.x), unpack<__half>(back.y)};
#pragma unroll
                        for (int l = 0; l < 4; ++l) x[l] -= l % 2 ? y[l / 2].y : y[l / 2].x;
                    }
                }
            }
        }
    }

    // Of the ring of K or V that this warpgroup reads.
    __device__ __forceinline__ uint32_t full(int v, const Ring& ring) const {
        return (v ? v_barriers : barriers) + ring.stage * 8;
    }

    __device__ __forceinline__ void wait_full(int v, const Ring& ring) const {
        barrier_wait(full(v, ring), ring.phase);
    }

    // Asked some time before, so that nothing waits for the answer.
    __device__ __forceinline__ bool is_full(int v, const Ring& ring) const {
        return barrier_test(full(v, ring), ring.phase);
    }

    __device__ __forceinline__ void arrive_free(int v, const Ring& ring) const {
        if (lane == 0) barrier_arrive(full(v, ring) + (v ? C::kFreeV : kFree));
    }

    // Begins scores[kNow], of the next tile of K in the ring. Where there is none, there is nothing
    // to wait for, and what comes of whatever lies there is not used: a wgmma in a branch would
    // make the compiler wait for each.
    template <int kNow>
    __device__ __forceinline__ void begin_scores(bool waits) {
        if (waits) wait_full(0, k_ring);
        const uint32_t k = matrix_place(C::tile(tiles, 0, k_ring), 16);
        pin(scores[kNow]);
        wgmma_begin();
        // A step is 32 bytes of a row; places count in 16.
#pragma unroll
        for (int i = 0; i < C::kTerms * kSteps; ++i) {
            if constexpr (C::kFp8) {
                wgmma_e4m3<kDim>(scores[kNow], q[i], k + i % kSteps * 2, i > 0);
            } else {
                wgmma<Operand, false>(scores[kNow], q[i], k + i / 4 * (kHalfBytes / 16) + i % 4 * 2,
                                      i > 0);
            }
        }
        wgmma_commit();
    }

    // Those scores are there.
    __device__ __forceinline__ void release_k() {
        arrive_free(0, k_ring);
        k_ring.template advance<C::kStep>(p.stages.value);
    }

    // Begins adding to `out`, or sets it to, the probabilities times the next tile of V in the
    // ring, which is there.
    __device__ __forceinline__ void begin_out(bool adds) {
        const uint32_t v = matrix_place(v_tiles + v_ring.stage * C::kVStep, kHalfBytes);
        pin(out);
        pin(probs);
        wgmma_begin();
        wgmma<Operand, true>(out, probs[0], v, adds);
#pragma unroll
        for (int i = 1; i < kKeys / 16; ++i) {  // 16 keys are 2048 bytes
            wgmma<Operand, true>(out, probs[i], v + i * (2048 / 16), true);
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void advance_v(Ring& ring) const {
        ring.template advance<C::kStep>(C::kFp8 ? C::kConverted : p.stages.value);
    }

    // That product is there.
    __device__ __forceinline__ void release_v() {
        arrive_free(1, v_ring);
        advance_v(v_ring);
    }

    // Bits of the 64 keys from `start` on that row i of this thread attends to.
    __device__ __forceinline__ uint64_t seen(int i, int start) const {
        const int first = start - w.length;  // node of the first key
        const int valid = w.keys - start;
        if (valid <= 0) return 0;  // past the mask's last word as well
        uint64_t bits;
        if (first <= -64) {  // committed tokens alone
            bits = ~uint64_t(0);
        } else if (first <= 0) {  // committed tokens first
            bits = word[i] << -first | ((uint64_t(1) << -first) - 1);
        } else if (first < 64 && p.words == 1) {
            bits = word[i] >> first;
        } else {
            const int node = this->node(i), shift = first % 64;
            bits = 0;
            if (node < w.nodes) {
                const uint64_t* words =
                    p.mask + w.batch * p.mask_stride + int64_t(node) * p.words + first / 64;
                bits = words[0] >> shift;
                if (shift && first / 64 + 1 < p.words) bits |= words[1] << (64 - shift);
            }
        }
        return valid < 64 ? bits & ((uint64_t(1) << valid) - 1) : bits;
    }

    __device__ __forceinline__ void hide(float (&s)[kKeys / 2], int tile) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint64_t bits = seen(i, tile * kKeys) >> (lane % 4 * 2);
            const uint32_t halves[2] = {uint32_t(bits), uint32_t(bits >> 32)};
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int column = j / 2 * 8 + j % 2;  // and 2 (lane % 4)
                float& x = s[j / 2 * 4 + i * 2 + j % 2];
                x = halves[column / 32] >> (column % 32) & 1 ? x : -INFINITY;
            }
        }
    }

    // The greatest of this thread's in row i.
    __device__ __forceinline__ static float greatest(const float (&s)[kKeys / 2], int i) {
        float top[2] = {s[i * 2], s[i * 2 + 1]};
#pragma unroll
        for (int j = 1; j < kKeys / 8; ++j) {
            top[0] = fmaxf(top[0], s[j * 4 + i * 2]);
            top[1] = fmaxf(top[1], s[j * 4 + i * 2 + 1]);
        }
        return fmaxf(top[0], top[1]);
    }

    // Of the scores of row i, for exponents of 2; not negative.
    __device__ __forceinline__ float factor(int i) const { return C::kFp8 ? scale[i] : p.scale; }

    // One step of the online softmax, from scores to probabilities. Returns whether `out` is to be
    // multiplied by `shrink`; the whole warp agrees. Threads that share a row compare their scores
    // only where the reference moves.
    __device__ __forceinline__ bool softmax(float (&s)[kKeys / 2], float (&shrink)[2]) {
        float top[2];
        bool exceeds = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            top[i] = greatest(s, i) * factor(i);
            exceeds |= top[i] > limit[i];
        }
        const bool moves = __any_sync(~0u, exceeds);
        if (moves) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
                top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2));
                const float before = reference(i), moved = fmaxf(before, top[i]);
                if (moved == -INFINITY) continue;  // no key seen yet
                shrink[i] = exp2_approx(before - moved);
                sum[i] *= shrink[i];
                base[i] = moved;
                limit[i] = moved + kLazy;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sums[2] = {0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < kKeys / 4; ++j) {
                float& x = s[j / 2 * 4 + i * 2 + j % 2];
                x = exp2_approx(fmaf(x, factor(i), -base[i]));
                sums[j % 2] += x;
            }
            sum[i] += sums[0] + sums[1];
        }
        return moves;
    }

    // The softmax of a tile whose scores are there and which is not the last one, under the next
    // tile's scores and the last tile's product with V.
    template <int kNow, bool kFirst, bool kMask>
    __device__ __forceinline__ void step(int tile) {
        const bool k_full = is_full(0, k_ring);
        // Where memory bounds, the product frees its tile the sooner; where matmuls do, it would
        // hold up the scores' instructions: eight can be under way.
        if constexpr (!kFirst && !kTurns) begin_out(true);
        if constexpr (kTurns) sync_threads(kTurn + group, 2 * kGroupThreads);
        begin_scores<1 - kNow>(!k_full);
        if constexpr (!kFirst && kTurns) begin_out(true);
        if constexpr (kTurns) arrive_threads(kTurn + 1 - group, 2 * kGroupThreads);
        Ring v_next = v_ring;
        if constexpr (!kFirst) advance_v(v_next);
        float shrink[2];
        const bool moves = probabilities<kMask>(scores[kNow], tile, v_next, shrink);
        pin(scores[1 - kNow]);
        if constexpr (!kFirst) release_v();
        release_k();
        if (!kFirst && moves) rescale(shrink);
        pack_probs(scores[kNow]);
    }

    // From a tile's scores to what is to be packed, and on until all matrix products that are under
    // way and the next one's V are there. Returns whether `out` is to be multiplied by `shrink`.
    template <bool kMask>
    __device__ __forceinline__ bool probabilities(float (&s)[kKeys / 2], int tile,
                                                  const Ring& v_next, float (&shrink)[2]) {
        const bool v_full = is_full(1, v_next);
        if (kMask && tile >= w.whole) hide(s, tile);
        shrink[0] = shrink[1] = 1.0f;
        const bool moves = softmax(s, shrink);
        pin(s);
        // Asks for the sums, of which none is negative: else the assembler, which cannot know,
        // moves the wait for the matrix products up to where the softmax begins.
        if (!v_full || sum[0] + sum[1] < 0.0f) wait_full(1, v_next);
        wgmma_wait<0>();
        pin(out);
        return moves;
    }

    // The last tile's softmax, whose scores are in scores[1], and its product with V, which is left
    // under way. Of a block that goes on, Q of the row block that it goes on with is loaded.
    __device__ __forceinline__ void last_step(int tile, bool only) {
        begin_out(true);  // of nothing, if this is the only tile; not used then
        if constexpr (C::kStay) {
            if (p.items) look_ahead();
        }
        Ring v_next = v_ring;
        if (!only) advance_v(v_next);
        float shrink[2];
        const bool moves = probabilities<true>(scores[1], tile, v_next, shrink);
        if (!only) release_v();
        if (moves) rescale(shrink);
        pack_probs(scores[1]);
    }

    __device__ __forceinline__ void rescale(const float (&shrink)[2]) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
    }

    __device__ __forceinline__ void pack_probs(const float (&s)[kKeys / 2]) {
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) {
            probs[i / 4][i % 4] = pack<Operand>(s[i * 2], s[i * 2 + 1]);
        }
    }

    // All tiles of this split, whose first scores are under way: leaves `out`, not yet divided by
    // the sums, and, of a block that goes on, the first scores of the next row block under way.
    __device__ __forceinline__ void attend() {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            word[i] = next_word[i];
            scale[i] = next_scale[i];
            limit[i] = -INFINITY;
            base[i] = sum[i] = 0.0f;
        }
        goes_on = false;
        int left = w.count() - (C::kShares ? group : 0);  // this warpgroup's and, so, the other's
        const auto this_tile = [&] { return w.template tile<C>(p, w.count() - left); };
        const bool only = left <= C::kStep;
        any = left > 0;
        wgmma_wait<0>();
        pin(scores[0]);
        if (any) {
            release_k();
            if (!only) {
                step<0, true, true>(this_tile());
                left -= C::kStep;
                // Most tiles hold committed tokens alone: their loop has no code for masks. Not
                // worth reading where it runs a few times.
                const bool few = left <= 7 * C::kStep;
                if constexpr (C::kTailThird) {  // until it has come
                    const int behind = w.tail(p) < w.hi ? w.tail(p) - w.template head<C>(p) : left;
                    const int until = few ? C::kStep : max(behind, C::kStep);
#pragma unroll 1
                    for (; left > until; left -= C::kStep) {
                        step<1, false, true>(this_tile());
                        keep_scores();
                    }
                }
                const int masked = (C::kTailThird ? w.tail(p) : w.hi) - w.whole;  // at the end
                const int end = few ? left : max(masked, 0) + 2 * C::kStep;
#pragma unroll 1
                for (; left > end; left -= 2 * C::kStep) {
                    step<1, false, false>(0);
                    step<0, false, false>(0);
                }
#pragma unroll 1
                for (; left > C::kStep; left -= C::kStep) {
                    step<1, false, true>(this_tile());
                    keep_scores();
                }
            } else {
                keep_scores();
            }
            last_step(this_tile(), only);
        } else if (C::kStay && p.items) {
            look_ahead();
        }
        begin_out(!only);
        if constexpr (C::kStay) {
            if (goes_on) {
                following.set_tiles(p);
                if constexpr (C::kFp8) narrow_q(following);
            }
            begin_scores<0>(goes_on && following.count() > 0);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin(out);
        if (any) release_v();
        if constexpr (C::kShares) join();
    }

    __device__ __forceinline__ void keep_scores() {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) scores[1][i] = scores[0][i];
    }

    // Which row block this block goes on with, if any: loads its lengths and Q.
    __device__ __forceinline__ void look_ahead() {
        const int item = next.take_and_free();
        goes_on = item < p.items;
        if (goes_on) {
            following.template set_rows<C>(p, item);
            load_q(following);
        }
    }

    // Two warpgroups that share rows: each gives the other what it has of one half of the dims, and
    // is left with the other half, in the first half of `out`.
    __device__ __forceinline__ void join() {
        constexpr int kGiven = kOut / 4;  // of 16 bytes
        const int thread = threadIdx.x % kGroupThreads;
        const auto place = [&](int of, int i) {
            return v_tiles + ((of * (kGiven + 1) + i) * kGroupThreads + thread) * 16;
        };
        const auto give = [&](const float* from) {
#pragma unroll
            for (int i = 0; i < kOut; i += 4) {
                store_shared(place(group, i / 4),
                             {__float_as_uint(from[i]), __float_as_uint(from[i + 1]),
                              __float_as_uint(from[i + 2]), __float_as_uint(from[i + 3])});
            }
        };
        clear_unless_any();
        sync_threads<2, 2 * kGroupThreads>();  // the tiles' memory is free
        const float mine[2] = {reference(0), reference(1)};
        store_shared(place(group, kGiven), {__float_as_uint(mine[0]), __float_as_uint(mine[1]),
                                            __float_as_uint(sum[0]), __float_as_uint(sum[1])});
        if (group == 0) {
            give(out + kOut);
        } else {
            give(out);
#pragma unroll
            for (int i = 0; i < kOut; ++i) out[i] = out[kOut + i];
        }
        sync_threads<2, 2 * kGroupThreads>();
        const uint4 other = load_shared_4(place(1 - group, kGiven));
        const float its[2] = {__uint_as_float(other.x), __uint_as_float(other.y)};
        const float its_sum[2] = {__uint_as_float(other.z), __uint_as_float(other.w)};
        float keep[2], add[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            limit[i] = fmaxf(mine[i], its[i]);
            base[i] = limit[i] == -INFINITY ? 0.0f : limit[i];
            keep[i] = exp2_approx(mine[i] - base[i]);
            add[i] = exp2_approx(its[i] - base[i]);
            sum[i] = fmaf(its_sum[i], add[i], sum[i] * keep[i]);
        }
#pragma unroll
        for (int i = 0; i < kOut; i += 4) {
            const uint4 x = load_shared_4(place(1 - group, i / 4));
            out[i] = fmaf(__uint_as_float(x.x), add[0], out[i] * keep[0]);
            out[i + 1] = fmaf(__uint_as_float(x.y), add[0], out[i + 1] * keep[0]);
            out[i + 2] = fmaf(__uint_as_float(x.z), add[1], out[i + 2] * keep[1]);
            out[i + 3] = fmaf(__uint_as_float(x.w), add[1], out[i + 3] * keep[1]);
        }
    }

    // Zeros in place of what a warpgroup without tiles is left with.
    __device__ __forceinline__ void clear_unless_any() {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] = any ? out[i] : 0.0f;
    }

    // Of row i, over the quad of threads that share it.
    __device__ __forceinline__ float row_sum(int i) const {
        float total = sum[i];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        return total;
    }

    // The first of the dims that this warpgroup is left with.
    __device__ __forceinline__ int first_dim() const { return C::kShares ? group * (kDim / 2) : 0; }

    // Writes the two rows of an unsplit row block.
    __device__ __forceinline__ void write(const Work& of) const {
        const int quad = lane % 4;
        const bool writes_lse = p.lse && quad == 0 && (!C::kShares || group == 0);
        const float v_scale = C::kFp8 ? of.cache_scale(p, 1) : 1.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const RowPlace at = row_place(p, of, row(i));
            const float total = row_sum(i);
            const bool real = at.node < of.nodes && total != 0.0f;  // NaN stays NaN
            const float norm = real ? v_scale / total : 0.0f;
            if (writes_lse && at.exists) {
                p.lse[at.lse] = real ? (base[i] + log2f(total)) * kLn2 : -INFINITY;
            }
            T* to = static_cast<T*>(p.out) + at.out + first_dim() + quad * 8;
#pragma unroll
            for (int j = 0; j < kOut / 16; ++j) {
                uint32_t x[4];  // of 8 dims each
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float* from = out + (j * 4 + k) * 4 + i * 2;
                    x[k] = real ? pack<T>(from[0] * norm, from[1] * norm) : 0;
                }
                transpose_quad(x, lane);
                if (at.exists) {
                    *reinterpret_cast<uint4*>(to + j * 32) = {x[0], x[1], x[2], x[3]};
                }
            }
        }
    }

    // A split, whose results are left in `out`, or unsplit row blocks, this one and those that the
    // block goes on with.
    __device__ __forceinline__ void run() {
        load_q(w);  // before the lengths are there
        if constexpr (C::kFp8) narrow_q(w);
        w.set_tiles(p);
        if (kTurns && group == 1) arrive_threads(kTurn, 2 * kGroupThreads);  // the other's first
        begin_scores<0>(w.count() > (C::kShares ? group : 0));
#pragma unroll 1
        for (;;) {
            attend();
            if (p.num_splits.value > 1) break;
            write(w);
            if (!goes_on) break;
            w = following;
        }
        if (kTurns && group == 0) sync_threads(kTurn, 2 * kGroupThreads);  // has none any more
        if constexpr (C::kStay) wgmma_wait<0>();
    }

    // Leaves this split's results in memory, as `merge` takes them.
    __device__ __forceinline__ void publish(float4* partial, float2* stats) {
        if constexpr (!C::kShares) clear_unless_any();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float total = row_sum(i);
            if (lane % 4 == 0)
                stats[row(i)] = {reference(i), total};  // two that share write the same
        }
        float4* to = partial + (row(0) / 16 * (kDim / 8) + first_dim() / 8) * 32 + lane;
#pragma unroll
        for (int j = 0; j < kOut / 4; ++j) {
            to[j * 32] = {out[j * 4], out[j * 4 + 1], out[j * 4 + 2], out[j * 4 + 3]};
        }
    }
};

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

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    tree_attention_kernel(const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map,
                          const __grid_constant__ AttentionParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    touch_parameters<sizeof(p)>(&p);
    const uint32_t barriers = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
    const uint32_t next = barriers + C::kNext, tiles = barriers + C::kTiles;
    if (threadIdx.x == 0) {
        constexpr int kReaders = C::kComputing / C::kStep * 4;  // warps
        for (int i = 0; i < p.stages.value; ++i) {
            for (int v = 0; v < 2; ++v) {
                barrier_init(barrier_of(barriers, v, {i}), C::kFullArrivals);
                barrier_init(barrier_of(barriers, v + 2, {i}),
                             C::kFp8 && v ? kGroupThreads : kReaders);
            }
        }
        for (int i = 0; i < C::kConverted; ++i) {
            barrier_init(barriers + C::kConvertedBarriers + i * 8, 4);  // warps
            barrier_init(barriers + C::kConvertedBarriers + (C::kConverted + i) * 8, kReaders);
        }
        barrier_init(next, 1);
        barrier_init(next + 8, C::kThreads - kGroupThreads);
        fence_barrier_init();
        prefetch_map(k_map);
        prefetch_map(v_map);
    }
    wait_for_kernels_before();
    Work w;
    w.set_rows<C>(p, blockIdx.x);
    __syncthreads();

    const int group = threadIdx.x / kGroupThreads;
    if (group >= C::kComputing) {
        shrink_registers<C::kProducerRegisters>();
        w.set_tiles(p);
        const int thread = threadIdx.x % kGroupThreads;
        if (C::kFp8 && group > C::kComputing) {
            Converter<C> converter{p,        w,
                                   tiles,    barriers + C::kConvertedTiles,
                                   barriers, barriers + C::kConvertedBarriers,
                                   thread,   {p, next}};
            converter.run();
        } else {
            Producer<C> producer{p, w, tiles, barriers, thread, {p, next}};
            producer.run(k_map, v_map);
        }
    } else {
        grow_registers<C::kConsumerRegisters>();
        const int lane = threadIdx.x % 32;
        Consumer<C> consumer{
            p,        w,
            tiles,    C::kFp8 ? barriers + C::kConvertedTiles : tiles + C::kTileBytes,
            barriers, C::kFp8 ? barriers + C::kConvertedBarriers : barrier_of(barriers, 1, {}),
            group,    lane,
            {p, next}};
        if (C::kShares && group == 1) {
            consumer.k_ring.template advance<1>(p.stages.value);
            consumer.v_ring.template advance<1>(C::kConverted);
        }
        consumer.run();

        if (p.num_splits.value > 1) {
            const Work& done = consumer.w;
            constexpr int kConsumers = C::kComputing * kGroupThreads;
            const int64_t row_block =
                (int64_t(done.batch) * p.heads_kv + done.head_kv) * gridDim.x + blockIdx.x;
            const int64_t rows =
                row_block * p.num_splits.value * C::kRows;  // before this row block's
            float4* partial = p.partial + rows * (C::kDim / 4);
            float2* stats = p.stats + rows;
            if (consumer.row(0) / 16 * 16 < num_rows<C>(p, done)) {  // this warp has rows
                consumer.publish(partial + done.split * C::kRows * (C::kDim / 4),
                                 stats + done.split * C::kRows);
            }
            sync_threads<2, kConsumers>();
            bool waits = false;
            uint32_t* counter = split_arrivals + p.first_arrival + row_block;
            if (threadIdx.x == 0) waits = !arrive(counter, p.num_splits.value);
            merge<C>(p, done, partial, stats, threadIdx.x / 32, lane, [&] {
                while (waits && load_acquire(counter) != 0) {  // the last to arrive leaves a 0
                }
                sync_threads<2, kConsumers>();
            });
        }
    }
}

// ---- host ----

ArrivalTurns arrival_turns;
constexpr int kMostSharedBytes = 227 * 1024;  // of a block

// Memory of PyTorch's allocator, on the current device and stream: what is launched there later may
// have it as soon as this is gone. A tensor would take longer by a microsecond.
class WorkMemory {
 public:
    explicit WorkMemory(int64_t bytes) {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_cuda_caching_allocator_raw_alloc(static_cast<uint64_t>(bytes), &data_));
    }
    ~WorkMemory() { aoti_torch_cuda_caching_allocator_raw_delete(data_); }
    WorkMemory(const WorkMemory&) = delete;
    WorkMemory& operator=(const WorkMemory&) = delete;
    void* data() const { return data_; }

 private:
    void* data_ = nullptr;
};

template <typename C>
void launch(const AttentionPlan& plan, AttentionParams& p, const CUtensorMap& k_map,
            const CUtensorMap& v_map, cudaStream_t stream) {
    const auto kernel = tree_attention_kernel<C>;
    const int shared_bytes = C::shared_bytes(p.stages.value);
    MK_CHECK_VALUE(p.stages.value >= C::kLeastStages && p.stages.value <= kMostStages &&
                       shared_bytes <= kMostSharedBytes,
                   "stages: expected from ", C::kLeastStages, " on, in ", kMostSharedBytes,
                   " bytes, got ", p.stages.value);
    const int device = static_cast<int>(plan.device);
    static std::atomic<uint64_t> known;  // devices on which the kernel may have its shared memory
    if (device >= 64 || !(known >> device & 1)) {
        STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            kMostSharedBytes));
        if (device < 64) known |= uint64_t(1) << device;
    }
    const int64_t blocks = plan.row_blocks * plan.heads_kv * plan.batch;
    const bool stay = C::kStay && plan.num_splits == 1 && blocks > plan.resident;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(plan.row_blocks),
                          static_cast<unsigned>(plan.heads_kv * plan.num_splits),
                          static_cast<unsigned>(plan.batch));
    if (stay) {
        config.gridDim = dim3(static_cast<unsigned>(plan.resident));
        p.items = static_cast<int32_t>(blocks);
        p.first_arrival = arrival_turns.claim(1, stream);
    }
    config.blockDim = dim3(C::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    std::optional<WorkMemory> work;
    if (plan.num_splits > 1) {
        const int64_t rows = blocks * plan.num_splits * C::kRows;
        work.emplace(rows * (C::kDim + 2) * 4);
        p.partial = static_cast<float4*>(work->data());
        p.stats = reinterpret_cast<float2*>(p.partial + rows * C::kDim / 4);
        p.first_arrival = arrival_turns.claim(static_cast<int32_t>(blocks), stream);
        cudaLaunchAttribute& together =
            attributes[config.numAttrs++];  // as they wait for each other
        together.id = cudaLaunchAttributeCooperative;
        together.val.cooperative = 1;
    }
    if (p.capacity <= kEarlyTiles * kKeys * plan.num_splits) {
        attributes[config.numAttrs++] = early_launch();
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, k_map, v_map, p));
}

void launch(const AttentionPlan& plan, const uint64_t* addresses, cudaStream_t stream) {
    MK_CHECK_VALUE(plan.bytes == sizeof plan, "plan: expected ", sizeof plan, " bytes, got ",
                   plan.bytes);
    int current;
    STD_CUDA_CHECK(cudaGetDevice(&current));
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (current != plan.device) guard.emplace(static_cast<int32_t>(plan.device));
    AttentionParams p = attention_params(plan, addresses);
    const auto with = [&](auto type, auto dim, auto groups, auto fp8) {
        using C = Config<decltype(type), decltype(dim)::value, decltype(groups)::value,
                         decltype(fp8)::value>;
        CUtensorMap maps[2] = {};
        for (int v = 0; v < 2; ++v) maps[v] = tensor_map(plan, v, p);
        launch<C>(plan, p, maps[0], maps[1], stream);
    };
    const auto with_groups = [&](auto type, auto dim, auto groups) {
        if constexpr (std::is_same_v<decltype(type), __nv_bfloat16>) {
            if (plan.fp8) return with(type, dim, groups, std::true_type());
        }
        with(type, dim, groups, std::false_type());
    };
    const auto with_type = [&](auto type, auto dim) {
        plan.groups == 1 ? with_groups(type, dim, std::integral_constant<int, 1>())
                         : with_groups(type, dim, std::integral_constant<int, 2>());
    };
    const auto with_dim = [&](auto dim) {
        plan.half ? with_type(__half(), dim) : with_type(__nv_bfloat16(), dim);
    };
    plan.dim == 64 ? with_dim(std::integral_constant<int, 64>())
                   : with_dim(std::integral_constant<int, 128>());
}

}  // namespace
}  // namespace medusa_kernels

// Called by medusa_kernels/_sm90.py and csrc/fast_calls.cpp without a dispatcher in between: once a
// layer and step, it would cost as much as the kernel. Returns what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* medusa_kernels_tree_attention_sm90(
    const medusa_kernels::AttentionPlan* plan, const uint64_t* addresses, void* stream) {
    static thread_local std::string error;
    try {
        medusa_kernels::launch(*plan, addresses, static_cast<cudaStream_t>(stream));
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}
