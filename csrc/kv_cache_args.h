// The checked arguments of compact_kv_cache, for its CPU and its CUDA kernel: every tensor of the
// cache as a pointer and a layout, tensors of one layout together.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "kv_cache.h"
#include "plans.h"

namespace medusa_kernels {

struct CompactHead {
    int32_t batch, path_size;
    const int32_t* path;  // [batch, path_size]
    int64_t path_stride;
    const int32_t* accept_length;  // [batch]
    int32_t* cache_seqlens;        // [batch]
    KvSlots slots;
    int32_t device;
};

// Where a cache lies: in which tensor of a call, from which byte on.
struct CacheSource {
    int64_t tensor, offset;
};

struct CompactArgs : CompactHead {
    std::vector<KvLayout> layouts;
    std::vector<char*> caches;         // sorted by layout
    std::vector<CacheSource> sources;  // of each
    std::vector<int32_t>
        first_caches;  // [layouts.size() + 1]: layout l has caches first_caches[l] .. [l + 1] - 1
};

inline void check_int32(const char* name, const torch::stable::Tensor& x, int64_t dim, bool cuda,
                        int32_t device) {
    MK_CHECK_VALUE(x.scalar_type() == torch::headeronly::ScalarType::Int, name,
                   ": expected torch.int32");
    MK_CHECK_VALUE(x.dim() == dim, name, ": expected ", dim, " dimension(s), got ", x.dim());
    MK_CHECK_VALUE(x.is_cuda() == cuda && x.get_device_index() == device, name,
                   ": expected a tensor on the device of kv");
    MK_CHECK_VALUE(x.size(dim - 1) <= 1 || x.stride(dim - 1) == 1, name,
                   ": the last dimension must be contiguous");
}

// How the rows of a tensor [first, second, ...] lie; sizes and strides (in elements) start at
// `first`.
inline KvLayout row_layout(size_t index, const char* data, int64_t element, const int64_t* sizes,
                           const int64_t* strides, int64_t dim) {
    // Dimensions of a row from the innermost, in bytes; neighbours that are contiguous to each
    // other are one.
    int64_t size[kMaxOuterDims + 1] = {element, 1, 1}, stride[kMaxOuterDims + 1] = {1, 0, 0};
    int used = 1;
    for (int64_t d = dim - 1; d >= 2; --d) {
        if (sizes[d] == 1) continue;
        const int64_t step = strides[d] * element;
        if (step == size[used - 1] * stride[used - 1]) {
            size[used - 1] *= sizes[d];
            continue;
        }
        MK_CHECK_VALUE(step != 0, "kv: tensor ", index, " is expanded (stride 0) along dimension ",
                       d, " of its rows");
        MK_CHECK_VALUE(used <= kMaxOuterDims, "kv: tensor ", index,
                       " has too many strided dimensions in a row, at most ", kMaxOuterDims,
                       " are supported beside the contiguous ones");
        size[used] = sizes[d];
        stride[used++] = step;
    }
    MK_CHECK_VALUE(size[0] * size[1] * size[2] <= std::numeric_limits<int32_t>::max(),
                   "kv: tensor ", index, " has rows of more than 2 GiB");
    const int64_t first = strides[0] * element, second = strides[1] * element;
    // The widest vector that divides every address.
    const uint64_t bits =
        reinterpret_cast<uintptr_t>(data) | first | second | size[0] | stride[1] | stride[2] | 16;
    const int64_t vector_bytes = static_cast<int64_t>(bits & (~bits + 1));
    KvLayout layout{};
    layout.stride_first = first;
    layout.stride_second = second;
    layout.run = static_cast<int32_t>(size[0] / vector_bytes);
    layout.vector_bytes = static_cast<int32_t>(vector_bytes);
    for (int d = 0; d < kMaxOuterDims; ++d) {
        layout.outer_size[d] = static_cast<int32_t>(size[d + 1]);
        layout.outer_stride[d] = stride[d + 1];
    }
    return layout;
}

// As far as a layout depends on it.
inline bool same_alignment(const char* a, const char* b) {
    return ((reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

// The CPU kernel: moves a request's accepted rows in one cache; returns how many.
inline int compact_serially(const CompactArgs& args, const KvLayout& layout, char* cache, int b) {
    const int kept = kept_nodes(args.accept_length[b], args.path_size);
    int moves = 0;
    for (int i = 0; i < kept; ++i) {
        const int node = args.path[b * args.path_stride + i];
        const Move move = plan_move(args.slots, layout, b, args.cache_seqlens[b], i, node);
        if (move.from < 0) continue;
        ++moves;
        for (int32_t column = 0; column < layout.columns(); column += layout.run) {
            const int64_t at = layout.column_offset(column);
            std::memmove(cache + move.to + at, cache + move.from + at,
                         int64_t(layout.run) * layout.vector_bytes);
        }
    }
    return moves;
}

// The same cache twice would be moved by two blocks at once.
inline void check_distinct(std::vector<char*> caches) {
    std::sort(caches.begin(), caches.end());
    MK_CHECK_VALUE(std::adjacent_find(caches.begin(), caches.end()) == caches.end(),
                   "kv: holds the same tensor twice");
}

// kv: tensors [*lead, first, second, ...], where lead_dims leading dimensions count caches of their
// own.
inline CompactArgs compact_args(const std::vector<torch::stable::Tensor>& kv, int64_t lead_dims,
                                const torch::stable::Tensor& path,
                                const torch::stable::Tensor& accept_length,
                                const torch::stable::Tensor& cache_seqlens,
                                const std::optional<torch::stable::Tensor>& block_table) {
    MK_CHECK_VALUE(!kv.empty(), "kv: expected at least one tensor, got an empty list");
    const bool cuda = kv[0].is_cuda();
    const int32_t device = kv[0].get_device_index();
    check_int32("path", path, 2, cuda, device);
    check_int32("accept_length", accept_length, 1, cuda, device);
    check_int32("cache_seqlens", cache_seqlens, 1, cuda, device);
    const int64_t batch = path.size(0), path_size = path.size(1);
    MK_CHECK_VALUE(batch <= 65535, "path: at most 65535 requests, got ", batch);
    MK_CHECK_VALUE(path_size >= 1 && path_size <= kMaxNodes, "path: expected 1..", kMaxNodes,
                   " nodes, got ", path_size);
    MK_CHECK_VALUE(accept_length.size(0) == batch, "accept_length: expected shape [", batch,
                   "], got [", accept_length.size(0), "]");
    MK_CHECK_VALUE(cache_seqlens.size(0) == batch, "cache_seqlens: expected shape [", batch,
                   "], got [", cache_seqlens.size(0), "]");

    CompactArgs args{};
    args.device = device;
    args.batch = static_cast<int32_t>(batch);
    args.path_size = static_cast<int32_t>(path_size);
    args.path = static_cast<const int32_t*>(path.data_ptr());
    args.path_stride = path.stride(0);
    args.accept_length = static_cast<const int32_t*>(accept_length.data_ptr());
    args.cache_seqlens = static_cast<int32_t*>(cache_seqlens.data_ptr());
    if (block_table) {
        check_int32("block_table", *block_table, 2, cuda, device);
        MK_CHECK_VALUE(block_table->size(0) == batch && block_table->size(1) >= 1,
                       "block_table: expected shape [", batch, ", max_blocks], got [",
                       block_table->size(0), ", ", block_table->size(1), "]");
        args.slots.block_table = static_cast<const int32_t*>(block_table->data_ptr());
        args.slots.block_table_stride = block_table->stride(0);
        args.slots.max_blocks = static_cast<int32_t>(block_table->size(1));
    }

    std::vector<int32_t> layout_of;  // of each cache
    std::vector<char*> caches;
    std::vector<CacheSource> sources;
    layout_of.reserve(kv.size());
    caches.reserve(kv.size());
    sources.reserve(kv.size());
    torch::headeronly::IntHeaderOnlyArrayRef all_sizes, all_strides;
    int64_t element = 0;
    char* last = nullptr;  // the cache before, if of the same sizes and strides
    for (size_t t = 0; t < kv.size(); ++t) {
        const torch::stable::Tensor& x = kv[t];
        MK_CHECK_VALUE(
            x.is_cuda() == cuda && x.get_device_index() == device && (cuda || x.is_cpu()),
            "kv: tensor ", t, " is not on the device of the others");
        const auto last_sizes = all_sizes, last_strides = all_strides;
        const int64_t last_element = element;
        all_sizes = x.sizes();
        all_strides = x.strides();
        element = static_cast<int64_t>(x.element_size());
        char* data = static_cast<char*>(x.data_ptr());
        const auto add = [&](char* cache) {
            caches.push_back(last = cache);
            sources.push_back({static_cast<int64_t>(t), cache - data});
        };
        if (last && lead_dims == 0 && element == last_element && all_sizes == last_sizes &&
            all_strides == last_strides && same_alignment(data, last)) {
            layout_of.push_back(layout_of.back());
            add(data);
            continue;
        }
        const int64_t dim = x.dim() - lead_dims;
        MK_CHECK_VALUE(dim >= 2, "kv: tensor ", t, " has ", x.dim(),
                       " dimension(s), expected at least ", lead_dims + 2);
        const int64_t *sizes = all_sizes.data() + lead_dims,
                      *strides = all_strides.data() + lead_dims;
        last = nullptr;
        if (t == 0) {
            MK_CHECK_VALUE(sizes[0] <= std::numeric_limits<int32_t>::max() &&
                               sizes[1] <= std::numeric_limits<int32_t>::max(),
                           "kv: too large, got [", sizes[0], ", ", sizes[1], ", ...]");
            args.slots.num_first = static_cast<int32_t>(sizes[0]);
            args.slots.num_second = static_cast<int32_t>(sizes[1]);
            MK_CHECK_VALUE(args.slots.capacity() <= std::numeric_limits<int32_t>::max(),
                           "block_table: expected at most 2**31 slots a request");
            MK_CHECK_VALUE(block_table || sizes[0] == batch, "kv: expected a batch of ", batch,
                           " requests as in path, got ", sizes[0],
                           " (a paged cache needs block_table)");
        }
        MK_CHECK_VALUE(sizes[0] == args.slots.num_first && sizes[1] == args.slots.num_second,
                       "kv: tensor ", t, " has [", sizes[0], ", ", sizes[1],
                       "] slots, tensor 0 has [", args.slots.num_first, ", ", args.slots.num_second,
                       "]");
        if (x.numel() == 0) {
            MK_CHECK_VALUE(batch == 0, "kv: tensor ", t, " is empty");
            continue;
        }
        MK_CHECK_VALUE((sizes[0] == 1 || strides[0] != 0) && (sizes[1] == 1 || strides[1] != 0),
                       "kv: tensor ", t, " is expanded (stride 0) along its slots");
        int64_t lead_size[2] = {1, 1}, lead_stride[2] = {0, 0};
        for (int64_t d = 0; d < lead_dims; ++d) {
            lead_size[d] = all_sizes[d];
            lead_stride[d] = all_strides[d] * element;
            MK_CHECK_VALUE(lead_size[d] == 1 || lead_stride[d] != 0,
                           "kv: expanded (stride 0) along dimension ", d);
        }
        for (int64_t i = 0; i < lead_size[0]; ++i) {
            for (int64_t j = 0; j < lead_size[1]; ++j) {
                char* cache = data + i * lead_stride[0] + j * lead_stride[1];
                const bool again = last && same_alignment(cache, last);
                add(cache);
                if (again) {
                    layout_of.push_back(layout_of.back());
                    continue;
                }
                const KvLayout layout = row_layout(t, cache, element, sizes, strides, dim);
                size_t l = args.layouts.size();
                while (l > 0 && !(args.layouts[l - 1] == layout)) --l;
                if (l == 0) {
                    args.layouts.push_back(layout);
                    l = args.layouts.size();
                }
                layout_of.push_back(static_cast<int32_t>(l - 1));
            }
        }
    }
    args.first_caches.assign(args.layouts.size() + 1, 0);
    for (const int32_t l : layout_of) ++args.first_caches[l + 1];
    for (size_t l = 0; l < args.layouts.size(); ++l)
        args.first_caches[l + 1] += args.first_caches[l];
    std::vector<int32_t> next(args.first_caches.begin(), args.first_caches.end());
    args.caches.resize(caches.size());
    args.sources.resize(caches.size());
    for (size_t c = 0; c < caches.size(); ++c) {
        const int32_t at = next[layout_of[c]]++;
        args.caches[at] = caches[c];
        args.sources[at] = sources[c];
    }
    check_distinct(std::move(caches));
    return args;
}

// ---- plans: a head, then the vectors but for `caches`, each after its size ----

template <typename T>
void put(std::string& bytes, const T* x, size_t count = 1) {
    bytes.append(reinterpret_cast<const char*>(x), count * sizeof(T));
}

template <typename T>
void put(std::string& bytes, const std::vector<T>& all) {
    const size_t count = all.size();
    put(bytes, &count);
    put(bytes, all.data(), count);
}

template <typename T>
void take(const char*& bytes, T* x, size_t count = 1) {
    std::memcpy(x, bytes, count * sizeof(T));
    bytes += count * sizeof(T);
}

template <typename T>
void take(const char*& bytes, std::vector<T>& all) {
    size_t count;
    take(bytes, &count);
    all.resize(count);
    take(bytes, all.data(), count);
}

// The operator.
inline torch::stable::Tensor compact_kv_cache_plan(
    std::vector<torch::stable::Tensor> kv, int64_t lead_dims, torch::stable::Tensor path,
    torch::stable::Tensor accept_length, torch::stable::Tensor cache_seqlens,
    std::optional<torch::stable::Tensor> block_table) {
    const CompactArgs args =
        compact_args(kv, lead_dims, path, accept_length, cache_seqlens, block_table);
    std::string bytes;
    put<CompactHead>(bytes, &args);
    put(bytes, args.layouts);
    put(bytes, args.sources);
    put(bytes, args.first_caches);
    return plan_tensor(bytes.data(), bytes.size());
}

// Of a call made again, whose addresses are in the order in which medusa_kernels/kv_cache.py has
// its tensors.
inline CompactArgs planned_args(const char* plan, const uint64_t* addresses) {
    CompactArgs args;
    take<CompactHead>(plan, &args);
    take(plan, args.layouts);
    take(plan, args.sources);
    take(plan, args.first_caches);
    Addresses next(addresses);
    next(args.path);
    next(args.accept_length);
    next(args.cache_seqlens);
    next(args.slots.block_table);
    const uint64_t* tensors = addresses + 4;
    args.caches.reserve(args.sources.size());
    for (const CacheSource& source : args.sources) {
        args.caches.push_back(reinterpret_cast<char*>(tensors[source.tensor]) + source.offset);
    }
    check_distinct(args.caches);
    return args;
}

}  // namespace medusa_kernels
