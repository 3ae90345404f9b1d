"""python -m torchops: what users type, what they read, and what is in the files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchops
from torchops.benchmarks.harness import Options, Report, rows_of
from torchops.benchmarks.harness.measure import warmed_up
from torchops.command_line import COMMANDS, main
from torchops.command_line.bench import FAMILIES, family_of


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message, of one line, of a command that the user got wrong."""
    try:
        status = main(argv)
    except SystemExit as exit:  # argparse's
        status = exit.code
    assert status == 2
    written = capsys.readouterr().err
    message = written[written.index("python -m torchops") :]  # behind the progress of loading
    assert message.count("\n") == 1
    return message


def fits(text: str) -> bool:
    return all(len(line) <= 80 for line in text.splitlines())


def test_info_in_a_process() -> None:
    run = subprocess.run([sys.executable, "-m", "torchops", "info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for said in (torchops.__version__, torch.__version__, "Python", "CPU, ", "merge_tokens", "stf_linear_packed"):
        assert said in run.stdout
    assert "sparse_attention_choice" not in run.stdout and "num_groups" not in run.stdout


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in fails(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and f"  python -m torchops {command}" in shown and fits(shown)


# ---- benchmarks -----------------------------------------------------------------------------------

SMALL = {
    "routed_ffn": {"T": 8, "d": 16, "D": 32, "G": 4, "E": 4, "I": 16, "k": 2},
    "span_attention": {"n": 32, "Lk": 32, "W": 8, "b": 8, "B": 2, "H": 4, "D": 16, "Hkv": 2},
    "sparse_attention": {"n": 64, "Lk": 64, "share": 8, "H": 2, "D": 16, "b": 8, "c": 8},
    "stf": {"T": 4, "in": 32, "out": 64},
    "tokens": {"B": 2, "N": 17, "C": 16, "K": 8, "r": 4},
}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention takes seconds to compile."""

    def refuses(*inputs: Tensor) -> Tensor:
        raise NotImplementedError("not in tests")

    monkeypatch.setattr("torchops.benchmarks.eager.span_attention.compiled_flex_attention", lambda *_: refuses)


def test_every_family_has_small_sizes() -> None:
    assert sorted(SMALL) == FAMILIES


@pytest.mark.parametrize("family", SMALL)
def test_rivals_compute_the_same_for_sizes_that_are_given(family: str, no_compiler: None) -> None:
    options = Options(torch.device("cpu"), [torch.float32], quick=True, full=False)
    for operation in family_of(family).OPERATIONS.values():
        sizes = {name: size for name, size in SMALL[family].items() if name in operation.sizes}
        row = rows_of({"": operation}, sizes, options)[-1]
        contenders, absent = warmed_up(row)
        assert len(contenders) > 1 and list(absent.values()) in ([], ["NotImplementedError: not in tests"])
        for name in {"n", "N", "T", "H"} & sizes.keys():
            assert f"{name}={sizes[name]} " in f"{row.label} "


def test_sizes_choose_the_operations_that_have_them() -> None:
    options = Options(torch.device("cpu"), [torch.float32, torch.bfloat16], quick=False, full=False)
    operations = family_of("span_attention").OPERATIONS
    rows = rows_of(operations, {"n": 256, "W": 16}, options)
    assert {row.operation for row in rows} == {"causal window"} and len(rows) == 2 * 2
    assert rows[0].label == "causal window, n=256 W=16 H=4 D=64, float32, forward"
    assert len({row.operation for row in rows_of(operations, {"n": 256}, options)}) == 5
    choice = rows_of({"": family_of("sparse_attention").OPERATIONS["choice by codes"]}, {}, options)
    assert len(choice) == 1  # of no dtype


def test_bench_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None) -> None:
    pytest.importorskip("rich", reason="rich is not installed: pip install rich")
    record = tmp_path / "window.json"
    shape = ["--shape", "n=64", "W=16", "H=2", "--shape", "n=64", "b=16", "H=2"]
    options = ["--quick", "--dtype", "float32", "--filter", "backward", "--no-plot", "--output", str(record)]
    assert main(["bench", "span_attention", *shape, *options]) == 0
    shown = capsys.readouterr().out
    assert fits(shown) and "SDPA + mask" in shown and "causal blocks" in shown and "n=64 W=16 H=2 D=64" in shown
    report = Report.load(record)
    assert [row.parameters["span"] for row in report.rows] == [16, 16]
    assert report.conditions["only sizes"] == "n=64 W=16 H=2; n=64 b=16 H=2"
    assert not list(tmp_path.glob("*.md"))


def test_bench_lists_rows_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stf", "--quick", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "linear layer, T=64 1024 x 1024, 2x" in shown
    assert "  linear layer: T=512 in=1024 out=1024 transpose=0 compression=2 warm=0" in shown


def test_a_row_that_fails_is_in_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="rich is not installed: pip install rich")
    shape = ["--shape", "n=10", "share=20", "Hkv=1"]  # lists of no keys
    assert main(["bench", "sparse_attention", *shape, "--quick", "--dtype", "float32"]) == 1
    assert "FAILED: scores of lists, n=10 k=0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a family: routed_ffn, span_attention, "),
        (["attention"], "invalid choice: 'attention'"),
        (["tokens", "--shape", "N=8", "Q=2"], "expected sizes that one operation has, got N Q (python -m torchops"),
        (["tokens", "--shape", "N=0"], "expected NAME=SIZE with a size above 0, got 'N=0'"),
        (["tokens", "--shape", "N"], "expected NAME=SIZE with a size above 0, got 'N'"),
        (["tokens", "--shape", "protected=2"], "expected protected=0 or protected=1"),
        (["tokens", "--filter", "("], "'(' is no regular expression"),
        (["tokens", "--filter", "no such row"], "no row's label matches 'no such row'"),
        (["tokens", "--threads", "0"], "expected 1 or more, got 0"),
        (["tokens", "--output", "figures"], "expected a file *.json, got figures"),
        (["--publish", "no.json"], "No such file"),
    ],
)
def test_bench_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="rich is not installed: pip install rich")
    if "--publish" in argv:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    assert message in fails(capsys, "bench", *argv)
