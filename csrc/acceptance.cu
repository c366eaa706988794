// accept_candidates on the GPU: how its kernel is launched.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "acceptance_args.h"
#include "acceptance_kernel.h"
#include "arrivals.h"

namespace medusa_kernels {
namespace {

using namespace gpu;

template <typename scalar_t, bool kKeeps>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    accept_kernel(const __grid_constant__ AcceptParams p) {
    __shared__ Shared shared;
    extern __shared__ uint4 row[];
    Accept<scalar_t, kKeeps>(p, shared, row).run();
}

ArrivalTurns arrival_turns;

struct Plan {
    int cluster, groups;
    int row_bytes;  // of shared memory, for a block's part of a row; 0: it is not kept
    int device, most_row_bytes;
};

Plan plan(const AcceptArgs& a, int itemsize, int device) {
    int major = 0, sms = 0, shared = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const int slots = sms * kBlocksPerSM, vector = 16 / itemsize;
    const int vectors = (a.vocab + vector - 1) / vector + 1;  // of a row that is not aligned
    const int most = std::min<int>(kThreads * kResident * 16, shared - sizeof(Shared));
    const auto row_bytes = [&](int cluster) {
        const int each = (vectors + cluster * kWarps - 1) / (cluster * kWarps);  // as in span()
        return each <= most / (kWarps * 16) ? each * kWarps * 16 : 0;
    };
    // Small clusters start sooner and exchange faster; greedy acceptance reads a row once, so it
    // need not be kept.
    int cluster = 1;
    if (a.mode.values || a.mode.value != kGreedy || vectors > 2 * kThreads * kResident) {
        while (major >= 9 && cluster < kPortableCluster && row_bytes(cluster) == 0) cluster *= 2;
    }
    // Measuring all nodes at once pays while it takes a round or two; a walk takes one a level,
    // each by as many blocks as have a vector for every thread.
    const int groups = std::min(slots / (cluster * a.batch), a.size);
    if (groups > 1 && 2 * groups >= a.size)
        return {cluster, groups, row_bytes(cluster), device, most};
    int widest = 1;
    if (major >= 9) {
        while (widest < kMaxCluster && widest * kThreads < vectors && 2 * widest * a.batch <= slots)
            widest *= 2;
    }
    return {widest, 1, row_bytes(widest), device, most};
}

template <typename scalar_t, bool kKeeps>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    const auto kernel = accept_kernel<scalar_t, kKeeps>;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(x.cluster, x.groups, params.a.batch);
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = x.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = x.cluster > 1 ? 1 : 0;
    config.dynamicSmemBytes = x.row_bytes;
    const void* function = reinterpret_cast<const void*>(kernel);
    static std::atomic<uint64_t> ready{0};  // a bit for each device
    const uint64_t bit = uint64_t(1) << (x.device % 64);
    if (!(ready.load(std::memory_order_relaxed) & bit)) {
        STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            x.most_row_bytes));
        ready.fetch_or(bit, std::memory_order_relaxed);
    }
    if (x.cluster > kPortableCluster) {
        STD_CUDA_CHECK(
            cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

template <typename scalar_t>
void launch(const AcceptParams& params, const Plan& x, cudaStream_t stream) {
    if (x.row_bytes > 0) {
        launch<scalar_t, true>(params, x, stream);
    } else {
        launch<scalar_t, false>(params, x, stream);
    }
}

Outputs accept_candidates(Tensor logits, Tensor tokens, Tensor parents,
                          std::optional<Tensor> num_nodes, int64_t max_depth,
                          std::vector<double> numbers, std::optional<std::vector<Tensor>> values,
                          std::optional<Tensor> max_tokens_values, int64_t max_tokens,
                          std::optional<Tensor> eos_values, std::vector<int64_t> eos,
                          std::optional<Tensor> generator, std::optional<int64_t> seed,
                          bool share_storage) {
    AcceptParams params{};
    params.a = accept_args(logits, tokens, parents, num_nodes, max_depth, numbers, values,
                           max_tokens_values, max_tokens, eos_values, eos, generator, seed);
    const Outputs outputs = accept_outputs(params.a, logits, share_storage);
    if (params.a.batch == 0) return outputs;
    const int device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const ScalarType type = logits.scalar_type();
    const Plan x = plan(params.a, type == ScalarType::Float ? 4 : 2, device);
    std::optional<Tensor> measured;
    if (x.groups > 1) {
        measured = new_tensor(logits, ScalarType::Byte,
                              int64_t(params.a.batch) * params.a.size * sizeof(Distribution));
        params.measured = static_cast<Distribution*>(measured->data_ptr());
        params.first_arrival =
            arrival_turns.claim(params.a.batch, static_cast<cudaStream_t>(stream));
    }
    switch (type) {
        case ScalarType::Half:
            launch<__half>(params, x, static_cast<cudaStream_t>(stream));
            break;
        case ScalarType::BFloat16:
            launch<__nv_bfloat16>(params, x, static_cast<cudaStream_t>(stream));
            break;
        default:
            launch<float>(params, x, static_cast<cudaStream_t>(stream));
    }
    return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medusa_kernels, CUDA, m) {
    m.impl("accept_candidates", TORCH_BOX(&accept_candidates));
}

}  // namespace medusa_kernels
