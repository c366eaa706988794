// finish_step on the GPU: its kernel, a block a request. For nvcc; or for a C++ compiler, where
// tests/cuda_on_cpu/cuda_on_cpu.h has CUDA's names.
#pragma once

#include "finish_step.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "early_launch.h"
#else
#include "cuda_on_cpu.h"
#endif

namespace medusa_kernels::gpu {

constexpr int kThreads = 128;

template <typename Vector>
__device__ void copy_row(const FinishArgs& a, int b) {
    const auto* from = reinterpret_cast<const Vector*>(a.hidden + b * a.hidden_stride_b +
                                                       a.last_node[b] * a.hidden_stride_t);
    auto* to = reinterpret_cast<Vector*>(a.last_hidden + b * a.last_hidden_stride_b);
    for (int64_t i = threadIdx.x; i < a.row_bytes / int64_t(sizeof(Vector)); i += kThreads)
        to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads)
    finish_step_kernel(const __grid_constant__ FinishArgs a, bool wide) {
    wait_for_kernels_before();
    const int b = blockIdx.x;
    const Finish finish(a, b);
    for (int column = threadIdx.x; column <= a.columns; column += kThreads)
        a.report[int64_t(b) * (a.columns + 1) + column] = finish.report(a, b, column);
    if (a.hidden && finish.goes_on) {
        if (wide) {
            copy_row<uint4>(a, b);
        } else {
            copy_row<uint8_t>(a, b);
        }
    }
    __syncthreads();  // every thread has read what is written now
    if (threadIdx.x == 0) finish.commit(a, b);
}

// Whether rows of hidden can be copied 16 bytes at a time.
inline bool has_wide_rows(const FinishArgs& a) {
    const uint64_t bits = reinterpret_cast<uintptr_t>(a.hidden) |
                          reinterpret_cast<uintptr_t>(a.last_hidden) | a.row_bytes |
                          a.hidden_stride_b | a.hidden_stride_t | a.last_hidden_stride_b;
    return bits % 16 == 0;
}

}  // namespace medusa_kernels::gpu
