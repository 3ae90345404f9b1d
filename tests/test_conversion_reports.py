"""How the reports of factorize_ and route_ffn_ are printed: in 80 columns, layers that are alike together."""

import io
import math

import pytest

from torchops.nn import FactorizationReport, FactorizedLayer, RoutedLayer, RoutingReport
from torchops.nn._report import Table, shortened, together


def factorization(*names: str, calibrated: bool = True) -> FactorizationReport:
    outputs = (10.0, 1.0) if calibrated else (math.nan, math.nan)
    layers = [
        FactorizedLayer(name, "output", 64, 32, 4000, 2400, 2000, 1000, 500, 8.0, 1.0 + place, *outputs)
        for place, name in enumerate(names)
    ]
    return FactorizationReport(layers)


def bart(part: str) -> list[str]:
    attention = [f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    return [f"model.{part}.layers.{layer}.{name}" for layer in range(12) for name in (*attention, "fc1", "fc2")]


def reports() -> list[Table]:
    names = [*bart("encoder"), *bart("decoder"), "a_single_name_that_is_longer_than_what_a_line_of_the_table_has"]
    layers = [
        RoutedLayer(name, "gelu", 1024, 16384, 16, 8, 10**9, 5 * 10**8, 7, 3.0, 2.0 + place / 100, 0.1 + place / 1000)
        for place, name in enumerate(names)
    ]
    return [factorization(*names), factorization(*names, calibrated=False), RoutingReport(layers)]


@pytest.mark.parametrize("report", reports())
def test_a_table_has_80_columns(report: Table) -> None:
    lines = str(report).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 80
    assert len(lines) == 1 + 6 + 6 + 1 + 1
    # No two lines are of one name, and the names of the data are whole.
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert [row[0] for row in report.rows()[:-1]] == [layer.name for layer in report.layers]


@pytest.mark.parametrize("report", reports())
def test_rich_has_80_columns_too(report: Table) -> None:
    rich = pytest.importorskip("rich.console", reason="rich is not installed: pip install rich")
    console = rich.Console(width=80, file=io.StringIO())
    console.print(report)
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    assert all(line.split() in shown for line in str(report).splitlines())


def test_layers_that_are_alike_share_a_line() -> None:
    report = factorization("layer.0.query", "layer.1.query", "layer.3.query", "head", calibrated=False)
    header, query, head, total = (line.split() for line in str(report).splitlines())
    assert header == ["layer", "packed", "kB", "smaller", "error"]  # and no outputs, of which nothing is known
    assert query == ["layer.0-1,3.query", "6.0", "2.00", "x", ".125-.375"]
    assert head == ["head", "2.0", "2.00", "x", "0.500"]
    assert total[:2] == ["4", "layers"] and len(report.rows()) == 5


def test_layers_of_other_sizes_have_lines_of_their_own() -> None:
    assert list(together(["0", "2"], ["wide", "narrow"])) == [("0", [0]), ("2", [1])]
    # Not every number of the first stands with every one of the second.
    names = ["block.0.layer.0", "block.0.layer.1", "block.1.layer.2"]
    assert list(together(names, [1, 1, 1])) == [(name, [place]) for place, name in enumerate(names)]
    names = [f"block.{block}.expert.{expert}" for block in range(2) for expert in range(4)]
    assert list(together(names, [1] * 8)) == [("block.0-1.expert.0-3", list(range(8)))]


def test_layers_that_stay_dense_share_a_line() -> None:
    left = [(f"h.{layer}.attn", "a reason") for layer in range(12)] + [("head", "another")]
    report = FactorizationReport(factorization("fc").layers, left)
    assert report.remarks() == ["left dense: h.0-11.attn (a reason)", "left dense: head (another)"]


def test_short_names_stay_as_they_are() -> None:
    names = ["encoder.layer.0-11.fc1", "decoder.layer.0-11.fc1"]
    assert shortened(names, 22) == names
    assert shortened(names, 16) == ["encoder…0-11.fc1", "decoder…0-11.fc1"]
