// What the operators were built with; the macros come from setup.py.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, m) {
    m.attr("torch_target") =
        MK_TORCH_TARGET;  // the stable ABI's version: runs on this torch and later
    m.attr("torch_version") = MK_TORCH_VERSION;  // whose headers were used
    m.attr("nvcc_version") = MK_NVCC_VERSION;    // "": built without CUDA
    m.attr("cuda_archs") = MK_CUDA_ARCHS;        // ";"-separated, the last also as PTX
#if defined(__clang__)
    m.attr("cxx") = "clang " __clang_version__;
#else
    m.attr("cxx") = "gcc " __VERSION__;
#endif
}
