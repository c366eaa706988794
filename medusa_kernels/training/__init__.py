"""From a model to Medusa heads: `python -m medusa_kernels.training prompts|distill|medusa1|medusa2|search|evaluate`."""
