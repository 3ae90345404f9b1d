"""The CUDA floor executed on the host: how a process that test_cuda_on_host.py starts uses it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from torchops._namespace import NAMESPACE, operators

# The library of the C++ tests in place of the package's own: tests/cpp/simt/CMakeLists.txt.
ACTIVE = hasattr(torch.ops.torchops_on_host, "num_launches")


def use() -> torch.library.Library:
    """Operators on CPU tensors go to the host layers and kernels of CUDA while the result lives."""
    library = torch.library.Library(NAMESPACE, "IMPL", "CPU")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        if name.startswith(f"{NAMESPACE}::"):
            operator = getattr(operators, name.removeprefix(f"{NAMESPACE}::")).default
            library.impl(operator, partial(operator.redispatch, cuda))
    return library


def has_cuda_half(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA")


def num_launches() -> int:
    """So far."""
    return torch.ops.torchops_on_host.num_launches()


@contextmanager
def random_order() -> Iterator[None]:
    """Of threads and blocks of the kernels launched meanwhile."""
    torch.ops.torchops_on_host.use_order(1)
    try:
        yield
    finally:
        torch.ops.torchops_on_host.use_order(None)
