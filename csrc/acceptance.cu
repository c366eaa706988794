// accept_candidates on the GPU: how its kernel is launched.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>

#include "acceptance_args.h"
#include "acceptance_kernel.h"
#include "arrivals.h"
#include "early_launch.h"

namespace medusa_kernels {
namespace {

using namespace gpu;

template <typename scalar_t, bool kKeeps, bool kGreedyOnly>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    accept_kernel(const __grid_constant__ AcceptParams p) {
    __shared__ Shared shared;
    extern __shared__ uint4 row[];
    touch_parameters<offsetof(AcceptParams, a.eos_value)>(&p);  // then come end tokens, if any
    wait_for_kernels_before();
    Accept<scalar_t, kKeeps, kGreedyOnly>(p, shared, row).run();
}

ArrivalTurns mail_turns{kMail};

struct Plan {
    int width;       // blocks that share a row
    bool clustered;  // which are a cluster then
    int groups;      // such blocks a request
    int each;        // 16-byte vectors of a row that a warp has
    int row_bytes;   // of shared memory, for a block's part of a row; 0: it is not kept
    int device, most_row_bytes;
    bool ahead = false;  // the groups measure a likely path's nodes, not all
};

struct Limits {
    int major, sms, shared;
};

// Looked up once a device.
const Limits& limits(int device) {
    static std::array<Limits, 64> known;
    static std::array<std::once_flag, 64> once;
    MK_CHECK_VALUE(device < 64, "logits: expected one of the first 64 devices, got ", device);
    std::call_once(once[device], [device] {
        const auto get = [device](cudaDeviceAttr attribute) {
            int value = 0;
            STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
            return value;
        };
        known[device] = {get(cudaDevAttrComputeCapabilityMajor),
                         get(cudaDevAttrMultiProcessorCount),
                         get(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    });
    return known[device];
}

bool is_greedy(const AcceptArgs& a) { return !a.mode.values && a.mode.value == kGreedy; }

Plan plan(const AcceptArgs& a, int itemsize, int device) {
    const auto& [major, sms, shared] = limits(device);
    const int slots = sms * kBlocksPerSM, vector = 16 / itemsize;
    const int vectors = (a.vocab + vector - 1) / vector + 1;  // of a row that is not aligned
    const int most = std::min<int>(kThreads * kResident * 16, shared - sizeof(Shared));
    const auto each = [&](int width) { return (vectors + width * kWarps - 1) / (width * kWarps); };
    const auto row_bytes = [&](int width) {
        return each(width) <= most / (kWarps * 16) ? each(width) * kWarps * 16 : 0;
    };
    // Measuring all nodes at once pays while it takes a round or two; a walk takes one a level,
    // each by as many blocks as have a vector for every thread.
    const auto at_once = [&](int groups) {
        return groups > 1 && 2 * groups >= a.size && a.size > 1;
    };
    int width = 1;  // small clusters start sooner and exchange faster
    if (is_greedy(a)) {
        // It reads a row once, so that none need be kept, and its blocks exchange nothing.
        while (vectors > 2 * kThreads * kResident && width < kPortableCluster &&
               row_bytes(width) == 0)
            width *= 2;
        // A group more than there are nodes: it only waits.
        const int groups = std::min(slots / (width * a.batch), a.size + 1);
        while (2 * width * groups * a.batch <= slots && 2 * width * a.size <= kMaxTreeNodes &&
               4 * width * kThreads <= vectors)
            width *= 2;
        if (at_once(groups) && width * a.size <= kMaxTreeNodes)
            return {width, false, groups, each(width), row_bytes(width), device, most};
    } else {
        // Arithmetic bounds: a multiprocessor more for a row pays for a wider cluster.
        while (major >= 9 && width < kPortableCluster &&
               (row_bytes(width) == 0 ||
                (2 * width * a.size * a.batch <= sms && 4 * width * kThreads <= vectors)))
            width *= 2;
        const int groups = std::min(slots / (width * a.batch), width == 1 ? a.size + 1 : a.size);
        if (at_once(groups))
            return {width, width > 1, groups, each(width), row_bytes(width), device, most};
    }
    int widest = 1;
    if (major >= 9) {
        while (widest < kMaxCluster && widest * kThreads < vectors && 2 * widest * a.batch <= slots)
            widest *= 2;
    }
    int groups = 1;
    if (!a.mode.values && a.mode.value == kSampling) {
        // A row takes less than twice as long by half as many blocks.
        const int most_groups = std::min(a.max_depth + 1, kMaxAhead);
        while (widest > 1 && slots / (widest * a.batch) < most_groups &&
               vectors <= widest / 2 * kThreads * kLoads)
            widest /= 2;
        groups = std::clamp(slots / (widest * a.batch), 1, most_groups);
    }
    return {widest, widest > 1, groups, each(widest), row_bytes(widest), device, most, groups > 1};
}

template <typename scalar_t, bool kKeeps, bool kGreedyOnly>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    const auto kernel = accept_kernel<scalar_t, kKeeps, kGreedyOnly>;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(x.width, x.groups, params.a.batch);
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (x.clustered) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {unsigned(x.width), 1, 1};
    }
    if (limits(x.device).major >= 9) attributes[config.numAttrs++] = early_launch();
    config.dynamicSmemBytes = x.row_bytes;
    const void* function = reinterpret_cast<const void*>(kernel);
    static std::atomic<uint64_t> ready{0};  // a bit for each device
    const uint64_t bit = uint64_t(1) << (x.device % 64);
    if (!(ready.load(std::memory_order_relaxed) & bit)) {
        STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            x.most_row_bytes));
        ready.fetch_or(bit, std::memory_order_relaxed);
    }
    if (x.width > kPortableCluster) {
        STD_CUDA_CHECK(
            cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

template <typename scalar_t, bool kKeeps>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    if (is_greedy(params.a)) {
        launch<scalar_t, kKeeps, true>(params, x, stream);
    } else {
        launch<scalar_t, kKeeps, false>(params, x, stream);
    }
}

template <typename scalar_t>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    if (x.row_bytes > 0) {
        launch<scalar_t, true>(params, x, stream);
    } else {
        launch<scalar_t, false>(params, x, stream);
    }
}

struct AcceptPlan {
    AcceptParams params;
    Plan x;
    ScalarType type;
};

AcceptPlan accept_plan(const AcceptArgs& a, const Tensor& logits) {
    AcceptPlan p{};
    p.params.a = a;
    p.type = logits.scalar_type();
    if (a.batch == 0) return p;
    p.x = plan(a, p.type == ScalarType::Float ? 4 : 2, logits.get_device_index());
    p.params.blocks = p.x.clustered ? p.x.width : 1;
    p.params.each = p.x.each;
    p.params.ahead = p.x.ahead;
    return p;
}

void launch(AcceptPlan& p, cudaStream_t stream) {
    AcceptParams& params = p.params;
    if (p.x.groups > 1) {
        const int words = params.a.batch * params.a.size * p.x.width / params.blocks;
        params.first_mail = mail_turns.claim(words, stream);
    }
    switch (p.type) {
        case ScalarType::Half:
            launch<__half>(params, p.x, stream);
            break;
        case ScalarType::BFloat16:
            launch<__nv_bfloat16>(params, p.x, stream);
            break;
        default:
            launch<float>(params, p.x, stream);
    }
}

Outputs accept_candidates(Tensor logits, Tensor tokens, Tensor parents,
                          std::optional<Tensor> num_nodes, int64_t max_depth,
                          std::vector<double> numbers, std::optional<std::vector<Tensor>> values,
                          std::optional<Tensor> max_tokens_values, int64_t max_tokens,
                          std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                          std::optional<Tensor> generator, std::optional<int64_t> seed,
                          bool share_storage) {
    AcceptArgs a = accept_args(logits, tokens, parents, num_nodes, max_depth, numbers, values,
                               max_tokens_values, max_tokens, eos_values, eos, generator, seed);
    const Outputs outputs = accept_outputs(a, logits, share_storage);
    if (a.batch == 0) return outputs;
    AcceptPlan p = accept_plan(a, logits);
    const torch::stable::accelerator::DeviceGuard guard(p.x.device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(p.x.device, &stream));
    launch(p, static_cast<cudaStream_t>(stream));
    return outputs;
}

Tensor accept_candidates_plan(Tensor logits, Tensor tokens, Tensor parents,
                              std::optional<Tensor> num_nodes, int64_t max_depth,
                              std::vector<double> numbers,
                              std::optional<std::vector<Tensor>> values,
                              std::optional<Tensor> max_tokens_values, int64_t max_tokens,
                              std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                              std::optional<Tensor> generator, std::optional<int64_t> seed) {
    const AcceptArgs a =
        accept_args(logits, tokens, parents, num_nodes, max_depth, numbers, values,
                    max_tokens_values, max_tokens, eos_values, eos, generator, seed);
    return plan_tensor(accept_plan(a, logits));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CUDA, m) {
    m.impl("accept_candidates", TORCH_BOX(&accept_candidates));
    m.impl("accept_candidates_plan", TORCH_BOX(&accept_candidates_plan));
}

}  // namespace medusa_kernels

MK_MAKES_CALLS_AGAIN medusa_kernels_accept_candidates(const void* plan, const uint64_t* addresses,
                                                      void* stream) {
    using namespace medusa_kernels;
    return error_of([&] {
        const auto& planned = *static_cast<const AcceptPlan*>(plan);
        if (planned.params.a.batch == 0) return;
        AcceptPlan p = planned;
        set_addresses(p.params.a, Addresses(addresses));
        on_device(p.x.device, [&] { launch(p, static_cast<cudaStream_t>(stream)); });
    });
}
