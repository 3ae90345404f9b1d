"""What CUDA asks of every operator beyond the contract: graphs, streams, devices, no synchronisation, size."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import torch
from cases import EVERY_DTYPE, EVERY_OP, KERNEL_OPS
from contract import (
    Inputs,
    OpCase,
    assert_close,
    assert_same_bits,
    cotangents,
    differentiable_outputs,
    given,
    map_tensors,
    outputs_of,
)
from torch import Tensor

import torchops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
LENGTH = 70
IS_DEBUG_BUILD = torchops._build.BUILD_TYPE == "Debug"  # whose kernels check their data


class Step:
    """An operator forward, and backward where it has gradients, on tensors that stay where they are."""

    def __init__(self, case: OpCase, inputs: Inputs) -> None:
        self.op = case.op
        self.names = given(inputs, case.differentiable)
        self.inputs = map_tensors(inputs, lambda t: t.detach().clone())
        for name in self.names:
            self.inputs[name].requires_grad_()
        self.cotangents = cotangents(differentiable_outputs(self.op(**self.inputs)))

    def __call__(self) -> list[Tensor]:
        outputs = outputs_of(self.op(**self.inputs))
        wanted = [out for out in outputs if out.requires_grad]
        leaves = [self.inputs[name] for name in self.names]
        gradients = torch.autograd.grad(wanted, leaves, self.cotangents) if wanted else ()
        return [out.detach() for out in outputs] + list(gradients)

    @torch.no_grad()
    def fill(self, inputs: Inputs) -> None:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)


def map_batch(case: OpCase, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """What has a batch changes, the rest stays."""
    return map_tensors(inputs, change) | {name: inputs[name] for name in case.unbatched if name in inputs}


def other_rows(case: OpCase, inputs: Inputs) -> Inputs:
    """The same batch in another order: values as valid, and different."""
    return map_batch(case, inputs, lambda t: t.flip(0))


def differ(first: list[Tensor], second: list[Tensor]) -> bool:
    return any(not torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ---- launching ----------------------------------------------------------------------------------


@KERNEL_OPS
@EVERY_DTYPE
def test_graph_replays_on_new_inputs(case: OpCase, dtype: torch.dtype) -> None:
    inputs = case.sized(dtype, "cuda", LENGTH)
    step = Step(case, inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # what is set up once must not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for values in (inputs, other_rows(case, inputs)):
        step.fill(values)
        graph.replay()
        seen.append([out.clone() for out in captured])
        assert_same_bits(captured, step(), "replayed and eager")
    assert differ(*seen), "both inputs give the same, so that the replay shows nothing"


@KERNEL_OPS
def test_side_stream(case: OpCase) -> None:
    """The inputs arrive late on a stream of their own: whoever runs on another one meets their old values."""
    inputs = case.sized(torch.float32, "cuda", LENGTH)
    expected = Step(case, inputs)()
    step = Step(case, other_rows(case, inputs))
    assert differ(step(), expected)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: 50 ms and more
        step.fill(inputs)
        actual = step()
    stream.synchronize()
    assert_same_bits(actual, expected, "on a side stream")


@KERNEL_OPS
@EVERY_DTYPE
def test_no_synchronisation(case: OpCase, dtype: torch.dtype) -> None:
    for sample in case.samples(dtype, "cuda"):
        step = Step(case, sample.inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@KERNEL_OPS
def test_another_device_than_the_current_one(case: OpCase) -> None:
    inputs = case.sized(torch.float32, "cuda:0", LENGTH)
    actual = Step(case, map_tensors(inputs, lambda t: t.to("cuda:1")))()
    assert {out.device for out in actual} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    for one, other in zip(actual, Step(case, inputs)(), strict=True):
        exact = other.double() if other.is_floating_point() else other
        tolerance = max(case.gradient_tolerance.get(torch.float32, 0), cases.backward_tolerance(case, torch.float32))
        assert_close(one.to("cuda:0"), exact, torch.float32, "on the second device", tolerance)


# ---- results ------------------------------------------------------------------------------------


@EVERY_OP
@EVERY_DTYPE
def test_agrees_with_the_cpu(case: OpCase, dtype: torch.dtype) -> None:
    """Indices are the same; the rest is, to rounding."""
    for sample in case.samples(dtype, "cpu"):
        actual = outputs_of(case.op(**map_tensors(sample.inputs, lambda t: t.cuda())))
        expected = outputs_of(case.op(**sample.inputs))
        tolerance = max(case.output_tolerance.get(dtype, 0), cases.backward_tolerance(case, dtype))
        for index, (one, other) in enumerate(zip(case.compared(actual), case.compared(expected), strict=True)):
            exact = other.double() if other.is_floating_point() else other
            assert_close(one.cpu(), exact, dtype, f"{sample.id}, output {index}", tolerance)


@EVERY_OP
def test_more_than_2_to_the_31_elements(case: OpCase) -> None:
    """The last row of the batch, which is beyond 32-bit offsets, gives what it gives alone."""
    if case.large is None:
        pytest.skip("the case table has no call of that size")
    try:
        inputs = case.large("cuda")
        outputs = outputs_of(case.op(**inputs))
        tensors = [*outputs, *(value for value in inputs.values() if isinstance(value, Tensor))]
        assert max(tensor.numel() for tensor in tensors) > 2**31
        alone = outputs_of(case.op(**map_batch(case, inputs, lambda t: t[-1:])))
        assert_same_bits([out[-1:] for out in outputs], alone, "the last row")
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"needs more memory than {torch.cuda.get_device_name()} has free")
    finally:
        inputs = outputs = tensors = alone = None
        torch.cuda.empty_cache()


# ---- mistakes -----------------------------------------------------------------------------------


@EVERY_OP
def test_bad_input_raises_the_same_error_as_on_the_cpu(case: OpCase) -> None:
    for call in case.invalid("cuda"):
        if not call.data_dependent:
            with pytest.raises(ValueError) as error:
                case.op(**call.inputs)
            assert str(error.value).splitlines()[0] == f"{case.name}: {call.message}"


@EVERY_OP
def test_cpu_tensors_among_cuda_tensors_raise(case: OpCase) -> None:
    inputs = case.sized(torch.float32, "cuda", 8)
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else []:
        with pytest.raises(ValueError, match=rf"{case.name}: expected .* device"):
            case.op(**(inputs | {name: inputs[name].cpu()}))


@pytest.mark.skipif(IS_DEBUG_BUILD, reason="a debug build stops there")
@KERNEL_OPS
def test_bad_data_does_no_harm(case: OpCase) -> None:
    """What the CPU refuses for its data runs through; compute-sanitizer sees that it stays within bounds."""
    for call in case.invalid("cuda"):
        if call.data_dependent:
            outputs = outputs_of(case.op(**call.inputs))
            torch.cuda.synchronize()
            shapes = [out.shape for out in outputs_of(case.op(**map_tensors(call.inputs, lambda t: t.to("meta"))))]
            assert [out.shape for out in outputs] == shapes


STOPPED = """
import sys
sys.path.insert(0, sys.argv[1])
import cases, torch
case = next(case for case in cases.ALL if case.name == sys.argv[2])
call = next(call for call in case.invalid("cuda") if call.id == sys.argv[3])
case.op(**call.inputs)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not IS_DEBUG_BUILD, reason="needs a debug build: TORCHOPS_CMAKE_ARGS=-DCMAKE_BUILD_TYPE=Debug")
@EVERY_OP
def test_bad_assignments_stop_a_debug_build(case: OpCase) -> None:
    for call in case.invalid("cpu"):
        if call.data_dependent and call.id.startswith("assign"):
            command = [sys.executable, "-c", STOPPED, str(Path(__file__).parent), case.name, call.id]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode != 0
            assert "Assertion `an assignment is in -1..num_groups-1` failed" in run.stderr, run.stderr[-3000:]
