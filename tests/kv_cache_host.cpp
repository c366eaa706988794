// csrc/kv_cache.h fed with garbage, under AddressSanitizer and UndefinedBehaviorSanitizer: every
// move stays inside the tensor, and moving in place, entry after entry, gives what gathering first
// would.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kv_cache.h"

using namespace medusa_kernels;

#define CHECK(condition)                                        \
    do {                                                        \
        if (!(condition)) {                                     \
            std::printf("line %d: %s\n", __LINE__, #condition); \
            std::exit(1);                                       \
        }                                                       \
    } while (0)

int main() {
    std::mt19937 rng(1);
    const auto pick = [&](int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(rng);
    };
    const int wild[] = {INT32_MIN, INT32_MIN + 1, -2,       -1, 0, 1, 2, 511,
                        512,       INT32_MAX - 1, INT32_MAX};
    const auto garbage = [&](int low, int high) {
        return pick(0, 3) ? pick(low, high) : wild[pick(0, 10)];
    };
    int moved = 0;
    for (int round = 0; round < 20000; ++round) {
        const int batch = pick(1, 3), block_size = pick(1, 4), max_blocks = pick(1, 5);
        const bool paged = pick(0, 1);
        const int num_first = paged ? batch * max_blocks : batch;
        const int num_second = paged ? block_size : pick(1, 20);
        std::vector<int32_t> table(batch * max_blocks);
        for (size_t i = 0; i < table.size(); ++i)
            table[i] = pick(0, 7) ? static_cast<int>(i) : garbage(-1, num_first);
        const KvSlots slots{num_first, num_second, paged ? table.data() : nullptr, max_blocks,
                            max_blocks};
        KvLayout layout{};  // rows of 2 x 3 runs of one byte, a gap after each run
        layout.outer_size[0] = 2, layout.outer_size[1] = 3;
        layout.outer_stride[0] = 2, layout.outer_stride[1] = 4;
        layout.run = layout.vector_bytes = 1;
        layout.stride_second = 12, layout.stride_first = 12 * num_second;
        std::vector<char> cache(12 * num_first * num_second);
        for (char& byte : cache) byte = static_cast<char>(pick(0, 255));
        const std::vector<char> before = cache;
        const int request = pick(0, batch - 1), length = garbage(0, 12);
        std::vector<int32_t> path(pick(1, 8));
        for (size_t i = 0; i < path.size(); ++i) path[i] = garbage(static_cast<int>(i), 10);
        const int kept = kept_nodes(garbage(-1, 8), static_cast<int>(path.size()));
        CHECK(kept >= 0 && kept <= static_cast<int>(path.size()));
        bool distinct = true;  // garbage can name a block twice: then only the bounds are defined
        for (size_t i = 0; i < table.size(); ++i) {
            for (size_t j = 0; j < i; ++j) distinct &= table[i] != table[j];
        }
        for (int i = 0; i < kept; ++i) {
            const Move move = plan_move(slots, layout, request, length, i, path[i]);
            if (move.from < 0) continue;
            ++moved;
            for (int column = 0; column < layout.columns(); ++column) {
                const int64_t at = layout.column_offset(column);
                cache.at(move.to + at) = cache.at(move.from + at);
                CHECK(!distinct || cache.at(move.to + at) == before.at(move.from + at));
            }
        }
        const int after = new_length(slots, length, kept);
        CHECK(length < 0 || length > slots.capacity()
                  ? after == length
                  : after >= length && after <= slots.capacity());
    }
    CHECK(moved > 1000);
    std::printf("%d moves\n", moved);
}
