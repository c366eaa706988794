// Programmatic dependent launch: from compute capability 9.0 on, a kernel's blocks begin, and wait,
// while the kernel before it in the stream ends.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <utility>

namespace medusa_kernels {

// First of all that such a kernel does with memory but for its parameters', by all of its threads:
// until the kernels before have ended and what they wrote is there. From then on the next one may
// begin to wait.
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Of a launch, on a device of compute capability 9.0 or newer.
inline cudaLaunchAttribute early_launch() {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

// Keeps what computes `word` above. (ptxas leaves out what only an empty asm uses.)
__device__ __forceinline__ void touch(uint32_t word) {
    if (__any_sync(0xFFFFFFFFu, word == 0x5EEDF00D)) __nanosleep(0);
}

// Parameters come from memory, a miss for each 64 bytes, and a warp takes one after another: each
// warp loads others first. To be called before wait_for_kernels_before(), while the kernel before
// ends.
template <int kBytes>
__device__ __forceinline__ void touch_parameters(const void* parameters) {
    const int line = min(static_cast<int>(threadIdx.x / 32), (kBytes - 1) / 64);
    touch(static_cast<const uint32_t*>(parameters)[line * 16]);
}

// A kernel's launch, early where the device, the current one, can.
template <typename... Params, typename... Args>
void launch_early(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                  Args&&... args) {
    int device, major;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    cudaLaunchAttribute attribute = early_launch();
    config.attrs = &attribute;
    config.numAttrs = major >= 9 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

}  // namespace medusa_kernels
