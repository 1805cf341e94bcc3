"""The threads of the CPU kernels."""

import subprocess
import sys

NEW_PROCESS = """
import numba
from stellarbyte.backends.cpu_model import CpuModel
from tests.support.models.byte_transformer import make_model

model = make_model()
CpuModel(model, model.config, None, quantization="none", num_threads=1)
numba.threading_layer()  # ValueError: there are no threads
"""


def test_they_run_before_the_first_kernel() -> None:
    """Stored code does not always start them, and without them its process is killed by a signal."""
    subprocess.run([sys.executable, "-c", NEW_PROCESS], check=True)
