// Hopper's own instructions under names: the tensor memory accelerator (TMA) and wgmma. PTX ISA 8.0
// or newer, sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "mbarrier.h"

namespace medusa_kernels::sm90 {

// ---- registers, threads ----

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Of four words in each of four lanes, to lane i word i of each.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane) {
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
        const bool high = lane & step;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t& a = x[step == 1 ? 2 * i : i];
            uint32_t& b = x[step == 1 ? 2 * i + 1 : i + 2];
            const uint32_t got = __shfl_xor_sync(~0u, high ? a : b, step);
            a = high ? got : a;
            b = high ? b : got;
        }
    }
}

// A barrier among `kThreads` threads of the block; id 0 is __syncthreads'.
template <int kId, int kThreads>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

__device__ __forceinline__ void sync_threads(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at it, and does not wait.
template <int kId, int kThreads>
__device__ __forceinline__ void arrive_threads() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
__device__ __forceinline__ void arrive_threads(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ uint4 load_shared_4(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
    const uint4 x = load_shared_4(address);
    return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 x) {
    store_shared(address, uint4{__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z),
                                __float_as_uint(x.w)});
}

// Shared memory written by ordinary stores or cp.async before, read by wgmma after.
__device__ __forceinline__ void fence_for_wgmma() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- clusters ----

// By all threads of a block, once its barriers are there; orders nothing but these.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of a block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int block) {
    uint32_t x;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(address), "r"(block));
    return x;
}

// To such a place; a barrier of that block counts the bytes.
__device__ __forceinline__ void store_async(uint32_t to, float4 x, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)),
        "r"(__float_as_uint(x.w)), "r"(barrier)
        : "memory");
}

// ---- copies from global to shared memory ----

// What `createpolicy.fractional.L2::evict_first` with a fraction of 1 gives.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of a 4-D tensor; `barrier` counts its bytes. The L2 may drop it first: of the cache nothing
// is read again but by the other row blocks of a KV head, which run at the same time.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int dim, int slot,
                                         int head, int block, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(&map), "r"(dim), "r"(slot), "r"(head), "r"(block), "r"(barrier), "l"(kEvictFirst)
        : "memory");
}

// 16 bytes, or zeros unless `ok`; `from` must be an address all the same.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, bool ok) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(ok ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- wgmma: D[64, N] (+)= A[64, 16] B[16, N], A in registers and B in shared memory ----
//
// The thread of lane l in warp w holds of D the rows 16 w + l / 4 (and 8 below), of each 8 columns
// the two from 2 (l % 4) on: d[4 i + {0, 1}] and, 8 rows below, d[4 i + {2, 3}]. Of A: a[0] columns
// 2 (l % 4) and the next, a[1] the same 8 rows below, a[2] and a[3] the same 8 columns to the
// right. So 16 columns of D, converted, are an A.

// The lower half of a descriptor: where a matrix lies, in rows of 128 bytes, 8 of them swizzled as
// an atom of 1024 bytes: 16-byte unit i of row r is at i ^ r. `far` is the step to the next 64
// columns where the matrix is read transposed. A step of 16 bytes is one of 1.
__device__ __forceinline__ uint32_t matrix_place(uint32_t address, uint32_t far) {
    return (address >> 4 & 0x3fff) | far >> 4 << 16;
}

// The upper half: 1024 bytes to the next atom, swizzle of 128 bytes.
#define MK_MATRIX_LAYOUT "0x40000040"

// clang-format off
#define MK_F8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), \
                    "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define MK_F32(x, i) MK_F8(x, i), MK_F8(x, i + 8), MK_F8(x, i + 16), MK_F8(x, i + 24)
#define MK_F64(x) MK_F32(x, 0), MK_F32(x, 32)
#define MK_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MK_REGISTERS_64 MK_REGISTERS_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_WGMMA_64(type)                                                                      \
    asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %37, 0;\n"                \
                 "mov.b64 b, {%36, " MK_MATRIX_LAYOUT "};\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                   \
                 " {" MK_REGISTERS_32 "}, {%32, %33, %34, %35}, b, add, 1, 1, %38;\n}"         \
                 : MK_F32(d, 0)                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(place), "r"(int(adds)),     \
                   "n"(int(kTransposed)))
#define MK_WGMMA_128(type)                                                                     \
    asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %69, 0;\n"                \
                 "mov.b64 b, {%68, " MK_MATRIX_LAYOUT "};\n"                                   \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                  \
                 " {" MK_REGISTERS_64 "}, {%64, %65, %66, %67}, b, add, 1, 1, %70;\n}"         \
                 : MK_F64(d)                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(place), "r"(int(adds)),     \
                   "n"(int(kTransposed)))
// clang-format on

// place: B's. kTransposed: B's rows lie in shared memory as rows, not as columns. adds: to D, else
// sets it.
template <typename T, bool kTransposed>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint32_t place,
                                      bool adds) {
    if constexpr (std::is_same_v<T, __half>) {
        MK_WGMMA_64("f16");
    } else {
        MK_WGMMA_64("bf16");
    }
}

template <typename T, bool kTransposed>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint32_t place,
                                      bool adds) {
    if constexpr (std::is_same_v<T, __half>) {
        MK_WGMMA_128("f16");
    } else {
        MK_WGMMA_128("bf16");
    }
}

// D[64, 64] (+)= A[64, 32] B[32, 64], of e4m3. Of A: a[0] columns 4 (l % 4) and the next three,
// a[1] the same 8 rows below, a[2] and a[3] the same 16 columns to the right. kRowBytes: of B's
// columns, 128 as above, or 64, of which 8 swizzled are an atom of 512 bytes: 16-byte unit i of row
// r is at i ^ r / 2.
template <int kRowBytes>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[32], const uint32_t (&a)[4], uint32_t place,
                                           bool adds) {
    constexpr uint32_t kLayout = kRowBytes == 128 ? 0x40000040 : 0x80000020;
    asm volatile(
        "{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %37, 0;\n"
        "mov.b64 b, {%36, %38};\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"
        " {" MK_REGISTERS_32 "}, {%32, %33, %34, %35}, b, add, 1, 1;\n}"
        : MK_F32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(place), "r"(int(adds)), "n"(kLayout));
}

// Keeps what computes these registers above, and what uses them below.
__device__ __forceinline__ void pin(float (&x)[32]) { asm volatile("" : MK_F32(x, 0)::"memory"); }

__device__ __forceinline__ void pin(float (&x)[64]) { asm volatile("" : MK_F64(x)::"memory"); }

__device__ __forceinline__ void pin(int32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

template <typename T>
__device__ __forceinline__ void pin(T*& x) {
    asm volatile("" : "+l"(x)::"memory");
}

__device__ __forceinline__ void pin(int64_t& x) { asm volatile("" : "+l"(x)::"memory"); }

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&x)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
    }
}

// Before the first wgmma of those that follow: registers are as the instructions above left them.
__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The wgmmas since the last commit are a group.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the newest `kPending` groups are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#undef MK_F8
#undef MK_F32
#undef MK_F64
#undef MK_REGISTERS_32
#undef MK_REGISTERS_64
#undef MK_WGMMA_64
#undef MK_WGMMA_128
#undef MK_MATRIX_LAYOUT

// ---- arithmetic ----

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers of type T in a register, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t x;
    if constexpr (std::is_same_v<T, __half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    }
    return x;
}

// The two numbers of a register, the lower half's first.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half22float2(*reinterpret_cast<const __half2*>(&x));
    } else {
        return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
    }
}

// Four numbers of e4m3, the first in the lowest byte, rounded to nearest, at most 448 in size.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
    uint32_t x;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}"
        : "=r"(x)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return x;
}

// The same four as two pairs of fp16.
__device__ __forceinline__ uint2 unpack_e4m3(uint32_t x) {
    uint2 y;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}"
        : "=r"(y.x), "=r"(y.y)
        : "r"(x));
    return y;
}

}  // namespace medusa_kernels::sm90
