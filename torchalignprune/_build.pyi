# torchalignprune/_build.py is written by setup.py when the extension is compiled.
TORCH: str
COMPILER: str
CXX_FLAGS: list[str]
LINK_FLAGS: list[str]
CUDA: str | None
NVCC_FLAGS: list[str]
CUDA_ARCHITECTURES: list[str]
WHY_NO_CUDA: str | None
