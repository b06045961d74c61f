"""Tests mirror engine/ and kernels/. What is set here must be set before torch or a kernel is first used."""

import os

# Triton kernels run on the CPU only through its interpreter, which is chosen when a kernel is decorated.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Some virtual machines announce AMX but do not let programs use it; bfloat16 matrix products then fail in oneDNN.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
