// The CUDA kernel of compact_kv_cache, run thread by thread on the CPU, against the serial C++
// code: random caches, contiguous and paged, with paths, lengths and block tables right and wrong.
#include "kv_cache_kernel.h"

// After torch's headers.
#include "cuda_on_cpu.h"

using namespace medusa_kernels;

namespace {

std::mt19937 rng(1);
int pick(int low, int high) { return low + static_cast<int>(rng() % (high - low + 1)); }
bool chance(int percent) { return pick(1, 100) <= percent; }
int garbage() {
    constexpr int kWild[] = {INT32_MIN, -2, -1, 511, 512, INT32_MAX - 1, INT32_MAX};
    return kWild[pick(0, 6)];
}

// What the cases were, so that none of it goes missing unseen.
int num_cases = 0, num_moves = 0, num_paged = 0, num_long = 0, num_tiled = 0, num_split = 0;
int num_vectors[17] = {};  // caches moved by vectors of so many bytes

// Tensors of one shape, each in a buffer of its own, with bytes around it.
struct Kind {
    std::vector<int64_t> sizes, strides;  // [first, second, ...], in elements
    int64_t element, bytes, skew;         // bytes: of a buffer; skew: where in it the tensor starts
    KvLayout layout;
};

// Its dimensions lie in memory in any order, with gaps between them or not.
Kind make_kind(const KvSlots& slots, int row_elements) {
    Kind kind{{slots.num_first, slots.num_second}, {}, int64_t(1) << pick(0, 3), 0, 0, {}};
    const int row_dims = pick(0, 2);
    if (row_dims > 1) kind.sizes.push_back(pick(1, 4));
    if (row_dims > 0) kind.sizes.push_back(pick(1, row_elements));
    const size_t dim = kind.sizes.size();
    std::vector<size_t> inner_first(dim);
    for (size_t d = 0; d < dim; ++d) inner_first[d] = dim - 1 - d;
    if (chance(40)) std::shuffle(inner_first.begin(), inner_first.end(), rng);
    const int64_t multiple = 1 << pick(0, 4);  // of elements
    int64_t step = chance(85) ? 1 : 2;
    kind.strides.resize(dim);
    for (const size_t d : inner_first) {
        kind.strides[d] = step;
        step = (step * kind.sizes[d] + multiple - 1) / multiple * multiple;
        if (chance(20)) step += multiple;
    }
    kind.skew = 64 + (chance(60) ? 0 : pick(0, 15) / kind.element * kind.element);
    kind.bytes = step * kind.element + 160;
    kind.layout = row_layout(0, reinterpret_cast<char*>(kind.skew), kind.element, kind.sizes.data(),
                             kind.strides.data(), static_cast<int64_t>(dim));
    return kind;
}

struct Cache {
    const Kind* kind;
    std::vector<char> bytes;
};

constexpr int kMaxCaches = 32;
gpu::CompactParams<kMaxCaches> params;
void kernel(char* shared) {
    gpu::compact(params, reinterpret_cast<Move*>(shared), [](auto...) {});
}

void launch(const CompactArgs& args, int begin, int end, int first_arrival) {
    const int64_t tiles = gpu::set_params(params, args, begin, end);
    params.first_arrival = first_arrival;
    cuda_on_cpu::run_grid(kernel, {static_cast<int>(tiles), args.batch, 1}, pick(1, 10),
                          gpu::kThreads + 32, kMaxNodes * sizeof(Move));
}

// As in csrc/kv_cache_cpu.cpp.
void compact_serially(const CompactArgs& args) {
    for (size_t l = 0; l < args.layouts.size(); ++l) {
        const KvLayout& layout = args.layouts[l];
        for (int c = args.first_caches[l]; c < args.first_caches[l + 1]; ++c) {
            for (int b = 0; b < args.batch; ++b) {
                num_moves += compact_serially(args, layout, args.caches[c], b);
            }
        }
    }
    for (int b = 0; b < args.batch; ++b) {
        const int kept = kept_nodes(args.accept_length[b], args.path_size);
        args.cache_seqlens[b] = new_length(args.slots, args.cache_seqlens[b], kept);
    }
}

// The bytes of a buffer that compaction may change, from the tensor's sizes and strides alone: the
// slots of each request from its length on, one for each entry of the path.
std::vector<bool> may_change(const Kind& kind, const CompactArgs& args) {
    std::vector<bool> result(kind.bytes, false);
    const auto size = [&](size_t d) { return d < kind.sizes.size() ? kind.sizes[d] : 1; };
    const auto stride = [&](size_t d) { return d < kind.strides.size() ? kind.strides[d] : 0; };
    for (int b = 0; b < args.batch; ++b) {
        for (int64_t i = 0; i < std::min<int64_t>(args.path_size, args.accept_length[b] + 1LL);
             ++i) {
            int64_t first = b, second = int64_t(args.cache_seqlens[b]) + i;
            if (second < 0 || second >= args.slots.capacity()) continue;
            if (args.slots.block_table) {
                first = args.slots.block_table[b * args.slots.block_table_stride +
                                               second / args.slots.num_second];
                second %= args.slots.num_second;
                if (first < 0 || first >= args.slots.num_first) continue;
            }
            for (int64_t j = 0; j < size(2); ++j) {
                for (int64_t k = 0; k < size(3); ++k) {
                    const int64_t at =
                        first * stride(0) + second * stride(1) + j * stride(2) + k * stride(3);
                    std::fill_n(result.begin() + kind.skew + at * kind.element, kind.element, true);
                }
            }
        }
    }
    return result;
}

void run_case() {
    CompactArgs args{};
    const bool long_path = chance(15), paged = chance(50);
    args.batch = pick(1, 3);
    args.path_size = long_path ? pick(130, 300) : pick(1, 20);
    const int most_slots = long_path ? 700 : 40;  // a request

    std::vector<int32_t> table;
    if (paged) {
        args.slots.num_second = pick(1, 6);
        args.slots.max_blocks = pick(1, most_slots / args.slots.num_second);
        args.slots.block_table_stride = args.slots.max_blocks + pick(0, 2);
        table.resize(args.batch * args.slots.block_table_stride);
        args.slots.num_first = static_cast<int32_t>(table.size());
        std::iota(table.begin(), table.end(), 0);
        std::shuffle(table.begin(), table.end(), rng);
        for (int32_t& block : table) {
            if (chance(3)) block = chance(50) ? args.slots.num_first : garbage();
        }
        for (int32_t& block : table) {  // no block twice
            if (&block > table.data() && block < args.slots.num_first &&
                std::find(table.data(), &block, block) != &block)
                block = -1;
        }
        args.slots.block_table = table.data();
    } else {
        args.slots.num_first = args.batch;
        args.slots.num_second = pick(1, most_slots);
    }

    const int capacity = static_cast<int>(args.slots.capacity());
    args.path_stride = args.path_size + pick(0, 3);
    std::vector<int32_t> path(args.batch * args.path_stride, 1), accept_length(args.batch),
        lengths(args.batch);
    for (int b = 0; b < args.batch; ++b) {
        const int accepted = pick(-1, args.path_size - 1);  // -1: a padded request
        int32_t* row = &path[b * args.path_stride];
        for (int i = 0, node = 0; i < args.path_size; ++i, node += chance(50) ? 1 : pick(1, 3))
            row[i] = i <= accepted || chance(30) ? node : -1;
        if (chance(15)) row[pick(0, args.path_size - 1)] = chance(50) ? garbage() : pick(0, 20);
        accept_length[b] = chance(10) ? garbage() : accepted;
        lengths[b] = chance(10) ? garbage()
                     : chance(20)
                         ? pick(0, capacity)
                         : pick(0, std::max(0, capacity - args.path_size * (chance(50) ? 2 : 1)));
    }
    args.path = path.data();
    args.accept_length = accept_length.data();

    // Small rows where there are many slots.
    const int num_kinds = chance(10) ? gpu::kMaxLayouts : pick(1, 3);
    std::vector<Kind> kinds;
    for (int i = 0; i < num_kinds; ++i)
        kinds.push_back(make_kind(args.slots, long_path ? 8 : chance(30) ? 700 : 40));
    std::vector<Cache> caches;
    for (const Kind& kind : kinds) {
        args.layouts.push_back(kind.layout);
        args.first_caches.push_back(static_cast<int32_t>(caches.size()));
        for (int n = pick(1, num_kinds > 3 ? 2 : 4); n > 0; --n) {
            caches.push_back({&kind, std::vector<char>(kind.bytes)});
            for (char& byte : caches.back().bytes) byte = static_cast<char>(rng());
            num_vectors[kind.layout.vector_bytes] += 1;
            num_tiled += kind.layout.columns() > gpu::kThreads;
        }
    }
    const int count = static_cast<int>(caches.size());
    args.first_caches.push_back(count);

    const std::vector<Cache> before = caches;
    std::vector<Cache> expected = caches;
    std::vector<int32_t> expected_lengths = lengths;
    const auto use = [&](std::vector<Cache>& all, std::vector<int32_t>& seqlens) {
        args.caches.clear();
        for (Cache& cache : all) args.caches.push_back(cache.bytes.data() + cache.kind->skew);
        args.cache_seqlens = seqlens.data();
    };
    use(expected, expected_lengths);
    std::vector<std::vector<bool>> free_bytes;
    for (const Kind& kind : kinds) free_bytes.push_back(may_change(kind, args));
    compact_serially(args);

    // In one launch, or in two, of which the last writes the lengths.
    use(caches, lengths);
    const int cut = chance(30) ? pick(0, count - 1) : 0;
    if (cut > 0) launch(args, 0, cut, -1);
    launch(args, cut, count, pick(0, 9));

    bool same = lengths == expected_lengths, outside = false;
    for (const uint32_t arrived : gpu::compact_arrivals) same &= arrived == 0;
    for (int c = 0; c < count; ++c) {
        same &= caches[c].bytes == expected[c].bytes;
        const std::vector<bool>& free = free_bytes[caches[c].kind - kinds.data()];
        for (size_t i = 0; i < free.size(); ++i)
            outside |= !free[i] && caches[c].bytes[i] != before[c].bytes[i];
    }
    if (!same || outside) {
        std::printf("case %d %s: %s, batch %d, path of %d, %d caches of %d layouts, cut at %d\n",
                    num_cases, outside ? "writes outside of the tree's slots" : "differs",
                    paged ? "paged" : "contiguous", args.batch, args.path_size, count, num_kinds,
                    cut);
        std::exit(1);
    }
    ++num_cases;
    num_paged += paged;
    num_long += long_path;
    num_split += cut > 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
    for (int round = 0; round < rounds; ++round) run_case();
    std::printf(
        "%d cases: %d moves, %d paged, %d long paths, %d split; caches: %d of several tiles, "
        "%d, %d, %d, %d, %d by 1, 2, 4, 8, 16 bytes\n",
        num_cases, num_moves, num_paged, num_long, num_split, num_tiled, num_vectors[1],
        num_vectors[2], num_vectors[4], num_vectors[8], num_vectors[16]);
    bool covered = num_moves > num_cases && num_paged * 4 > num_cases && num_long * 20 > num_cases;
    covered &= num_split * 20 > num_cases && num_tiled * 20 > num_cases;
    for (const int bytes : {1, 2, 4, 8, 16}) covered &= num_vectors[bytes] * 20 > num_cases;
    return covered ? 0 : 3;
}
