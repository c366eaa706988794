// Which counters in device memory a launch may count the arrivals of its blocks in.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <cstdint>

#include "checks.h"

namespace medusa_kernels {

// Of each half: one for eager launches, one for captured ones.
constexpr uint32_t kArrivals = 1 << 17;

// Counts this block as arrived; whether it is the last of `blocks`, after which the counter is 0
// again. What the block read before comes before what the last one writes after (release and
// acquire).
__device__ inline bool arrive(uint32_t* counter, uint32_t blocks) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(blocks - 1)
                 : "memory");
    return before == blocks - 1;
}

// Counters, or other words of device memory, that no launch in flight uses: they are handed out in
// turn, and far fewer kernels than there are turns can be resident at once. A captured launch keeps
// its words for every replay, so those come from a half of their own.
class ArrivalTurns {
 public:
    explicit ArrivalTurns(uint32_t words = kArrivals) : words_(words) {}  // of each half

    // The first of `count` words.
    int32_t claim(int32_t count, cudaStream_t stream) {
        MK_CHECK_VALUE(static_cast<uint32_t>(count) <= words_, "batch: expected at most ", words_,
                       " requests, got ", count);
        cudaStreamCaptureStatus status;
        STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
        const int half = status == cudaStreamCaptureStatusNone ? 0 : 1;
        uint32_t start;
        do {
            start = next_[half].fetch_add(count) % words_;
        } while (start + count > words_);
        return static_cast<int32_t>(half * words_ + start);
    }

 private:
    const uint32_t words_;
    std::atomic<uint32_t> next_[2] = {};
};

}  // namespace medusa_kernels
