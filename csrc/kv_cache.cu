// compact_kv_cache on the GPU: every tensor of every layer in one launch.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "arrivals.h"
#include "early_launch.h"
#include "kv_cache_args.h"
#include "kv_cache_kernel.h"

namespace medusa_kernels {
namespace {

using namespace gpu;
using torch::stable::Tensor;

template <int kMaxCaches>
__global__ void __launch_bounds__(kThreads + 32)
    compact_kernel(const __grid_constant__ CompactParams<kMaxCaches> p) {
    __shared__ alignas(16) Move moves[kMaxNodes];
    // Its parameters are there then.
    compact(p, moves, [](auto... pointers) {
        touch((static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointers)) ^ ...));
        wait_for_kernels_before();
    });
}

ArrivalTurns arrival_turns;

// Launches for caches begin .. end - 1 of args, and lengths if they are the last.
template <int kMaxCaches>
void launch(const CompactArgs& args, int begin, int end, cudaStream_t stream) {
    CompactParams<kMaxCaches> p;
    const int64_t tiles = set_params(p, args, begin, end);
    MK_CHECK_VALUE(tiles <= std::numeric_limits<int32_t>::max(), "kv: too large for one launch");
    p.first_arrival =
        end == static_cast<int>(args.caches.size()) ? arrival_turns.claim(args.batch, stream) : -1;
    launch_early(compact_kernel<kMaxCaches>, dim3(static_cast<uint32_t>(tiles), args.batch),
                 dim3(kThreads + 32), stream, p);
}

void launch(const CompactArgs& args, cudaStream_t stream) {
    // One launch up to 1024 tensors of 8 layouts; parameters are copied with each launch, so a
    // smaller set where it does.
    const int count = static_cast<int>(args.caches.size());
    for (int begin = 0; begin < count;) {
        const int layout = static_cast<int>(
            std::upper_bound(args.first_caches.begin(), args.first_caches.end(), begin) -
            args.first_caches.begin() - 1);
        const int last_layout =
            std::min<int>(layout + kMaxLayouts, static_cast<int>(args.layouts.size()));
        const int end = std::min(begin + 1024, args.first_caches[last_layout]);
        if (end - begin <= 128) {
            launch<128>(args, begin, end, stream);
        } else {
            launch<1024>(args, begin, end, stream);
        }
        begin = end;
    }
}

void compact_kv_cache(std::vector<Tensor> kv, int64_t lead_dims, Tensor path, Tensor accept_length,
                      Tensor cache_seqlens, std::optional<Tensor> block_table) {
    const CompactArgs args =
        compact_args(kv, lead_dims, path, accept_length, cache_seqlens, block_table);
    if (args.batch == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(args.device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(args.device, &stream));
    launch(args, static_cast<cudaStream_t>(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CUDA, m) {
    m.impl("compact_kv_cache", TORCH_BOX(&compact_kv_cache));
    m.impl("compact_kv_cache_plan", TORCH_BOX(&compact_kv_cache_plan));
}

}  // namespace medusa_kernels

MK_MAKES_CALLS_AGAIN medusa_kernels_compact_kv_cache(const void* plan, const uint64_t* addresses,
                                                     void* stream) {
    using namespace medusa_kernels;
    return error_of([&] {
        const CompactArgs args = planned_args(static_cast<const char*>(plan), addresses);
        if (args.batch == 0) return;
        on_device(args.device, [&] { launch(args, static_cast<cudaStream_t>(stream)); });
    });
}
