"""What makes a model's step shorter on a GPU, where at small batches its many small operators take most of the time."""

from transformers import PreTrainedModel


def fuse_elementwise(model: PreTrainedModel) -> None:
    """Replace a model's RMSNorms, rotary embedding and gated MLPs by Liger's fused kernels, in place, for inference.

    They are 28 of the some 41 launches of a Llama layer, and 4 then. The rotary embedding is replaced for all models of
    this architecture in the process, so that none of them runs on a CPU any more.

    Raises ImportError without `liger-kernel` (extra `fused`), ValueError for a model that is not on a GPU or whose
    architecture Liger does not know.
    """
    if model.device.type != "cuda":
        raise ValueError(f"model: expected one on a GPU, got one on {model.device}")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls, too
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise ImportError(
            f"fuse_elementwise needs liger-kernel ({error}): pip install 'medusa_kernels[fused]'"
        ) from None
    if (architecture := model.config.model_type) not in known:
        raise ValueError(f"model: Liger knows {', '.join(sorted(known))}, got {architecture}")
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
