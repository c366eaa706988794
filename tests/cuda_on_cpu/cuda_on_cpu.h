// Runs a CUDA kernel's source on the CPU, thread by thread: each thread is a fiber, which runs
// until it waits for others (in a warp's operation, at a block's or a cluster's barrier), and the
// next to run is drawn at random. A thread that reads what another has not written yet, a barrier
// that not all reach, an access to the shared memory of a block that has not begun or is over: each
// shows as a wrong result or ends the program. Not seen are races within an operation, the memory
// model and the speed.
//
// Blocks run side by side where they are started together: those of a cluster, or any of a grid.
// Only what csrc/*_kernel.h use is here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "acceptance.h"

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define MK_CLUSTERS 1

struct short2 {
    short x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct dim3 {
    int x, y, z;
};

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;

[[noreturn]] inline void fail(const char* what) {
    std::printf("cuda_on_cpu: %s\n", what);
    std::exit(2);
}

// A meeting of n threads: its generation goes up when the last of them comes.
struct Barrier {
    int expected = 0, came = 0;
    long generation = 0;
    int sum = 0, last_sum = 0;  // of what they bring, until the last comes; of the meeting before

    void arrive(int value = 0) {
        sum += value;
        if (++came < expected) return;
        came = 0;
        last_sum = sum;
        sum = 0;
        ++generation;
    }
};

struct Copy {
    uint4* to;
    const uint4* from;
};

struct Thread {
    int block, index;
    bool begun = false, done = false;
    Barrier* waits_for = nullptr;  // until its generation is no longer `seen`
    long seen = 0, cluster_seen = 0;
    int looks = 0;             // at words that others send
    std::vector<Copy> copies;  // asynchronous ones, until they are waited for
    ucontext_t start;
    jmp_buf state;
    std::vector<char> stack;
};

// The grid, and the blocks of it that run now: their numbers, counted along x, then y, then z.
inline dim3 grid{}, block_dim{};
inline std::vector<int> numbers;
inline std::vector<Thread> threads;
inline Thread* current = nullptr;
inline jmp_buf scheduler;
inline std::vector<Barrier> warps, blocks;
inline Barrier cluster;
inline std::vector<int> running;  // threads of each block that have begun and not ended; -1: none
inline std::vector<uint64_t> lanes;
inline std::vector<char> shared;  // of all blocks
inline size_t shared_size = 0;    // of each
inline std::mt19937 random(1);

inline void yield() {
    if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}
inline void wait(Barrier& barrier, long generation) {
    current->waits_for = &barrier;
    current->seen = generation;
    if (barrier.generation == generation) yield();
    current->waits_for = nullptr;
}
inline int meet(Barrier& barrier, int value = 0) {
    const long generation = barrier.generation;
    barrier.arrive(value);
    wait(barrier, generation);
    return barrier.last_sum;  // nobody comes to the next meeting's end before this one has left
}

inline dim3 block_index() {
    const int i = numbers[current->block];
    return {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
}
inline int block_threads() { return block_dim.x; }
inline Barrier& own_block() { return blocks[current->block]; }

// f of the values of the 32 lanes, in each of them. The values of two meetings in a row lie apart:
// who comes to the one after them knows that the first's have been read.
template <typename F>
uint64_t over_warp(uint64_t value, F&& f) {
    const int warp = (current->block * block_threads() + current->index) / 32;
    uint64_t* values = &lanes[(warp * 2 + warps[warp].generation % 2) * 32];
    values[current->index % 32] = value;
    meet(warps[warp]);
    return f(values);
}

// The same place in another block's shared memory.
template <typename T>
T* of_block(T* place, int block) {
    if (running[block] <= 0) fail("access to a block that has not begun or is over");
    const size_t offset = reinterpret_cast<char*>(place) - shared.data();
    return reinterpret_cast<T*>(shared.data() + block * shared_size + offset % shared_size);
}

inline void scramble_shared(int block) {
    for (size_t i = 0; i < shared_size; ++i) shared[block * shared_size + i] = random();
}

inline void (*body)(char* shared) = nullptr;

inline void run_thread() {
    body(shared.data() + current->block * shared_size);
    current->done = true;
    yield();
}

// Runs a thread until it waits or ends. In a function of its own: setjmp may spoil a caller's
// variables.
[[gnu::noinline]] inline void resume(Thread& t) {
    current = &t;
    if (_setjmp(scheduler)) return;
    if (t.begun) _longjmp(t.state, 1);
    t.begun = true;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.data();
    t.start.uc_stack.ss_size = t.stack.size();
    t.start.uc_link = nullptr;
    makecontext(&t.start, run_thread, 0);
    setcontext(&t.start);
}

// Runs kernel(shared memory) in all threads of some of the grid's blocks, which are a cluster to
// it.
inline void run_blocks(void (*kernel)(char*), std::vector<int> which, int num_threads,
                       size_t bytes) {
    body = kernel;
    numbers = std::move(which);
    const int num_blocks = static_cast<int>(numbers.size());
    block_dim = {num_threads, 1, 1};
    shared_size = (bytes + 63) / 64 * 64;
    shared.resize(num_blocks * shared_size);
    const int count = num_blocks * num_threads;
    const auto barriers = [](std::vector<Barrier>& all, int number, int expected) {
        all.assign(number, {});
        for (Barrier& barrier : all) barrier.expected = expected;
    };
    barriers(warps, count / 32, 32);
    barriers(blocks, num_blocks, num_threads);
    cluster = {};
    cluster.expected = count;
    running.assign(num_blocks, -1);
    lanes.assign(2 * count, 0);
    if (static_cast<int>(threads.size()) < count) threads.resize(count);
    std::vector<int> ready(count);  // threads that have not ended
    for (int i = 0; i < count; ++i) {
        Thread& t = threads[i];
        t.block = i / num_threads;
        t.index = i % num_threads;
        t.begun = t.done = false;
        t.waits_for = nullptr;
        t.looks = 0;
        t.copies.clear();
        t.stack.resize(kStack);
        ready[i] = i;
    }
    for (int left = count; left > 0;) {
        std::shuffle(ready.begin(), ready.end(), random);
        bool stuck = true;
        for (const int i : ready) {
            Thread& t = threads[i];
            if (t.waits_for && t.waits_for->generation == t.seen) continue;
            stuck = false;
            if (running[t.block] == -1) {
                if (random() % num_threads) continue;  // the block comes later
                running[t.block] = num_threads;
                scramble_shared(t.block);
            }
            resume(t);
            if (t.done) {
                --left;
                --running[t.block];
            }
        }
        if (stuck && left > 0) fail("threads wait for ever");
        std::erase_if(ready, [](int i) { return threads[i].done; });
    }
}

inline std::vector<int> shuffled(int count) {
    std::vector<int> all(count);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    return all;
}

// Runs a grid without clusters: its blocks in random order, so many at a time.
inline void run_grid(void (*kernel)(char*), dim3 blocks, int at_a_time, int num_threads,
                     size_t bytes) {
    grid = blocks;
    const std::vector<int> order = shuffled(grid.x * grid.y * grid.z);
    for (auto next = order.begin(); next != order.end();) {
        const auto end = next + std::min<long>(at_a_time, order.end() - next);
        run_blocks(kernel, {next, end}, num_threads, bytes);
        next = end;
    }
}

}  // namespace cuda_on_cpu

#define threadIdx (dim3{cuda_on_cpu::current->index, 0, 0})
#define blockIdx (cuda_on_cpu::block_index())
#define gridDim (cuda_on_cpu::grid)

using std::max;
using std::min;

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::own_block()); }
inline int __syncthreads_count(bool value) {
    return cuda_on_cpu::meet(cuda_on_cpu::own_block(), value);
}
inline bool __syncthreads_or(bool value) { return __syncthreads_count(value) > 0; }

inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
    return cuda_on_cpu::over_warp(x,
                                  [](uint64_t* all) { return *std::max_element(all, all + 32); });
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t x) {
    return cuda_on_cpu::over_warp(x,
                                  [](uint64_t* all) { return *std::min_element(all, all + 32); });
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t x) {
    return cuda_on_cpu::over_warp(x, [](uint64_t* all) {
        uint64_t sum = 0;
        for (int i = 0; i < 32; ++i) sum += all[i];
        return sum & 0xFFFFFFFF;
    });
}
inline unsigned long long __shfl_sync(unsigned, unsigned long long x, int lane) {
    return cuda_on_cpu::over_warp(x, [=](uint64_t* all) { return all[lane]; });
}
inline unsigned long long __shfl_up_sync(unsigned, unsigned long long x, int by) {
    const int lane = cuda_on_cpu::current->index % 32;
    return cuda_on_cpu::over_warp(
        x, [=](uint64_t* all) { return all[lane >= by ? lane - by : lane]; });
}

template <typename T>
T atomicOr(T* p, T x) {
    return std::exchange(*p, *p | x);
}
template <typename T>
T atomicMax(T* p, T x) {
    return std::exchange(*p, std::max(*p, x));
}
template <typename T>
T atomicMin(T* p, T x) {
    return std::exchange(*p, std::min(*p, x));
}
template <typename T>
T atomicAdd(T* p, T x) {
    return std::exchange(*p, *p + x);
}
template <typename T>
T atomicExch(T* p, T x) {
    return std::exchange(*p, x);
}
template <typename T>
T __ldg(const T* p) {
    return *p;
}
template <typename T>
T __ldcg(const T* p) {
    return *p;
}

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline short2 make_short2(int x, int y) { return {static_cast<short>(x), static_cast<short>(y)}; }
inline uint32_t __float_as_uint(float x) { return medusa_kernels::float_bits(x); }
inline float __uint_as_float(uint32_t x) { return medusa_kernels::bits_float(x); }
inline unsigned long long __float2ull_rn(float x) {
    return static_cast<unsigned long long>(std::nearbyint(x));
}
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline float __half2float(__half x) {
    return medusa_kernels::to_float(medusa_kernels::fp16_t{x.bits});
}

namespace cooperative_groups {
struct Cluster {
    int block_rank() const { return cuda_on_cpu::current->block; }
    int num_blocks() const { return static_cast<int>(cuda_on_cpu::blocks.size()); }
    void sync() const { cuda_on_cpu::meet(cuda_on_cpu::cluster); }
    template <typename T>
    T* map_shared_rank(T* place, int rank) const {
        return cuda_on_cpu::of_block(place, rank);
    }
};
inline Cluster this_cluster() { return {}; }
}  // namespace cooperative_groups

namespace medusa_kernels::gpu {

// arrivals.h
constexpr uint32_t kArrivals = 64;
inline bool arrive(uint32_t* counter, uint32_t blocks) {
    const bool last = *counter == blocks - 1;
    *counter = last ? 0 : *counter + 1;
    return last;
}

// early_launch.h
inline void wait_for_kernels_before() {}

namespace ptx {

inline void cluster_arrive() {
    cuda_on_cpu::current->cluster_seen = cuda_on_cpu::cluster.generation;
    cuda_on_cpu::cluster.arrive();
}
inline void cluster_wait() {
    cuda_on_cpu::wait(cuda_on_cpu::cluster, cuda_on_cpu::current->cluster_seen);
}
struct mbarrier_t {
    int32_t bytes;            // that are still to come
    int16_t expects, parity;  // whether expect() is, too; of the phase
    void settle() {
        if (expects || bytes) return;
        expects = 1;
        parity ^= 1;
    }
};
inline void init(mbarrier_t* barrier) { *barrier = {0, 1, 0}; }
inline void expect(mbarrier_t* barrier, uint32_t bytes) {
    barrier->expects = 0;
    barrier->bytes += bytes;
    barrier->settle();
}
inline void wait(mbarrier_t* barrier, uint32_t parity) {
    for (int looks = 0; barrier->parity == static_cast<int>(parity); cuda_on_cpu::yield()) {
        if (++looks > 10000) cuda_on_cpu::fail("a thread waits for ever");
    }
}
inline void put(uint64_t* to, uint64_t word, mbarrier_t* barrier, int rank) {
    *cuda_on_cpu::of_block(to, rank) = word;
    mbarrier_t* there = cuda_on_cpu::of_block(barrier, rank);
    there->bytes -= sizeof word;
    there->settle();
}
// Copied as late as can be.
inline void copy(uint4* to, const uint4* from) {
    cuda_on_cpu::current->copies.push_back({to, from});
}
inline void wait_for_copies() {
    for (const auto& [to, from] : cuda_on_cpu::current->copies) *to = *from;
    cuda_on_cpu::current->copies.clear();
}
inline bool any_active(bool mine) { return mine; }
template <typename T>
void send(T* to, T word) {
    *to = word;
}
inline uint64_t look(const uint64_t* at) {
    if (++cuda_on_cpu::current->looks > 10000) cuda_on_cpu::fail("a thread looks for ever");
    const uint64_t word = *at;
    cuda_on_cpu::yield();
    return word;
}

template <typename scalar_t>
uint32_t max_or_nan(uint32_t a, uint32_t b) {
    if constexpr (sizeof(scalar_t) == 4) {
        const float x = __uint_as_float(a), y = __uint_as_float(b);
        return x != x || y != y ? 0x7FFFFFFF : x > y ? a : b;
    } else {
        using host_t = std::conditional_t<std::is_same_v<scalar_t, __half>, fp16_t, bf16_t>;
        uint32_t both = 0;
        for (int half = 0; half < 32; half += 16) {
            const host_t u{static_cast<uint16_t>(a >> half)}, v{static_cast<uint16_t>(b >> half)};
            const float x = medusa_kernels::to_float(u), y = medusa_kernels::to_float(v);
            both |= uint32_t(x != x || y != y ? 0x7FFF : x > y ? u.bits : v.bits) << half;
        }
        return both;
    }
}

}  // namespace ptx
}  // namespace medusa_kernels::gpu
