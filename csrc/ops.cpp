// Schemas of every operator of namespace medusa_kernels that C++ implements. Kernels register
// beside their code:
// *_cpu.cpp in this library, *.cu in the CUDA library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(medusa_kernels, m) {
    m.def(
        "compact_kv_cache(Tensor(a!)[] kv, int lead_dims, Tensor path, Tensor accept_length, "
        "Tensor(b!) cache_seqlens, Tensor? block_table) -> ()");
    // Few arguments, as the host takes as long for each as for a check of it. `numbers`, `values`
    // and `share_storage`: see csrc/acceptance_args.h.
    m.def(
        "accept_candidates(Tensor logits, Tensor tokens, Tensor parents, Tensor? num_nodes, int "
        "max_depth, float[] numbers, Tensor[]? values, Tensor? all_max_tokens, int max_tokens, "
        "Tensor? eos_tensor, int[] eos, Tensor(a!)? generator, int? seed, bool "
        "share_storage=False) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "finish_step(Tensor accept_length, Tensor last_node, Tensor tokens, Tensor next_token, "
        "Tensor finished, Tensor(a!) max_tokens, Tensor(b!) root, Tensor? eos_tensor, int[] eos, "
        "Tensor? hidden, Tensor(c!)? last_hidden) -> (Tensor, Tensor)");
    // Of each, all of a checked call but its addresses, to make it again: csrc/plans.h.
    m.def(
        "compact_kv_cache_plan(Tensor[] kv, int lead_dims, Tensor path, Tensor accept_length, "
        "Tensor cache_seqlens, Tensor? block_table) -> Tensor");
    m.def(
        "accept_candidates_plan(Tensor logits, Tensor tokens, Tensor parents, Tensor? num_nodes, "
        "int max_depth, float[] numbers, Tensor[]? values, Tensor? all_max_tokens, int max_tokens, "
        "Tensor? eos_tensor, int[] eos, Tensor? generator, int? seed) -> Tensor");
    m.def(
        "finish_step_plan(Tensor accept_length, Tensor last_node, Tensor tokens, Tensor "
        "next_token, Tensor finished, Tensor max_tokens, Tensor root, Tensor? eos_tensor, int[] "
        "eos, Tensor? hidden, Tensor? last_hidden) -> Tensor");
}
