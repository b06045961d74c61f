"""Benchmarks. Most need a GPU; what they print is cost, and quality stands beside it where weights are trained."""

import os
import sys

# A check runs the kernels through Triton's interpreter, which is chosen when a kernel is decorated: before anything imports one.
if "--check" in sys.argv[1:]:
    os.environ["TRITON_INTERPRET"] = "1"
