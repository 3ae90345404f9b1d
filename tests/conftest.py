"""What all tests share: stubs for half-installed neighbours, seeds, and the closing list of what ran."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import cuda_on_host
import export_matrix
import pytest
import torch
from contract import BY_EMULATION, CUDA_ON_HOST, EXECUTED, FOR_ONE_LEVEL
from own_process import POISONED, is_poisoned, poison_memory_of_new_processes

import torchops

# timm imports torchvision, and a torchvision built for another torch fails at its import because its own
# operators are missing. Declaring the two that it looks up lets it load; no test calls them.
if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _torchvision = torch.library.Library("torchvision", "FRAGMENT")
        for _name in ("nms", "qnms"):
            _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if cuda_on_host.ACTIVE:
    _cuda_floor = cuda_on_host.use()

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "run the tests with the mark `way`, and write what works in which way into this page (docs/export.md)"
    parser.addoption("--export-matrix", type=Path, metavar="PAGE", help=what)


def pytest_configure() -> None:
    poison_memory_of_new_processes()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.cuda]}
        metafunc.parametrize("device", [pytest.param(device, marks=marks.get(device, [])) for device in DEVICES])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shown = {item: export_matrix.shown_by(item) for item in items}
    for item in items:
        item.user_properties.append((export_matrix.SHOWN, shown[item]))
    if config.option.export_matrix:
        items[:] = [item for item in items if shown[item]]
    if cuda_on_host.ACTIVE:
        # test_contract.py says when the CUDA half of an operator is missing.
        cases = {item: item.callspec.params.get("case") for item in items if hasattr(item, "callspec")}
        items[:] = [item for item in items if not cases.get(item) or cuda_on_host.has_cuda_half(cases[item].name)]


@pytest.fixture(autouse=True)
def _seed(record_property: Callable[[str, object], None]) -> None:
    torch.manual_seed(0)
    if is_poisoned():
        record_property(EXECUTED, POISONED)


@pytest.fixture
def two_threads():
    """At least two threads, so that there is something to differ from one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Small models take most of their time by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.export_matrix:
        outcomes = ("passed", "failed", "error", "skipped")  # an error: of a fixture
        reports = [report for outcome in outcomes for report in terminalreporter.getreports(outcome)]
        export_matrix.write(config.option.export_matrix, reports)
    if FOR_ONE_LEVEL:
        return  # a run for one level, started by test_levels.py
    if cuda_on_host.ACTIVE:
        return  # started by test_cuda_on_host.py
    # Tests say so in their reports, which come also from the workers of pytest-xdist.
    reports = terminalreporter.getreports("passed")
    elsewhere = {value for report in reports for name, value in report.user_properties if name == EXECUTED}
    levels = elsewhere | {torchops.utils.cpu_capability()}
    terminalreporter.section("what was executed")
    for device in ("cpu", "cuda"):
        note = "executed" if device in DEVICES else "NOT executed: this machine has none"
        terminalreporter.line(f"device {device}: {note}")
    memory = "filled with NaN as it is allocated" if POISONED in elsewhere else "NOT filled with NaN (pytest -n 1 does)"
    terminalreporter.line(f"memory: {memory}")
    on_host = "executed" if CUDA_ON_HOST in elsewhere else "NOT executed in this run"
    terminalreporter.line(f"CUDA operators on the host: {on_host}")
    for level in torchops.utils.cpu_levels:
        if level in levels:
            note = "executed on hardware"
        elif BY_EMULATION + level in levels:
            note = "executed by emulation: this CPU does not have it"
        elif level in torchops.utils.cpu_capabilities():
            note = "NOT executed in this run"
        else:
            note = "NOT executed: this CPU does not have it"
        terminalreporter.line(f"CPU level {level}: {note}")
