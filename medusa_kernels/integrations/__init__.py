"""The kernels inside other libraries' models."""
