// Tree attention for Hopper: FlashAttention-3's structure (arXiv 2407.08608) with a tree's mask on
// the last keys, and the splits of a long cache merged in the same launch: in a cluster's shared
// memory where they are few enough, else in the GPU's.
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
// the probabilities of tile j - 1 with V and, of two warpgroups, which take turns to begin these,
// on the scores of tile j + 1. The maximum that a row's exponents refer to moves only when it falls
// behind by more than 2^8 (FlashAttention-4), so the accumulator is rescaled a few times in all;
// the result is the same, as its denominator has the same reference.
//
// Where there are more row blocks than multiprocessors, blocks stay and draw the next one from a
// counter: its tiles are on their way, its Q loaded under the last softmax of the one before, and
// its first scores taken while the results of that one are written.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "arrivals.h"
#include "early_launch.h"
#include "plans.h"
#include "tree_attention_sm90_args.h"
#include "tree_attention_sm90_cluster.h"
#include "tree_attention_sm90_consumer.h"
#include "tree_attention_sm90_merge.h"
#include "tree_attention_sm90_producer.h"
#include "tree_attention_sm90_ptx.h"
#include "tree_attention_sm90_work.h"

namespace medusa_kernels {
namespace {

using namespace sm90;

// Tiles of a block up to which it begins while the kernel before ends: worth 0.7 us. Longer ones
// lose 2%.
constexpr int kEarlyTiles = 20;

// Those of the rings and of `Next`, by a thread of each warp: one warp takes one after another,
// were it a thread for each.
template <typename C>
__device__ __forceinline__ void init_barriers(uint32_t barriers, int stages) {
    constexpr int kReaders = C::kComputing / C::kStep * 4;  // warps
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp < 4) {  // as `barrier_of` has them
        const int arrivals = warp < 2               ? C::kFullArrivals
                             : C::kFp8 && warp == 3 ? kGroupThreads
                                                    : kReaders;
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            barrier_init(barriers + (warp * kMostStages + i) * 8, arrivals);
        }
    } else if (warp == 4) {
        barrier_init(barriers + C::kNext, 1);
        barrier_init(barriers + C::kNext + 8, C::kThreads - kGroupThreads);
    } else if (warp == 5) {
        if (C::kCluster) barrier_init(barriers + C::kArrived, 1);
        for (int i = 0; i < C::kConverted; ++i) {
            barrier_init(barriers + C::kConvertedBarriers + i * 8, 4);  // warps
            barrier_init(barriers + C::kConvertedBarriers + (C::kConverted + i) * 8, kReaders);
        }
    }
    fence_barrier_init();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    tree_attention_kernel(const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map,
                          const __grid_constant__ AttentionParams p) {
    extern __shared__ uint8_t dynamic_shared[];
    // What does not depend on the kernels before is done while they end.
    uint32_t barriers = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
    pin(barriers);
    touch_parameters<sizeof(p)>(&p);
    init_barriers<C>(barriers, p.stages.value);
    if (threadIdx.x == 6 * 32) {  // of a warp that has no barriers to begin with
        prefetch_map(k_map);
        prefetch_map(v_map);
    }
    const uint32_t next = barriers + C::kNext, tiles = barriers + C::kTiles;
    Work w;
    w.set_rows<C>(p, blockIdx.x);
    if (threadIdx.x == 7 * 32) w.prefetch_lengths(p);
    __syncthreads();
    if constexpr (C::kCluster) cluster_arrive();

    const int group = threadIdx.x / kGroupThreads;
    if (group >= C::kComputing) {
        const int thread = threadIdx.x % kGroupThreads;
        if (C::kFp8 && group > C::kComputing) {
            Converter<C> converter{p,        w,
                                   tiles,    barriers + C::kConvertedTiles,
                                   barriers, barriers + C::kConvertedBarriers,
                                   thread,   {p, next}};
            converter.begin();
            wait_for_kernels_before();
            converter.w.load_lengths(p);
            shrink_registers<C::kProducerRegisters>();
            converter.run();
        } else {
            Producer<C> producer{p, w, tiles, barriers, thread, {p, next}};
            producer.begin();
            wait_for_kernels_before();
            producer.w.load_lengths(p);
            producer.load_pages();
            shrink_registers<C::kProducerRegisters>();
            producer.run(k_map, v_map);
        }
        if constexpr (C::kCluster) {
            __syncwarp();
            cluster_wait();  // as all that arrive must
        } else if (p.num_splits.value > 1) {
            arrive_threads<kBlockBarrier, C::kThreads>();
        }
    } else {
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
        consumer.find_q(w);
        wait_for_kernels_before();
        consumer.w.load_lengths(p);
        grow_registers<C::kConsumerRegisters>();
        if constexpr (C::kCluster) {
            const uint32_t parts = tiles + p.stages.value * 2 * C::kTileBytes;
            ClusterMerge<C> merge{
                p,   consumer, consumer.w, barriers + C::kArrived, parts, int(threadIdx.x) / 32,
                lane};
            consumer.run([&] { merge.begin(); });
            merge.run();
            return;
        }
        const Work& done = consumer.w;
        const int64_t rows =  // before this row block's
            int64_t(blockIdx.x) * p.num_splits.value * C::kRows;
        float4* const partial = p.partial + rows * (C::kDim / 4);
        float2* const stats = p.stats + rows;
        Merge<C> merge{p, done, partial, stats, tiles, int(threadIdx.x) / 32, lane};
        constexpr bool kEarly = C::kSmall;  // elsewhere registers are scarce
        consumer.run([&] {
            if (kEarly && p.num_splits.value > 1) merge.begin();
        });
        if (p.num_splits.value > 1) {
            const bool merges = done.merges(p);
            constexpr int kConsumers = C::kComputing * kGroupThreads;
            if (merges && consumer.row(0) / 16 * 16 < num_rows<C>(p, done)) {  // this warp has rows
                consumer.publish(partial + done.split * C::kRows * (C::kDim / 4),
                                 stats + done.split * C::kRows);
            }
            sync_threads<kBlockBarrier, C::kThreads>();
            if (!merges) return;
            bool waits = false;
            uint32_t* counter = split_arrivals + p.first_arrival + blockIdx.x;
            if (threadIdx.x == 0) waits = !arrive(counter, done.splits(p).value);
            if (!kEarly) merge.begin();
            while (waits && load_acquire(counter) != 0) {  // the last to arrive leaves a 0
            }
            sync_threads<kComputeBarrier, kConsumers>();
            merge.run();
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
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.num_splits));
    if (stay) {
        config.gridDim = dim3(static_cast<unsigned>(plan.resident));
        p.items = static_cast<int32_t>(blocks);
        p.first_arrival = arrival_turns.claim(1, stream);
    }
    config.blockDim = dim3(C::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    MK_CHECK_VALUE(plan.num_splits <= kMostSplits, "num_splits: expected up to ", kMostSplits,
                   ", got ", plan.num_splits);
    std::optional<WorkMemory> work;
    if constexpr (C::kCluster) {
        MK_CHECK_VALUE(plan.num_splits <= kMostCluster, "num_splits: expected up to ", kMostCluster,
                       " in a cluster, got ", plan.num_splits);
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {1, static_cast<unsigned>(plan.num_splits), 1};
    } else if (plan.num_splits > 1) {
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
    AttentionParams p = attention_params(plan, addresses);
    const auto with = [&](auto type, auto dim, auto groups, auto fp8) {
        constexpr int kGroups = decltype(groups)::value;
        constexpr bool kFp8 = decltype(fp8)::value;
        CUtensorMap maps[2] = {};
        for (int v = 0; v < 2; ++v) maps[v] = tensor_map(plan, v, p);
        const auto with_cluster = [&](auto cluster) {
            using C = Config<decltype(type), decltype(dim)::value, kGroups, kFp8,
                             decltype(cluster)::value>;
            launch<C>(plan, p, maps[0], maps[1], stream);
        };
        if constexpr (kGroups == 1 && !kFp8) {
            if (plan.cluster) return with_cluster(std::true_type());
        }
        with_cluster(std::false_type());
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

// The only way to call it: once a layer and step, a dispatcher would cost as much as the kernel.
MK_MAKES_CALLS_AGAIN medusa_kernels_tree_attention_sm90(const void* plan, const uint64_t* addresses,
                                                        void* stream) {
    using namespace medusa_kernels;
    return error_of([&] {
        const auto& p = *static_cast<const AttentionPlan*>(plan);
        on_device(static_cast<int>(p.device),
                  [&] { launch(p, addresses, static_cast<cudaStream_t>(stream)); });
    });
}
