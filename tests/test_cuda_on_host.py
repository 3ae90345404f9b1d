"""The CUDA floor, host layers and kernels, without a GPU: the contract in a process in which g++ has compiled it."""

import os
from collections.abc import Callable
from pathlib import Path

import cuda_on_host
import pytest
from contract import CUDA_ON_HOST, EXECUTED
from own_process import BUILD, package_with, run_pytest

import torchops

TESTS = Path(__file__).parent
LIBRARY = BUILD / "tests" / "cpp" / "on_host" / "libtorchops.so"
# What depends on the device: numbers, memory layouts, launches.
TO_RUN = (
    "matches_reference or same_bits or layout or expanded or meta_has or launches or rounding or copy or overflows"
    " or summed_in or does_not_show or exactly_zero or allocates_no_lists"
)

pytestmark = [
    pytest.mark.skipif(cuda_on_host.ACTIVE, reason="this is the process that was started"),
    pytest.mark.skipif(torchops._build.CUDA_VERSION != "", reason="this build has its CUDA floor on the GPU"),
]


def test_cuda_floor(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    files = [
        str(TESTS / name)
        for name in (
            "test_contract.py",
            "test_contract_gradients.py",
            "test_launches.py",
            "test_tokens.py",
            "test_stf.py",
            "test_sparse_attention.py",
            "test_sparse_attention_choice.py",
            "test_sparse_attention_scores.py",
        )
    ]
    printed = run_pytest(
        *("-k", TO_RUN, *files),
        environment={key: value for key, value in os.environ.items() if key != "TORCHOPS_CPU_CAPABILITY"},
        folder=package_with(LIBRARY, tmp_path),
    )
    assert "skipped" not in printed, printed[-5000:]
    record_property(EXECUTED, CUDA_ON_HOST)
