// Hopper's own instructions under names, as accept_candidates takes them: clusters, their barriers,
// words put into another block's shared memory. For a C++ compiler tests/cuda_on_cpu/cuda_on_cpu.h
// has CUDA's names and those of namespace ptx.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mbarrier.h"
#define MK_CLUSTERS (__CUDA_ARCH__ >= 900)

namespace medusa_kernels::gpu::ptx {

// Orders no access: a release is a fence of the whole GPU.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// In shared memory: counts the bytes of words that blocks of the cluster put beside it. Who waits
// for them sees the words, for which a cluster's barrier would take a fence of the whole GPU.
using mbarrier_t = uint64_t;

// To be followed by cluster_arrive().
__device__ __forceinline__ void init(mbarrier_t* barrier) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
        : "memory");
}
// Once a phase, by one thread.
__device__ __forceinline__ void expect(mbarrier_t* barrier, uint32_t bytes) {
    barrier_expect(shared_address(barrier), bytes);
}
__device__ __forceinline__ void wait(mbarrier_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// To the same place in a block of the cluster.
__device__ __forceinline__ void put(uint64_t* to, uint64_t word, mbarrier_t* barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .u32 to, barrier;\n"
        "mapa.shared::cluster.u32 to, %0, %3;\n"
        "mapa.shared::cluster.u32 barrier, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [to], %1, [barrier];\n"
        "}" ::"r"(shared_address(to)),
        "l"(word), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
}

// 16 bytes to shared memory, without waiting for them.
__device__ __forceinline__ void copy(uint4* to, const uint4* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// A word that a block writes while another waits for it: neither orders any other access.
template <typename T>
__device__ __forceinline__ void send(T* to, T word) {
    if constexpr (sizeof(T) == 8) {
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
    } else {
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
    }
}
__device__ __forceinline__ uint64_t look(const uint64_t* at) {
    uint64_t word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
    return word;
}

// Whether it is so for any of the lanes that run together now.
__device__ __forceinline__ bool any_active(bool mine) { return __any_sync(__activemask(), mine); }

// The greater of two, or of two pairs of 16-bit ones; NaN if there is one.
template <typename scalar_t>
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b) {
    uint32_t x;
    if constexpr (sizeof(scalar_t) == 4) {
        asm("max.NaN.f32 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    } else if constexpr (std::is_same_v<scalar_t, __half>) {
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    } else {
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    }
    return x;
}

}  // namespace medusa_kernels::gpu::ptx

#else
#include "cuda_on_cpu.h"
#endif
