// Schemas of every operator of namespace medusa_kernels that C++ implements. Kernels register
// beside their code:
// *_cpu.cpp in this library, *.cu in the CUDA library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(medusa_kernels, m) {
    m.def(
        "compact_kv_cache(Tensor(a!)[] kv, int lead_dims, Tensor path, Tensor accept_length, "
        "Tensor(b!) cache_seqlens, Tensor? block_table) -> ()");
    // A parameter of each request is a tensor [batch], or else the number after it.
    m.def(
        "accept_candidates(Tensor logits, Tensor tokens, Tensor parents, Tensor? num_nodes, int "
        "max_depth, "
        "Tensor? modes, int accept_mode, Tensor? temperatures, float temperature, Tensor? "
        "thresholds, float threshold, "
        "Tensor? alphas, float alpha, Tensor? top_ks, int top_k, Tensor? top_ps, float top_p, "
        "Tensor? all_max_tokens, "
        "int max_tokens, Tensor? eos_tensor, int[] eos, Tensor(a!)? generator, int? seed) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
