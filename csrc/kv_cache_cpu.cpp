// compact_kv_cache on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kv_cache_args.h"

namespace medusa_kernels {
namespace {

using torch::stable::Tensor;

void compact(const CompactArgs& args) {
    for (size_t l = 0; l < args.layouts.size(); ++l) {
        const KvLayout& layout = args.layouts[l];
        const int64_t tasks = int64_t(args.first_caches[l + 1] - args.first_caches[l]) * args.batch;
        // Waking a thread pays from about this many bytes.
        const int64_t grain = 1 + (int64_t(1) << 18) / (int64_t(args.path_size) * layout.columns() *
                                                        layout.vector_bytes);
        torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                char* cache = args.caches[args.first_caches[l] + task / args.batch];
                const int b = static_cast<int>(task % args.batch);
                compact_serially(args, layout, cache, b);
            }
        });
    }
    for (int b = 0; b < args.batch; ++b) {
        const int kept = kept_nodes(args.accept_length[b], args.path_size);
        args.cache_seqlens[b] = new_length(args.slots, args.cache_seqlens[b], kept);
    }
}

void compact_kv_cache(std::vector<Tensor> kv, int64_t lead_dims, Tensor path, Tensor accept_length,
                      Tensor cache_seqlens, std::optional<Tensor> block_table) {
    compact(compact_args(kv, lead_dims, path, accept_length, cache_seqlens, block_table));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CPU, m) {
    m.impl("compact_kv_cache", TORCH_BOX(&compact_kv_cache));
    m.impl("compact_kv_cache_plan", TORCH_BOX(&compact_kv_cache_plan));
}

}  // namespace medusa_kernels

MK_MAKES_CALLS_AGAIN medusa_kernels_compact_kv_cache(const void* plan, const uint64_t* addresses,
                                                     void*) {
    using namespace medusa_kernels;
    return error_of([&] { compact(planned_args(static_cast<const char*>(plan), addresses)); });
}
