// The warpgroups of Hopper's tree attention that compute: scores, softmax, products with V.
#pragma once

#include "tree_attention_sm90_work.h"

namespace medusa_kernels::sm90 {

constexpr float kLazy = 8.0f;  // log2 of how far a reference may fall behind

template <typename C>
struct Consumer {
    using T = typename C::T;
    using Operand = typename C::Operand;
    static constexpr int kDim = C::kDim;
    static constexpr int kOut = kDim / 2 / C::kStep;  // results that a thread is left with

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
    const T* q_row[2];
    const uint64_t* mask_row[2];
    bool has_q[2];
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

    // Where the rows of Q lie, and of the mask.
    __device__ __forceinline__ void find_q(const Work& w) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = w.first_row + row(i);
            const int node = r / p.group;
            const int head = w.head_kv * p.group.value + r - node * p.group.value;
            has_q[i] = node < p.size;  // what rows of absent nodes come to is not used
            q_row[i] = static_cast<const T*>(p.q) + w.batch * p.q_strides.block +
                       int64_t(node) * p.q_strides.slot + int64_t(head) * p.q_strides.head +
                       lane % 4 * (C::kFp8 ? 4 : 2);
            mask_row[i] = p.mask + w.batch * p.mask_stride + int64_t(node) * p.words;
            pin(q_row[i]);
            pin(mask_row[i]);
        }
    }

    __device__ __forceinline__ void load_q() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            next_word[i] = has_q[i] ? *mask_row[i] : 0;
#pragma unroll
            for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    // Of an fp8 cache a step has 32 dims, of which a thread has 4 and 4: as pairs,
                    // which `narrow_q` takes together.
                    const int dim =
                        C::kFp8 ? k % kSteps * 32 + j * 16 + k / kSteps * 2 : k * 16 + j * 8;
                    q[k][2 * j + i] =
                        has_q[i] ? *reinterpret_cast<const uint32_t*>(q_row[i] + dim) : 0;
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

    // Of two warpgroups: the softmax of a tile whose scores are there and which is not the last
    // one, under the next tile's scores and the last tile's product with V.
    template <int kNow, bool kFirst, bool kMask>
    __device__ __forceinline__ void step(int tile) {
        const bool k_full = is_full(0, k_ring);
        sync_threads(kTurnBarriers + group, 2 * kGroupThreads);
        begin_scores<1 - kNow>(!k_full);
        if constexpr (!kFirst) begin_out(true);
        arrive_threads(kTurnBarriers + 1 - group, 2 * kGroupThreads);
        Ring v_next = v_ring;
        if constexpr (!kFirst) advance_v(v_next);
        const bool v_full = is_full(1, v_next);
        float shrink[2];
        const bool moves = probabilities<kMask>(scores[kNow], tile, shrink);
        wait_products(v_full, v_next);
        pin(scores[1 - kNow]);
        if constexpr (!kFirst) release_v();
        release_k();
        if (!kFirst && moves) rescale(shrink);
        pack_probs(scores[kNow]);
    }

    // From a tile's scores to what is to be packed. Returns whether `out` is to be multiplied by
    // `shrink`.
    template <bool kMask>
    __device__ __forceinline__ bool probabilities(float (&s)[kKeys / 2], int tile,
                                                  float (&shrink)[2]) {
        if (kMask && tile >= w.whole) hide(s, tile);
        shrink[0] = shrink[1] = 1.0f;
        const bool moves = softmax(s, shrink);
        pin(s);
        return moves;
    }

    // Until all matrix products that are under way are there and, where it is not yet, that V.
    __device__ __forceinline__ void wait_products(bool v_full, const Ring& v) {
        // Asks for the sums, of which none is negative: else the assembler, which cannot know,
        // moves the wait for the matrix products up to where the softmax begins.
        if (!v_full || sum[0] + sum[1] < 0.0f) wait_full(1, v);
        wgmma_wait<0>();
        pin(out);
    }

    // The last tile's softmax, whose scores are in scores[1], and its product with V, which is left
    // under way. Of a block that goes on, Q of the row block that it goes on with is loaded.
    __device__ __forceinline__ void last_step(int tile, bool only) {
        begin_out(true);  // of nothing, if this is the only tile; not used then
        if (p.items) look_ahead();
        Ring v_next = v_ring;
        if (!only) advance_v(v_next);
        const bool v_full = is_full(1, v_next);
        float shrink[2];
        const bool moves = probabilities<true>(scores[1], tile, shrink);
        wait_products(v_full, v_next);
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
        const int count = w.count() - (C::kShares ? group : 0);
        any = count > 0;  // one warpgroup's and, so, the other's of two that have their own rows
        wgmma_wait<0>();
        pin(scores[0]);
        if constexpr (C::kPipelined) {
            attend_pipelined(count);
        } else if (any) {
            attend_in_turn();
        }
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

    // Of one tile after another: its softmax under the last one's product with V; then its own and
    // the next one's scores are begun. One loop for all, in a fifth of the instructions that
    // `attend_pipelined` has: between a decoder's matmuls they are no longer in the
    // multiprocessor's cache, and come from memory more slowly than they are executed.
    __device__ __forceinline__ void attend_in_turn() {
        release_k();
        const int head = w.template head<C>(p), tail = w.tail(p);
        int tile = w.lo + (C::kShares ? group : 0), left = w.hi - tile;
        Ring v_next = v_ring;
        bool first = true;
#pragma unroll 1
        for (; left > 0; left -= C::kStep) {
            const bool last = left <= C::kStep;
            const bool k_full = is_full(0, k_ring), v_full = is_full(1, v_next);
            float shrink[2];
            const bool moves = probabilities<true>(scores[0], tile, shrink);
            wait_products(v_full, v_next);
            if (!first) release_v();
            if (moves) rescale(shrink);
            pack_probs(scores[0]);
            begin_scores<0>(!last && !k_full);  // of nothing, after the last one; not used then
            begin_out(true);
            advance_v(v_next);
            wgmma_wait<1>();
            pin(scores[0]);
            if (!last) release_k();
            first = false;
            tile += C::kStep;
            if constexpr (C::kTailThird) {
                if (tile == head) tile = tail;
                if (tile == w.hi) tile = head;
            }
        }
    }

    // Each tile's softmax under the last one's product with V and the next one's scores.
    __device__ __forceinline__ void attend_pipelined(int left) {
        const auto this_tile = [&] { return w.hi - left; };
        const bool only = left <= 1;
        if (any) {
            release_k();
            if (!only) {
                step<0, true, true>(this_tile());
                --left;
                // Most tiles hold committed tokens alone: their loop has no code for masks. Not
                // worth reading where it runs a few times.
                const int masked = max(w.hi - w.whole, 0);  // at the end
                const int end = left <= 7 ? left : masked + 2;
#pragma unroll 1
                for (; left > end; left -= 2) {
                    step<1, false, false>(0);
                    step<0, false, false>(0);
                }
#pragma unroll 1
                for (; left > 1; --left) {
                    step<1, false, true>(this_tile());
                    keep_scores();
                }
            } else {
                keep_scores();
            }
            last_step(this_tile(), only);
        } else if (p.items) {
            look_ahead();
        }
        begin_out(!only);
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
            following.load_lengths(p);
            find_q(following);
            load_q();
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
                             float4{from[i], from[i + 1], from[i + 2], from[i + 3]});
            }
        };
        sync_threads<kComputeBarrier, 2 * kGroupThreads>();  // the tiles' memory is free
        const float mine[2] = {reference(0), reference(1)};
        store_shared(place(group, kGiven), float4{mine[0], mine[1], sum[0], sum[1]});
        if (group == 0) {
            give(out + kOut);
        } else {
            give(out);
#pragma unroll
            for (int i = 0; i < kOut; ++i) out[i] = out[kOut + i];
        }
        sync_threads<kComputeBarrier, 2 * kGroupThreads>();
        const float4 other = load_shared_float4(place(1 - group, kGiven));
        const float its[2] = {other.x, other.y}, its_sum[2] = {other.z, other.w};
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
            const float4 x = load_shared_float4(place(1 - group, i / 4));
            out[i] = fmaf(x.x, add[0], out[i] * keep[0]);
            out[i + 1] = fmaf(x.y, add[0], out[i + 1] * keep[0]);
            out[i + 2] = fmaf(x.z, add[1], out[i + 2] * keep[1]);
            out[i + 3] = fmaf(x.w, add[1], out[i + 3] * keep[1]);
        }
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
            const float norm = real ? v_scale * reciprocal(total) : 0.0f;
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
    // block goes on with. meanwhile: what else is done while the first tile comes.
    template <typename Meanwhile>
    __device__ __forceinline__ void run(Meanwhile&& meanwhile) {
        load_q();                                   // before the lengths are there
        if constexpr (C::kCluster) cluster_wait();  // until the other blocks have begun, meanwhile
        if constexpr (C::kFp8) narrow_q(w);
        w.set_tiles(p);
        if (w.idle(p)) return;
        meanwhile();
        if (C::kPipelined && group == 1)
            arrive_threads(kTurnBarriers, 2 * kGroupThreads);  // the other's first
        begin_scores<0>(w.count() > (C::kShares ? group : 0));
#pragma unroll 1
        for (;;) {
            attend();
            if (w.merges(p)) break;
            write(w);
            if (!goes_on) break;
            w = following;
        }
        if (C::kPipelined && group == 0)
            sync_threads(kTurnBarriers, 2 * kGroupThreads);  // has none any more
        if constexpr (C::kStay) wgmma_wait<0>();
    }

    // Leaves this split's results in memory, as `merge` takes them.
    __device__ __forceinline__ void publish(float4* partial, float2* stats) {
        if constexpr (C::kPipelined) {  // elsewhere a warpgroup without tiles has zeros
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) out[i] = any ? out[i] : 0.0f;
        }
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

}  // namespace medusa_kernels::sm90
