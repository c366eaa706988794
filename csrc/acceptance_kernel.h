// accept_candidates on the GPU, one launch: its kernel. A row of logits is shared by a cluster of
// blocks (one block where it fits in that's shared memory, and before sm_90), which keeps it in
// shared memory while it is reduced over and over.
//
// For few requests, all nodes at once: whoever measures a node's row also decides which of its
// children pass and which token comes after a path that ends there, and mails that to the request's
// last group of blocks, which then finds the path without a look at the logits. For many requests,
// one cluster a request measures only the rows that its walk comes to: leaves never, but for the
// token after the path's end. Sampling's walk, a chain of such rows, has more clusters where there
// is room: they measure, at once, the nodes of the path to which the drafts' own logits point, and
// mail their draws to the request's last one, which goes on alone from where those leave that path.
//
// For nvcc, or for a C++ compiler (acceptance_ptx.h).
#pragma once

#include "acceptance.h"
#include "acceptance_shared.h"

namespace medusa_kernels::gpu {

constexpr uint32_t kKeyOfNan = 0xFFFFFFFFu;  // above all others

// `kKeeps`: a row fits in shared memory; else it is read again for every reduction. `kGreedyOnly`:
// no request has another mode, which leaves a third of the code to be fetched.
template <typename scalar_t, bool kKeeps, bool kGreedyOnly>
struct Accept {
    static constexpr int kVector = 16 / sizeof(scalar_t);
    using word_t = std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint16_t>;
    static constexpr uint32_t kLowest = sizeof(scalar_t) == 4              ? 0xFF800000u
                                        : std::is_same_v<scalar_t, __half> ? 0xFC00FC00u
                                                                           : 0xFF80FF80u;  // -inf

    const AcceptParams& p;
    Shared& s;
    uint4* const kept;  // the block's part of the row at hand; each thread reads only what it wrote
    const int warp, lane;
    const Request& r;   // in shared memory, after load_tree()
    int exchanges = 0;  // so far

    __device__ Accept(const AcceptParams& params, Shared& shared, uint4* row)
        : p(params),
          s(shared),
          kept(row),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          r(shared.request) {}

    __device__ int mode_of_request() const { return kGreedyOnly ? kGreedy : r.mode; }

    __device__ static int b() { return blockIdx.z; }
    __device__ static int rank() { return blockIdx.x; }  // among the blocks of a row
#if MK_CLUSTERS
    __device__ int blocks() const { return p.blocks; }     // of a cluster
    __device__ int turn() const { return exchanges % 2; }  // of s.block, s.came and s.first
#else
    __device__ int blocks() const { return 1; }
    __device__ int turn() const { return 0; }
#endif

    __device__ void sync() const {
        if (blocks() > 1) {
            Cluster::sync();
        } else {
            __syncthreads();
        }
    }

    __device__ const scalar_t* row(int node) const {
        return static_cast<const scalar_t*>(p.a.logits) + b() * p.a.logits_stride_b +
               node * p.a.logits_stride_t;
    }

    // A row as 16-byte vectors from the aligned address at or before its start; each warp of its
    // blocks, a "unit", has a contiguous range of them.
    struct Span {
        const uint4* vectors;
        int skew, base, begin, end;  // base: the block's first
    };
    __device__ Span span(const scalar_t* row) const {
        Span x;
        x.skew = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(scalar_t));
        x.vectors = reinterpret_cast<const uint4*>(row - x.skew);
        const int count = (x.skew + p.a.vocab + kVector - 1) / kVector;
        x.base = rank() * kWarps * p.each;
        x.begin = min(x.base + warp * p.each, count);
        x.end = min(x.begin + p.each, count);
        return x;
    }
    __device__ bool is_whole(const Span& x, int v) const {
        const int first = v * kVector - x.skew;
        return first >= 0 && first + kVector <= p.a.vocab;
    }
    // Vector v; what of it is outside the row is not read, and counts as -inf.
    __device__ uint4 load(const Span& x, int v) const {
        if (is_whole(x, v)) return __ldg(x.vectors + v);
        const int first = v * kVector - x.skew;
        const scalar_t* from = reinterpret_cast<const scalar_t*>(x.vectors + v);
        uint4 words{};
#pragma unroll 1
        for (int e = kVector - 1; e >= 0; --e) {  // from the last element on, moved up one by one
            const bool inside = static_cast<unsigned>(first + e) < static_cast<unsigned>(p.a.vocab);
            if constexpr (sizeof(scalar_t) == 4) {
                words = {inside ? __float_as_uint(from[e]) : kLowest, words.x, words.y, words.z};
            } else {
                const uint32_t bits =
                    inside ? reinterpret_cast<const uint16_t*>(from)[e] : kLowest & 0xFFFF;
                words = {words.x << 16 | bits, words.y << 16 | words.x >> 16,
                         words.z << 16 | words.y >> 16, words.w << 16 | words.z >> 16};
            }
        }
        return words;
    }
    __device__ static float element(const uint4& raw, int e) {
        const uint32_t word = sizeof(scalar_t) == 4 ? (&raw.x)[e] : (&raw.x)[e / 2];
        if constexpr (sizeof(scalar_t) == 4) {
            return __uint_as_float(word);
        } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
            return __uint_as_float(e % 2 ? word & 0xFFFF0000u : word << 16);
        } else {
            return __half2float(
                __ushort_as_half(static_cast<unsigned short>(e % 2 ? word >> 16 : word)));
        }
    }

    // Of node threadIdx.x, which has a parent: its logit there, until its weight takes that's
    // place.
    __device__ float own_logit() const {
        return element(make_uint4(s.weights[threadIdx.x], 0, 0, 0), 0);
    }

    // Of a vector: the greatest of each half of its words; of such halves; whether `best`, which
    // nothing exceeds, is in it; whether something in it is not below `least`, which may be NaN.
    __device__ static uint32_t greatest_word(const uint4& part) {
        return ptx::max_or_nan<scalar_t>(ptx::max_or_nan<scalar_t>(part.x, part.y),
                                         ptx::max_or_nan<scalar_t>(part.z, part.w));
    }
    __device__ static float greater_half(uint32_t word) {
        const uint4 both{word, word, word, word};
        return __uint_as_float(ptx::max_or_nan<float>(__float_as_uint(element(both, 0)),
                                                      __float_as_uint(element(both, 1))));
    }
    __device__ static bool has_equal(const uint4& part, float best) {
        return greater_half(greatest_word(part)) == best;
    }
    __device__ static bool reaches(const uint4& part, float least) {
        return !(greater_half(greatest_word(part)) < least);
    }

    // Starts the loads of a row that is kept; its first and last vector may be partial.
    __device__ void fetch(const Span& x) {
#pragma unroll kLoads
        for (int v = x.begin + lane; v < x.end; v += 32) {
            if (is_whole(x, v)) ptx::copy(kept + v - x.base, x.vectors + v);
        }
        const int last = (x.skew + p.a.vocab - 1) / kVector;
#pragma unroll 1
        for (int v = 0;; v = last) {
            const bool mine = v >= x.begin && v < x.end && (v - x.begin) % 32 == lane;
            if (mine && !is_whole(x, v)) kept[v - x.base] = load(x, v);
            if (v == last) break;
        }
    }
    // f(index, logit) for this thread's part of a row, in order of the index; -inf for indices
    // outside the row. From shared memory if `from_kept`.
    template <bool from_kept, typename F>
    __device__ void for_each(const Span& x, F&& f) const {
#pragma unroll 1
        for (int v = x.begin + lane; v < x.end; v += 32) {
            const uint4 part = from_kept ? kept[v - x.base] : load(x, v);
#pragma unroll
            for (int e = 0; e < kVector; ++e) f(v * kVector - x.skew + e, element(part, e));
        }
    }
    // f(vector) for those that have anything not below `least` (NaN: for all). Of a kept row those
    // are marked first, so that a warp takes as many turns as the lane with the most of them, not
    // one for each that any of its lanes needs.
    template <bool from_kept, typename F>
    __device__ void for_each_vector_from(float least, const Span& x, F&& f) const {
        if constexpr (from_kept) {
            const int first = x.begin + lane;
            uint32_t which = (1u << (x.end - first + 31) / 32) - 1;
            if (least == least) {
                which = 0;
#pragma unroll kLoads
                for (int v = first, bit = 1; v < x.end; v += 32, bit *= 2) {
                    if (reaches(kept[v - x.base], least)) which |= bit;
                }
            }
#pragma unroll 1
            for (; which; which &= which - 1) {
                f(kept[first - x.base + 32 * lowest_bit(which)]);
            }
        } else {
#pragma unroll 1
            for (int v = x.begin + lane; v < x.end; v += 32) {
                const uint4 part = load(x, v);
                if (reaches(part, least)) f(part);
            }
        }
    }

    // f(logit) for all that are not below `least`, and for some that are.
    template <bool from_kept, typename F>
    __device__ void for_each_from(float least, const Span& x, F&& f) const {
        for_each_vector_from<from_kept>(least, x, [&](const uint4& part) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) f(element(part, e));
        });
    }
    // f(logit) for those of a kept row from `least` up to `top`, without it: marked first, as
    // above.
    template <typename F>
    __device__ void for_each_between(float least, float top, const Span& x, F&& f) const {
        constexpr int kVectors = 32 / kVector;
#pragma unroll 1
        for (int v = x.begin + lane; v < x.end; v += 32 * kVectors) {
            uint32_t which = 0;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                if (v + 32 * i >= x.end) break;
                const uint4 part = kept[v - x.base + 32 * i];
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    const float logit = element(part, e);
                    if (logit >= least && logit < top) which |= 1u << (i * kVector + e);
                }
            }
#pragma unroll 1
            for (; which; which &= which - 1) {
                const uint32_t bit = lowest_bit(which);
                const uint4* part = kept + v - x.base + 32 * (bit / kVector);
                const word_t word = reinterpret_cast<const word_t*>(part)[bit % kVector];
                f(element(make_uint4(word, 0, 0, 0), 0));
            }
        }
    }

    // Puts what the block's warps have in s.partial together, into all blocks' s.block, and waits
    // for theirs: each reads only its own, so that one may end while another still reads.
    template <typename Op>
    __device__ void exchange(int num_values) {
        if (warp < num_values) {
            uint64_t value[1] = {lane < kWarps ? s.partial[lane][warp] : 0};
            Op::template reduce<1>(value);
            if (blocks() > 1) {
                put(value[0], warp, num_values);
            } else if (lane == 0) {
                s.block[turn()][0][warp] = value[0];
            }
        }
        if (blocks() > 1) {
            Cluster::wait(&s.came[turn()], exchanges / 2 % 2);
        } else {
            __syncthreads();
        }
    }
    // One of the block's words, by a warp.
    __device__ void put(uint64_t word, int which, int num_words) {
        if (threadIdx.x == 0)
            Cluster::expect(&s.came[turn()], blocks() * num_words * sizeof(uint64_t));
        if (lane < blocks())
            Cluster::put(&s.block[turn()][rank()][which], word, &s.came[turn()], lane);
    }
    // Of all threads of the cluster, to all of them.
    template <typename Op, int kValues>
    __device__ void all_reduce(uint64_t (&values)[kValues]) {
        Op::template reduce<kValues>(values);
        if (lane == 0) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) s.partial[warp][k] = values[k];
        }
        __syncthreads();
        exchange<Op>(kValues);
        if (blocks() == 1) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) values[k] = s.block[turn()][0][k];
        } else {
#pragma unroll
            for (int k = 0; k < kValues; ++k)
                values[k] = lane < blocks() ? s.block[turn()][lane][k] : 0;
            Op::template reduce<kValues>(values);
        }
        ++exchanges;  // a block is at most one ahead of another
    }

    // What everything that is not below each of s.bounds weighs, to all blocks' s.block. Of a kept
    // row without what is above the search's last key, which is known.
    __device__ void measure_pivots(const Distribution& weights) {
        if (lane < kPivots) s.partial[warp][lane] = 0;
        constexpr int kAtOnce = kExactSums / kVector * 32;  // vectors of a warp
        static_assert(kResident * 32 <= kAtOnce);
        int from = 0;
#pragma unroll 1
        do {
            Span x = span(row(s.fetched));
            x.begin += from;
            x.end = min(x.begin + kAtOnce, x.end);
            add_pivots(weights, x);
            from += kAtOnce;
        } while (!kKeeps && from < p.each);
        __syncthreads();
        exchange<Sum>(kPivots);
    }
    // The same for a part of a warp's range, to s.partial.
    __device__ void add_pivots(const Distribution& weights, const Span& x) {
        float bounds[kPivots], high[kPivots] = {}, low[kPivots] = {};
#pragma unroll
        for (int j = 0; j < kPivots; ++j) bounds[j] = s.bounds[j];
        const auto add = [&]<int kLower>(float v) {  // to the lower pivots' sums
            const auto [v_high, v_low] = weights.weight_parts(v);
#pragma unroll
            for (int j = 0; j < kLower; ++j) {
                if (v >= bounds[j]) {
                    high[j] = f_add(high[j], v_high);
                    low[j] = f_add(low[j], v_low);
                }
            }
        };
        if (kKeeps && s.search.round > 0) {
            for_each_between(bounds[0], s.top, x,
                             [&](float v) { add.template operator()<kPivots>(v); });
        } else {
            for_each_vector_from<kKeeps>(bounds[0], x, [&](const uint4& part) {
                // The first round's upper pivots have little above them.
                if (!kKeeps || ptx::any_active(reaches(part, bounds[kPivots / 2]))) {
#pragma unroll
                    for (int e = 0; e < kVector; ++e)
                        add.template operator()<kPivots>(element(part, e));
                } else {
#pragma unroll
                    for (int e = 0; e < kVector; ++e)
                        add.template operator()<kPivots / 2>(element(part, e));
                }
            });
        }
        uint32_t highs[kPivots], lows[kPivots];
#pragma unroll
        for (int j = 0; j < kPivots; ++j) {
            highs[j] = round_unsigned(f_mul(high[j], 1.0f / 65536));
            lows[j] = round_signed(low[j]);
        }
        // Each step leaves a lane half of the sums, of twice as many lanes.
#pragma unroll
        for (int half = kPivots / 2; half > 0; half /= 2) {
#pragma unroll
            for (int j = 0; j < half; ++j) {
                highs[j] = halve(highs[j], highs[j + half], half);
                lows[j] = halve(lows[j], lows[j + half], half);
            }
        }
        uint64_t sum = (uint64_t(highs[0]) << 16) + int64_t(static_cast<int32_t>(lows[0]));
#pragma unroll
        for (int apart = kPivots; apart < 32; apart *= 2) sum += shuffle(sum, lane ^ apart);
        if (lane < kPivots) s.partial[warp][lane] += sum;
    }
    // The sum of this lane's and another's: of a, or in the upper one of the two of b.
    __device__ uint32_t halve(uint32_t a, uint32_t b, int apart) const {
        const bool upper = lane & apart;
        return (upper ? b : a) + __shfl_sync(kAllLanes, upper ? a : b, lane ^ apart);
    }
    // Goes on with a search by what measure_pivots() has found. By one warp of each block, all of
    // which find the same; a lane has a pivot.
    __device__ void narrow_search(const Distribution& d) {
        uint64_t sum = 0;
#pragma unroll 1
        for (int i = lane / kPivots; i < blocks(); i += 32 / kPivots)
            sum += s.block[turn()][i][lane % kPivots];
#pragma unroll
        for (int apart = kPivots; apart < 32; apart *= 2) sum += shuffle(sum, lane ^ apart);
        CutoffSearch search = s.search;
        if (kKeeps) sum += search.above;
        const uint32_t pivot = s.pivots[lane % kPivots];
        if (search.limit == 0) search.limit = top_p_limit(r.top_p, shuffle(sum, 0));
        const int reached = __reduce_add_sync(kAllLanes, sum >= search.limit) / (32 / kPivots);
        if (reached > 0)
            search.set_first(__shfl_sync(kAllLanes, pivot, reached - 1), shuffle(sum, reached - 1));
        if (reached < kPivots)
            search.set_last(__shfl_sync(kAllLanes, pivot, reached), shuffle(sum, reached));
        place_pivots(search, d);
    }
    __device__ void place_pivots(CutoffSearch search, const Distribution& d) {
        search.place_pivots(d, p.a.vocab);
        if (lane < kPivots) {
            const uint32_t pivot = search.pivot(lane);
            s.pivots[lane] = pivot;
            s.bounds[lane] = search.bound(pivot);
        }
        if (lane == 0) {
            s.search = search;
            s.top = search.bound(search.last);
        }
    }

    // Of all threads of the cluster: argmax_key of a row's greatest logit, where that has no NaN;
    // else kKeyOfNan in its upper half.
    __device__ uint64_t greatest(const Span& x) {
        uint32_t most = kLowest;
        if constexpr (kKeeps) ptx::wait_for_copies();
#pragma unroll kLoads
        for (int v = x.begin + lane; v < x.end; v += 32) {
            const uint4 part = kKeeps ? kept[v - x.base] : load(x, v);
            most = ptx::max_or_nan<scalar_t>(most, greatest_word(part));
        }
        const float best = greater_half(most);
        const uint32_t key = best == best ? order_key(best) : kKeyOfNan;
        const uint32_t of_warp = __reduce_max_sync(kAllLanes, key);
        if (lane == 0) s.partial[warp][0] = of_warp;
        if (threadIdx.x == 0) s.first[turn()] = 0xFFFFFFFFu;
        __syncthreads();
        const uint32_t of_block = __reduce_max_sync(
            kAllLanes, lane < kWarps ? static_cast<uint32_t>(s.partial[lane][0]) : 0u);
        if (of_warp == of_block) {  // where it is, by few warps
            uint32_t at = 0xFFFFFFFFu;
            if (key == of_block) {
                int which = x.end;  // its first vector that has the greatest
#pragma unroll(kKeeps ? kLoads : 1)
                for (int v = x.begin + lane; v < x.end; v += 32) {
                    if (has_equal(kKeeps ? kept[v - x.base] : load(x, v), best))
                        which = min(which, v);
                }
                if (which < x.end) {  // not where there is a NaN
                    const uint4 part = kKeeps ? kept[which - x.base] : load(x, which);
#pragma unroll
                    for (int e = kVector - 1; e >= 0; --e) {
                        const uint32_t i = which * kVector - x.skew + e;
                        if (element(part, e) == best && i < static_cast<uint32_t>(p.a.vocab))
                            at = i;
                    }
                }
            }
            at = __reduce_min_sync(kAllLanes, at);
            if (lane == 0) atomicMin(&s.first[turn()], at);
        }
        __syncthreads();
        uint64_t key_and_place[1] = {uint64_t(of_block) << 32 | (0xFFFFFFFFu - s.first[turn()])};
        if (blocks() > 1) {
            if (warp == 0) put(key_and_place[0], 0, 1);
            Cluster::wait(&s.came[turn()], exchanges / 2 % 2);
            key_and_place[0] = lane < blocks() ? s.block[turn()][lane][0] : 0;
            Max::reduce<1>(key_and_place);
        }
        ++exchanges;
        return key_and_place[0];
    }

    // The same of its greatest number where there are NaNs, too; 0: it has none.
    __device__ uint64_t greatest_number(const Span& x, bool* has_nan) {
        const uint64_t best = greatest(x);
        *has_nan = best >> 32 == kKeyOfNan;
        if (!*has_nan) return best;
        uint64_t number[1] = {0};
        for_each<false>(x, [&](int i, float v) {
            const bool inside = static_cast<unsigned>(i) < static_cast<unsigned>(p.a.vocab);
            number[0] = max(number[0], inside ? argmax_key(v, i) : 0);
        });
        all_reduce<Max>(number);
        return number[0];
    }

    // What `mode` needs to know of a node's row, to s.dist. Called by the whole cluster, from one
    // place: it is most of the code. `exact`: typical acceptance's bound itself is needed, not only
    // what it decides.
    __device__ void measure(int node, int mode, bool exact) {
        const Span x = span(row(node));
        if (kKeeps && s.fetched != node) fetch(x);
        bool has_nan;
        const uint64_t best = greatest_number(x, &has_nan);
        const uint32_t top = static_cast<uint32_t>(best >> 32);
        Distribution d = start_distribution(best, has_nan, key_value(top), r.scale);
        if (!kGreedyOnly && d.valid && mode == kTypical) {
            uint64_t sums[2] = {0, 0};  // weights; weights times -log2 of themselves
            float moment = 0.0f;
            for_each<kKeeps>(x, [&](int, float v) {
                const float below = d.below_max(v);
                const float weight = exp2_product<31>(below, d.scale);
                sums[0] += round_unsigned(weight);
                moment = fmaf(weight, below, moment);
            });
            sums[1] = __float2ull_rn(-moment * d.scale);
            all_reduce<Sum>(sums);
            set_total(d, sums[0]);
            // The entropy takes a pass that is four times as long, and seldom decides.
            const BoundRange range = bound_range(
                d, r, static_cast<float>(sums[1]) / static_cast<float>(sums[0]), p.a.vocab);
            const int t = threadIdx.x;
            bool open = exact;
            if (t > node && t < r.nodes && s.parents[t] == node) {
                const float probability = d.probability(own_logit());
                open |= probability > range.low && !(probability > range.high);
            }
            d.bound = range.high;
            if (__syncthreads_or(open)) {
                uint64_t entropy[1] = {0};
                for_each<kKeeps>(x, [&](int, float v) {
                    entropy[0] += static_cast<uint64_t>(int64_t(d.entropy_part(v)));
                });
                all_reduce<Sum>(entropy);
                set_bound(d, r, static_cast<int64_t>(entropy[0]));
            }
        }
        if (threadIdx.x == 0) {
            s.dist[node] = d;
            s.fetched = node;
        }
        if (!kGreedyOnly && d.valid && mode == kSampling) cut(s.dist[node]);
    }

    // Sampling: what top-k, then top-p of what that leaves, keep of the row at hand. A search is in
    // shared memory, as is d: registers are scarce where rows are summed up.
    __device__ void cut(Distribution& d) {
        // A thread with many logits adds them up first: that is a third of a search's round, and
        // often shows that the maximum alone is kept.
        const bool is_long = !kKeeps || p.each * kVector > 32 * 32;
#pragma unroll 1
        for (int step = 0; step < 2; ++step) {
            const bool by_count = step == 0;
            const bool cuts = by_count ? r.top_k > 0 && r.top_k < p.a.vocab : r.top_p < 1.0f;
            __syncthreads();  // d is written, and s.search has been read
            if (!by_count && (is_long || !cuts)) {
                uint64_t total[1] = {0};
                for_each_from<kKeeps>(key_value(d.cutoff), span(row(s.fetched)),
                                      [&](float v) { total[0] += kept_weight(d, false, v); });
                all_reduce<Sum>(total);
                if (threadIdx.x == 0) d.total = total[0];
                __syncthreads();
            }
            if (!cuts) continue;
            if (warp == 0) {
                const uint64_t limit = by_count  ? r.top_k * kWeightOfMax
                                       : is_long ? top_p_limit(r.top_p, d.total)
                                                 : 0;
                place_pivots(start_search(d, d.cutoff, limit, kDropBits<scalar_t>), d);
            }
            __syncthreads();
#pragma unroll 1
            do {
                measure_pivots(by_count ? d.flat() : d);
                if (warp == 0) narrow_search(d);
                ++exchanges;
                __syncthreads();
            } while (s.search.first < s.search.last);
            if (threadIdx.x == 0) {
                d.cutoff = s.search.first << s.search.drop;
                d.total = s.search.kept;
            }
        }
    }

    // A token of the kept part of a row, without s.kids' tokens if `removes`, to rank 0's s.next.
    // By the whole cluster.
    __device__ void draw_token(int node, const Distribution& d, bool typical, bool removes,
                               uint64_t random) {
        const Span x = span(row(node));
        if constexpr (kKeeps) {
            if (s.fetched != node) fetch(x);
            ptx::wait_for_copies();
        }
        const float least = key_value(d.cutoff);  // NaN where nothing is cut
        uint64_t sum = 0;
        for_each_from<kKeeps>(least, x, [&](float v) { sum += kept_weight(d, typical, v); });
        uint64_t lost = 0;
        for (int c = lane; c < r.nodes && removes; c += 32) {
            if (!has(s.kids, c) || s.weights[c] == 0) continue;
            const int v = (static_cast<int>(s.tokens[c]) + x.skew) / kVector;
            if (v >= x.begin && v < x.end) lost += s.weights[c];
        }
        const bool loses = __reduce_max_sync(kAllLanes, lost > 0);
        uint64_t left[1] = {sum - lost};
        Sum::reduce<1>(left);
        if (lane == 0) s.units[warp] = left[0];
        sync();
        if (warp == 0) {
            constexpr int kEach = kMaxCluster * kWarps / 32;
            static_assert(kWarps % kEach == 0, "a lane's units are of one block");
            const int first = lane * kEach;
            uint64_t own[kEach] = {}, mine = 0;
            if (first < blocks() * kWarps) {
                const uint64_t* units = Cluster::of(s.units, first / kWarps) + first % kWarps;
#pragma unroll
                for (int i = 0; i < kEach; ++i) mine += own[i] = units[i];
            }
            const uint64_t upto = scan(mine);
            const uint64_t total = shuffle(upto, 31);
            const uint64_t draw = mul_high(random, total);
            if (total == 0 && lane == 0) {
                s.unit = -1;
                s.next = d.argmax;
            }
            uint64_t before = upto - mine;
            if (draw >= before && draw < upto) {
#pragma unroll
                for (int i = 0; i < kEach; ++i) {
                    if (draw >= before && draw < before + own[i]) {
                        s.unit = lane * kEach + i;
                        s.draw = draw - before;
                    }
                    before += own[i];
                }
            }
        }
        __syncthreads();
        if (s.unit == rank() * kWarps + warp) {
            uint64_t before = 0;
            const uint64_t draw = s.draw;
            for (int from = x.begin; from < x.end; from += 32) {
                const int v = from + lane, first = v * kVector - x.skew;
                uint32_t weights[kVector];
                uint64_t mine = 0;
                uint4 part{};
                if (v < x.end) part = kKeeps ? kept[v - x.base] : load(x, v);
                if (!__reduce_max_sync(kAllLanes, v < x.end && reaches(part, least))) continue;
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                    weights[e] = v < x.end ? kept_weight(d, typical, element(part, e)) : 0;
                for (int w = 0; w * 32 < r.nodes && loses; ++w) {
                    for (uint32_t rest = s.kids[w]; rest; rest &= rest - 1) {
                        const int64_t at = s.tokens[w * 32 + lowest_bit(rest)] - first;
#pragma unroll
                        for (int e = 0; e < kVector; ++e) weights[e] = at == e ? 0 : weights[e];
                    }
                }
#pragma unroll
                for (int e = 0; e < kVector; ++e) mine += weights[e];
                const uint64_t upto = before + scan(mine);
                uint64_t at = upto - mine;
                if (draw >= at && draw < upto) {
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        if (draw >= at && draw < at + weights[e])
                            *Cluster::of(&s.next, 0) = first + e;
                        at += weights[e];
                    }
                }
                before = shuffle(upto, 31);
                if (draw < before) break;
            }
        }
    }

    // Sum of the lanes up to this one.
    __device__ uint64_t scan(uint64_t x) const {
        for (int step = 1; step < 32; step *= 2) {
            const uint64_t y = __shfl_up_sync(kAllLanes, static_cast<unsigned long long>(x), step);
            if (lane >= step) x += y;
        }
        return x;
    }

    __device__ void set_bit(uint32_t* words, int node) {
        atomicOr(words + (node >> 5), 1u << (node & 31));
    }

    // Also starts the loads of the first node's row. The blocks of a node need to know its children
    // alone.
    __device__ void load_tree(const Request& request, int first) {
        const int t = threadIdx.x;
        int parent = -1;
        int64_t token = -1;
        uint64_t offset = 0, seed = p.a.seed;
        if (t < request.nodes) {
            token = p.a.tokens[b() * p.a.tokens_stride_b + t];
            if (t > 0) parent = p.a.parents[b() * p.a.parents_stride_b + t];
        }
        if (t == 0 && p.a.generator) {
            seed = p.a.generator[0];
            offset = ptx::look(p.a.generator + 1);  // others count themselves above it
        }
        if (kKeeps && first < request.nodes) {
            fetch(span(row(first)));
        }
        if (t < kNodeWords) s.inner[t] = s.accepted[t] = s.kids[t] = s.measured[t] = s.again[t] = 0;
        __syncthreads();
        bool mine = false;
        uint32_t own_bits = kLowest;  // for a token outside the vocabulary
        if (t < request.nodes) {
            if (t > 0) {
                // No value may lead out of the tree: a pointer that is not topological is clamped.
                parent = parent < 0 ? 0 : parent < t ? parent : t - 1;
                set_bit(s.inner, parent);
                mine = !kGreedyOnly && request.mode != kGreedy &&
                       (gridDim.y == 1 || p.ahead || parent % gridDim.y == blockIdx.y);
                if (mine && in_vocab(token, p.a.vocab))
                    own_bits = reinterpret_cast<const word_t*>(row(parent))[token];
            }
            s.parents[t] = parent;
            s.tokens[t] = token;
            s.depth[t] = 0;
            s.score[t] = 0.0f;
            if (!kGreedyOnly) s.mail[t] = 0;
        }
        if (t == 0) {
            s.fetched = first;
            s.seed = seed;
            if (gridDim.y > 1 || !p.a.generator)
                s.offset = offset & kOffsetMask;  // else take_seed()
            s.deepest = 0;
            s.first_eos = 0xFFFFFFFFu;
        }
        __syncthreads();
        if (mine) s.weights[t] = own_bits;  // waits for it
        if (mine && request.mode == kSampling) {
            using word = unsigned long long;
            if (p.ahead)
                atomicMax(reinterpret_cast<word*>(s.mail + parent),
                          word(argmax_key(own_logit(), t)));
            bool again = false;
#pragma unroll 4
            for (int c = parent + 1; c < t; ++c)
                again |= (s.parents[c] == parent) & (s.tokens[c] == token);
            if (again) set_bit(s.again, t);
        }
    }

    __device__ static bool has(const uint32_t* words, int node) {
        return words[node >> 5] >> (node & 31) & 1;
    }

    // Where node t's words begin.
    __device__ uint64_t* mail(int node) const {
        return accept_mail + p.first_mail +
               (int64_t(b()) * p.a.size + node) * (blocks() > 1 ? 1 : gridDim.x);
    }
    // The lower half of a node's word.
    __device__ void send(int node, uint32_t what) const {
        if (rank() == 0 && threadIdx.x == 0)
            ptx::send(reinterpret_cast<uint32_t*>(mail(node)), kSent | what);
    }
    // Greedy: the word of this block's part of a node's row, which may be empty.
    __device__ void send_greatest(int node, uint64_t best) const {
        if (threadIdx.x > 0 || (blocks() > 1 && rank() > 0)) return;
        const bool is_number = static_cast<uint32_t>(best) != 0;  // the place of none
        ptx::send(mail(node) + rank(), is_number ? best : kNoNumber);
    }
    // The words of all of this group's nodes, for which it need not know the tree.
    __device__ void send_all_greatest(int nodes) {
#pragma unroll 1
        for (int node = blockIdx.y; node < nodes; node += gridDim.y) {
            const Span x = span(row(node));
            if constexpr (kKeeps) fetch(x);
            bool has_nan;
            send_greatest(node, greatest_number(x, &has_nan));
            __syncthreads();  // the next one's goes to the same memory
        }
    }
    // Typical: the upper halves of its children's words.
    __device__ void send_children(int node) const {
        const int t = threadIdx.x;
        if (rank() > 0 || t <= node || t >= r.nodes || s.parents[t] != node) return;
        float log_p = 0.0f;
        uint32_t word = kRejected;
        if (passes(node, &log_p)) word = __float_as_uint(log_p);
        if (word == 0) word = 0x80000000u;  // -0
        ptx::send(reinterpret_cast<uint32_t*>(mail(t)) + 1, word);
    }

    // What the others have sent, to s.mail, by one block; they may not all have begun to run, but
    // each does.
    __device__ void receive() {
        const int each = blocks() > 1 ? 1 : gridDim.x;
#pragma unroll 1
        for (int i = threadIdx.x; i < r.nodes * each; i += kThreads) {
            const bool two = mode_of_request() == kTypical && i > 0;  // halves, that come apart
            s.mail[i] = take(mail(0) + i, two);
        }
        __syncthreads();
    }
    __device__ static uint64_t take(uint64_t* at, bool two) {
        uint64_t word;
        do {
            word = ptx::look(at);
        } while (static_cast<uint32_t>(word) == 0 || (two && word >> 32 == 0));
        *at = 0;
        return word;
    }
    // Greedy: argmax_key of a node's row, from the parts of it.
    __device__ uint64_t received_greatest(int node) const {
        const int each = blocks() > 1 ? 1 : gridDim.x;
        uint64_t most = 0;
#pragma unroll 1
        for (int i = 0; i < each; ++i) most = max(most, s.mail[node * each + i]);
        return most;
    }
    __device__ int received_next(int node) const {
        if (mode_of_request() != kGreedy) return static_cast<uint32_t>(s.mail[node]) & ~kSent;
        const uint64_t most = received_greatest(node);
        return most == kNoNumber ? 0 : 0xFFFFFFFFu - static_cast<uint32_t>(most);
    }
    __device__ bool received_passes(int node, int parent, float* log_p) const {
        const int64_t token = s.tokens[node];
        if (mode_of_request() == kGreedy) {
            return in_vocab(token, p.a.vocab) && received_greatest(parent) != kNoNumber &&
                   received_next(parent) == token;
        }
        const uint32_t word = s.mail[node] >> 32;
        *log_p = __uint_as_float(word);
        return word != kRejected;
    }

    // Greedy, typical: whether node threadIdx.x, which has a parent, is accepted if that is;
    // typical: its log probability, too.
    __device__ bool passes(int of_parent, float* log_p) const {
        const Distribution& parent = s.dist[of_parent];
        const int64_t token = s.tokens[threadIdx.x];
        if (!in_vocab(token, p.a.vocab)) return false;
        if (mode_of_request() != kTypical) return parent.has_max && token == parent.argmax;
        const float logit = own_logit();
        *log_p = parent.log_probability(logit);
        return parent.valid && parent.probability(logit) > parent.bound;
    }

    // Greedy, typical: accepts children of a measured node.
    __device__ void accept_children(int node) {
        const int t = threadIdx.x;
        float log_p = 0.0f;
        if (t > node && t < r.nodes && s.parents[t] == node && passes(node, &log_p)) {
            s.score[t] = f_add(s.score[node], log_p);
            s.depth[t] = s.depth[node] + 1;
            set_bit(s.accepted, t);
        }
        __syncthreads();
    }

    // The same for all nodes at once, from what was received: each finds out, with strides that
    // double, whether all nodes above it pass. Returns the end of the best path.
    __device__ int accept_all() {
        const int t = threadIdx.x;
        float log_p = 0.0f;
        int above = 0, depth = 0;
        if (t > 0 && t < r.nodes) {
            above = received_passes(t, s.parents[t], &log_p) ? s.parents[t] : -1;
            depth = 1;
        }
        int half = 0;  // of s.hops
        for (int stride = 1; stride <= p.a.max_depth; stride *= 2, half ^= 1) {
            s.hops[half][t] = make_short2(above, depth);
            __syncthreads();
            if (above > 0) {
                const short2 hop = s.hops[half][above];
                above = hop.x;
                depth += hop.y;
            }
        }
        const bool accepted = t < r.nodes && above == 0 && depth <= p.a.max_depth;
        s.score[t] = log_p;
        return best_end(accepted, depth, false);
    }

    // Greedy, typical: the end of the best path of accepted nodes. `summed`: s.score has the scores
    // of paths, else those of nodes. s.accepted is empty.
    __device__ int best_end(bool accepted, int depth, bool summed) {
        const int t = threadIdx.x;
        constexpr int kBits = 10;  // of a node's index
        static_assert(kMaxTreeNodes < 1 << kBits);
        s.depth[t] = depth;
        const uint32_t place = __reduce_max_sync(
            kAllLanes, accepted ? static_cast<uint32_t>(depth << kBits | (kMaxTreeNodes - t)) : 0u);
        if (lane == 0) atomicMax(&s.deepest, place);  // the root is accepted
        __syncthreads();
        const int deepest = s.deepest >> kBits;
        const bool ends = accepted && depth == deepest;
        if (ends) set_bit(s.accepted, t);
        if (__syncthreads_count(ends) == 1)
            return kMaxTreeNodes - static_cast<int>(s.deepest % (1 << kBits));
        for (int level = 2; level <= deepest && !summed && mode_of_request() == kTypical; ++level) {
            if (accepted && depth == level) s.score[t] = f_add(s.score[s.parents[t]], s.score[t]);
            __syncthreads();
        }
        if (t == 0) {
            int best = next_node(s.accepted, 0);
            for (int node = best; node < r.nodes; node = next_node(s.accepted, node + 1)) {
                if (is_better_end(mode_of_request() == kTypical, s.parents, s.depth, s.score, node,
                                  best))
                    best = node;
            }
            s.picked = best;
        }
        __syncthreads();
        return s.picked;
    }

    // Sampling: the child of a measured node that the draw falls on; -1: none, and then s.kids is
    // what the node's distribution has lost.
    __device__ int sample_child(int node, uint64_t random) {
        const int t = threadIdx.x;
        const Distribution& d = s.dist[node];
        if (t < kNodeWords) s.kids[t] = 0;
        __syncthreads();
        if (d.valid && s.depth[node] < p.a.max_depth && t > node && t < r.nodes &&
            s.parents[t] == node) {
            s.weights[t] = has(s.again, t) ? 0 : kept_weight(d, false, own_logit());
            s.depth[t] = s.depth[node] + 1;
            set_bit(s.kids, t);
        }
        __syncthreads();
        if (t == 0) {
            uint64_t taken;
            s.picked = pick_child(s.kids, s.weights, r.nodes, mul_high(random, d.total), &taken);
        }
        __syncthreads();
        return s.picked;
    }

    // Ahead: the i-th node of the likely path, kMaxTreeNodes if it is shorter.
    __device__ int likely_node(int i) const {
        int node = 0;
#pragma unroll 1
        for (; i > 0 && node < kMaxTreeNodes; --i) node = likely_child(node);
        return node;
    }
    __device__ int likely_child(int node) const {
        const uint64_t most = s.mail[node];
        return most ? 0xFFFFFFFFu - static_cast<uint32_t>(most) : kMaxTreeNodes;
    }
    // Ahead, the last group: the node to which the others' draws lead, its depth included. Whether
    // the path ends there: then s.dist has what comes after it.
    __device__ bool follow(int* node) {
        const int t = threadIdx.x, others = gridDim.y - 1;
        if (rank() == 0 && t < others && likely_node(t) < kMaxTreeNodes) {
            const uint32_t draw = static_cast<uint32_t>(take(mail(likely_node(t)), false));
            for (int i = 0; i < blocks(); ++i) *Cluster::of(&s.draws[t], i) = draw;
        }
        sync();
        bool ends = false, likely = true;
        *node = 0;
#pragma unroll 1
        for (int i = 0; i < others && likely && !ends; ++i) {
            const uint32_t draw = s.draws[i];
            ends = !(draw & kIsChild);
            if (ends) {
                if (t == 0) {
                    s.dist[*node].valid = false;
                    s.dist[*node].argmax = draw & ~kSent;
                }
            } else {
                const int child = draw & (kIsChild - 1);
                likely = child == likely_child(*node);
                *node = child;
                if (t == 0) s.depth[child] = i + 1;
            }
        }
        __syncthreads();
        return ends;
    }
    // Writes the path to `end`, cut after its first end token and to max_tokens, as cut_path()
    // does; depth -1: nothing. Returns whether the request ends with it.
    __device__ bool write_path(int end, int depth) {
        const int t = threadIdx.x, columns = p.a.max_depth + 1;
        int node = end;  // thread i's: the path's i-th
#pragma unroll 1
        for (int i = depth; i > t; --i) node = s.parents[node];
        int length = max(min(depth + 1, r.max_tokens), 0);
        // Not `length == r.max_tokens`: for sm_90 ptxas 13.0 makes that a by-product of the line
        // above (VIMNMX.RELU with a predicate), and it came out true for shorter paths, too.
        bool finished = depth + 1 >= r.max_tokens || depth < 0;
        if (p.a.num_eos > 0) {
            if (t < length && is_eos(p.a, s.tokens[node]))
                atomicMin(&s.first_eos, static_cast<uint32_t>(t));
            __syncthreads();
            if (s.first_eos != 0xFFFFFFFFu) {
                length = static_cast<int>(s.first_eos) + 1;
                finished = true;
            }
        }
        if (rank() > 0) return finished;
        if (t < columns) {
            p.a.path[int64_t(b()) * columns + t] = t < length ? node : -1;
            p.a.out_tokens[int64_t(b()) * columns + t] = t < length ? s.tokens[node] : -1;
        }
        if (t == max(length - 1, 0)) {
            p.a.accept_length[b()] = length - 1;
            p.a.last_node[b()] = length > 0 ? node : -1;
            p.a.finished[b()] = finished;
        }
        return finished;
    }
    __device__ void write_next(int64_t next) const {
        if (rank() == 0 && threadIdx.x == 0) p.a.next_token[b()] = next;
    }

    // One request's arrival at the generator: all read the same offset, and the last one advances
    // it.
    __device__ uint64_t take_offset() const {
        using word = unsigned long long;
        word* generator = reinterpret_cast<word*>(p.a.generator);
        const word old = atomicAdd(generator + 1, word(1) << kOffsetBits);
        const word offset = old & kOffsetMask;
        if (old >> kOffsetBits == static_cast<word>(p.a.batch - 1))
            atomicExch(generator + 1, (offset + 1) & kOffsetMask);
        return offset;
    }

    __device__ void run() {
        const Request request = load_request(p.a, b());
        const bool shares = gridDim.y > 1 && !p.ahead && request.nodes > 0;
        const bool ahead =
            !kGreedyOnly && p.ahead && request.mode == kSampling && request.nodes > 0;
        if (!shares && !ahead && !is_last()) return;  // the whole cluster does
        if (kGreedyOnly && shares && blocks() == 1 && !is_last())
            return send_all_greatest(request.nodes);
        if (threadIdx.x == 0) s.request = request;
        if (blocks() > 1) Cluster::start(s.came);
        enum { kShare, kFollow, kWalk, kLast } stage = kWalk;
        if (shares || (ahead && !is_last())) {
            stage = kShare;
        } else if (ahead) {
            stage = kFollow;
        }
        int node = shares ? blockIdx.y : 0;
        load_tree(request, ahead && blockIdx.y > 0 ? kMaxTreeNodes : node);
        if (blocks() > 1) {
            Cluster::started();
        }
        if (ahead) {
            __syncthreads();
            node = likely_node(blockIdx.y);
        }
        if (stage == kWalk) {
            if (p.a.generator && gridDim.y == 1) take_seed();
            if (threadIdx.x == 0) s.accepted[0] = 1;
            __syncthreads();
        }
        if (stage != kShare) write_next(-1);  // where the request ends
        while (node < r.nodes || stage == kFollow) {
            int mode = mode_of_request();
            bool needed = true;
            if (stage == kShare) {
                if (!p.a.has_seed && !has(s.inner, node))
                    mode = kGreedy;  // no child to accept, no token to draw
                if (mode == kSampling && threadIdx.x == 0) {
                    int depth = 0;
#pragma unroll 1
                    for (int n = node; n > 0; n = s.parents[n]) ++depth;
                    s.depth[node] = depth;
                }
            } else if (stage == kLast) {
                if (!(mode == kTypical && p.a.has_seed)) mode = kGreedy;
            } else if (mode != kSampling) {
                needed = has(s.inner, node) && s.depth[node] < p.a.max_depth;
            }
            if (needed && node < r.nodes && !has(s.measured, node)) {
                measure(node, mode, p.a.has_seed);
                if (threadIdx.x == 0) set_bit(s.measured, node);
                __syncthreads();
            }
            if (stage == kFollow) {
                stage = kWalk;
                if (!follow(&node)) continue;
            } else if (mode_of_request() == kSampling) {
                const int child = pick(node);
                if (child >= 0 && stage == kShare) {
                    send(node, kIsChild | child);
                    node = next_of_group(node);
                } else if (child >= 0) {
                    node = child;
                }
                if (child >= 0) continue;
            } else if (stage == kShare) {
                if (mode_of_request() == kTypical) send_children(node);
            } else if (stage == kWalk) {
                if (needed) accept_children(node);
                node = next_node(s.accepted, node + 1);
                if (node < r.nodes) continue;
                const int t = threadIdx.x;
                const bool accepted = t < r.nodes && has(s.accepted, t);
                __syncthreads();
                if (t < kNodeWords) s.accepted[t] = 0;
                node = best_end(accepted, s.depth[t], true);
            }
            if (stage == kWalk) {
                if (write_path(node, s.depth[node])) break;
                if (mode_of_request() != kSampling) {
                    stage = kLast;
                    continue;
                }
            }
            const Distribution& d = s.dist[node];
            int next = d.argmax;
            if (d.valid && (mode_of_request() == kSampling ||
                            (mode_of_request() == kTypical && p.a.has_seed))) {
                draw_token(node, d, mode_of_request() == kTypical, mode_of_request() == kSampling,
                           philox(s.seed, s.offset, b(), node).next);
                sync();
                next = static_cast<int>(s.next);
            }
            if (stage != kShare) {
                write_next(next);
                break;
            }
            if (mode_of_request() == kGreedy) {
                send_greatest(node, d.has_max ? argmax_key(d.max, d.argmax) : 0);
            } else {
                send(node, next);
            }
            node = next_of_group(node);
        }
        if (!shares && r.nodes > 0) {
            if (blocks() > 1) sync();  // a block's shared memory must outlive the others' accesses
        } else if (rank() == 0 && is_last()) {
            finish(shares);
        }
        if (gridDim.y > 1 && is_last()) advance();
    }
    __device__ static bool is_last() { return blockIdx.y + 1 == gridDim.y; }
    __device__ int next_of_group(int node) const {
        return p.ahead ? kMaxTreeNodes : node + gridDim.y;
    }

    // Where all nodes are measured at once, or none: the path, and what comes after it.
    __device__ void finish(bool shares) {
        int end = 0, depth = -1;
        if (shares) {
            receive();
            if (mode_of_request() == kSampling) {
#pragma unroll 1
                for (depth = 0; s.mail[end] & kIsChild; ++depth)
                    end = static_cast<uint32_t>(s.mail[end]) & (kIsChild - 1);
            } else {
                end = accept_all();
                depth = s.depth[end];
            }
        }
        const bool finished = write_path(end, depth);
        write_next(finished ? -1 : received_next(end));
    }

    // The generator, of which every group of the request has read the offset by itself.
    __device__ void advance() const {
        if (rank() > 0 || threadIdx.x > 0 || !p.a.generator) return;
        if (p.a.batch > 1) {
            take_offset();
        } else {
            p.a.generator[1] = (s.offset + 1) & kOffsetMask;
        }
    }

    // Sampling: the child that the node's draw falls on, -1 if on none.
    __device__ int pick(int node) {
        const int child = sample_child(node, philox(s.seed, s.offset, b(), node).child);
        __syncthreads();  // s.picked has been read
        return child;
    }

    // s.offset, in all blocks.
    __device__ void take_seed() {
        if (rank() == 0 && threadIdx.x == 0) {
            const uint64_t offset = take_offset();
            for (int i = 0; i < blocks(); ++i) *Cluster::of(&s.offset, i) = offset;
        }
        sync();
    }
};

}  // namespace medusa_kernels::gpu
