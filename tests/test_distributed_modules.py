"""Every module under torch.distributed: data parallel, with sharded and tensor-parallel parameters, checkpoints."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import test_distributed_sharding
import torch
import torch.distributed as dist
from contract import assert_close
from module_cases import BLOCKS, CASES, ModuleCase, batch, built
from processes import needs_gloo, run_in_processes
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torchops.distributed.sharding_plans import AttentionParallel, RoutedFFNParallel, STFParallel, tensor_parallel_plan
from torchops.nn import RoutedFFN, Router, SpanAttention, STFLinear, balance_loss

pytestmark = needs_gloo


def test_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes save, one loads, and four."""
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path))
    run_in_processes(
        2,
        [
            data_parallel,
            data_parallel_training,
            layers_of_other_sizes,
            all_choices_count,
            fully_sharded,
            fully_sharded_from_meta,
            state_from_the_first_process,
            tensor_parallel,
            factored_feed_forward,
            from_meta_in_parts,
            refused,
            saved,
        ],
        tmp_path,
    )
    loaded_by_one()
    (tmp_path / "store").unlink()
    run_in_processes(4, [loaded_by_four, two_dimensions, test_distributed_sharding.two_dimensions], tmp_path)


CHECKPOINTS = "TORCHOPS_TEST_CHECKPOINTS"


def part(inputs: Tensor) -> Tensor:
    return inputs.chunk(dist.get_world_size())[dist.get_rank()]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


def expected(case: ModuleCase, model: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process with the whole batch."""
    loss = case.loss(model, model(inputs))
    loss.backward()
    return loss.detach(), gradients(model)


def named(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == wanted.keys(), f"{what}: {actual.keys() ^ wanted.keys()}"
    for name, tensor in wanted.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-12, msg=named(f"{what}, {name}"))


def mean_of_all(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def agree(model: nn.Module) -> bool:
    """Whether all processes hold the same."""
    sums = torch.stack([tensor.double().sum() for tensor in full_state(model).values()])
    others = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(others, sums)
    return all(torch.equal(other, sums) for other in others)


# ---- data parallel ----------------------------------------------------------------------------


def data_parallel(rank: int) -> None:
    """The first process's tensors, and the mean of both halves' gradients."""
    for name, case in CASES.items():
        inputs = batch(case)
        loss, grads = expected(case, built(case), inputs)
        model = DistributedDataParallel(built(case, seed=rank))
        own = case.loss(model, model(part(inputs)))
        own.backward()
        assert_close(mean_of_all(own), loss, torch.float64, f"{name}, loss")
        assert_same(gradients(model.module), grads, name)


def data_parallel_training(rank: int) -> None:
    """Processes that see other tokens stay together, with losses that are no means over tokens, and buffers."""
    for name, case in CASES.items():
        parallel = DistributedDataParallel(built(case, seed=rank))
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        routers = [module for module in parallel.modules() if isinstance(module, Router)]
        for _ in range(2):
            optimizer.zero_grad()
            output = parallel(part(batch(case)))
            (case.loss(parallel, output) + (balance_loss(parallel) if routers else 0)).backward()
            optimizer.step()
            for router in routers:
                if router.balance_bias is not None:
                    router.update_balance()
        assert agree(parallel.module), name


def layers_of_other_sizes(rank: int) -> None:
    """Tensors of straight-through layers look alike."""
    parallel = DistributedDataParallel(STFLinear(12, 20, 8, nnz=3 + rank).straight_through())
    if rank:
        with pytest.raises(ValueError, match="expected the state of a layer with .*nnz=4.*, got one with .*nnz=3"):
            parallel.module(torch.randn(2, 12))


def all_choices_count(rank: int) -> None:
    """Blocks 0 and 1 in one process, 0 and 2 in the other: the mean is 1."""
    router = Router(4, 4, 2)
    router.update_balance(torch.tensor([[0, 1 + rank]]), rate=1.0)
    assert router.balance_bias.tolist() == [-1.0, 0.0, 0.0, 1.0]


# ---- sharded parameters -----------------------------------------------------------------------


def sharded(model: nn.Module) -> nn.Module:
    """Each layer by itself, as large models are, and what is left."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for layer in module:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer)
    return fully_shard(model)


def fully_sharded(rank: int) -> None:
    for name, case in CASES.items():
        inputs = batch(case)
        loss, grads = expected(case, built(case), inputs)
        model = sharded(built(case))
        own = case.loss(model, model(part(inputs)))
        own.backward()
        assert_close(mean_of_all(own), loss, torch.float64, f"{name}, loss")
        assert_same(gradients(model), grads, name)


def forms_of(model: nn.Module) -> dict[str, str]:
    return {name: layer.form() for name, layer in model.named_modules() if isinstance(layer, STFLinear)}


def fully_sharded_from_meta(rank: int) -> None:
    for name, case in CASES.items():
        if not case.resets:
            continue
        with torch.device("meta"):
            model = case.build()
        forms = forms_of(model)
        model = sharded(model).to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            with torch.no_grad():
                tensor.fill_(93)  # neither a number that is drawn nor a position in ascending order
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        before = full_state(model)
        assert agree(model) and not any((tensor == 93).all() for tensor in before.values()), name
        assert forms_of(model) == forms, name
        for layer_name, layer in model.named_modules():
            if isinstance(layer, STFLinear) and layer.indices is not None:
                indices = before[f"{layer_name}.indices"]
                positions = indices.view(torch.int16).squeeze(-1) if layer.basis_size > 256 else indices.int()
                assert (positions.diff(dim=-1) > 0).all()
                assert positions.min() >= 0 and positions.max() < layer.basis_size
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = case.loss(model, model(part(batch(case)).float()))
        assert loss.isfinite(), name
        loss.backward()
        optimizer.step()
        after = full_state(model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {name for name, p in model.named_parameters() if p.grad is not None and full(p.grad).any()}, (
            name
        )
        assert changed, name


def state_from_the_first_process(rank: int) -> None:
    for name, case in CASES.items():
        model = built(case, seed=rank)
        state = copy.deepcopy(model.state_dict()) if rank == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        model = fully_shard(built(case, seed=5))
        set_model_state_dict(model, dict(state), options=options)
        assert agree(model), name
        loaded = full_state(model)
        assert rank or all(torch.equal(loaded[name], tensor) for name, tensor in state.items()), name


# ---- tensor parallel --------------------------------------------------------------------------


def tensor_parallel(rank: int) -> None:
    """Outputs, gradients to inputs and to all parameters, and what is sent."""
    mesh = init_device_mesh("cpu", (2,))
    padding = torch.arange(7).expand(4, 7) < torch.arange(4)[:, None]
    for name, case in BLOCKS.items():
        inputs = batch(case).requires_grad_()
        whole = built(case)
        expected = whole(inputs, padding)
        case.loss(whole, expected).backward()
        model = parallelized(case, mesh)
        again = inputs.detach().clone().requires_grad_()
        with CommDebugMode() as forward:
            output = model(again, padding)
            loss = case.loss(model, output)
        with CommDebugMode() as backward:
            loss.backward()
        assert (forward.get_total_counts(), backward.get_total_counts()) == case.sums, name
        torch.testing.assert_close(output, expected, msg=named(name))
        torch.testing.assert_close(again.grad, inputs.grad, msg=named(name))
        assert_same(gradients(model), gradients(whole), name)
        assert_same(full_state(model), whole.state_dict(), name)
        undivided = {name for name, p in model.named_parameters() if getattr(p, "placements", ()) == (Replicate(),)}
        assert {name.split(".", 1)[1] for name in undivided} == case.undivided, name


def parallelized(case: ModuleCase, mesh: DeviceMesh) -> nn.Module:
    """Processes start with tensors of their own, and take the first one's of what they divide."""
    model = built(case, seed=dist.get_rank())
    plan = tensor_parallel_plan(model)
    own = {name: tensor for name, tensor in built(case).state_dict().items() if "norm" in name or "router" in name}
    model.load_state_dict(own, strict=False)
    return parallelize_module(model, mesh, plan)


def factored_feed_forward(rank: int) -> None:
    """A pair of layers, of which the second one takes the parts that the first one gives."""
    mesh, inputs = init_device_mesh("cpu", (2,)), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    for form in ("factored", "straight_through"):
        torch.manual_seed(0)
        layers = [STFLinear(16, 40, 290, 9), nn.GELU(), STFLinear(40, 16, 8, 3, sparse_side="input")]
        whole = nn.Sequential(*(getattr(layer, form)() if layer is not layers[1] else layer for layer in layers))
        model = parallelize_module(copy.deepcopy(whole), mesh, {"0": STFParallel(), "2": STFParallel()})
        with CommDebugMode() as sent:
            output = model(inputs)
        assert sent.get_total_counts() == 1
        torch.testing.assert_close(output, whole(inputs))
        output.square().sum().backward()
        whole(inputs).square().sum().backward()
        for actual, expected in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(actual.grad), expected.grad)


def from_meta_in_parts(rank: int) -> None:
    """Tensors that are divided before they are there. On the CPU torch does not keep the generators of processes
    together where their parts are unequal."""
    mesh = init_device_mesh("cpu", (2,))
    for name, case in BLOCKS.items():
        if name == "one_key_head":
            continue
        with torch.device("meta"):
            model = case.build()
        model = parallelize_module(model, mesh, tensor_parallel_plan(model)).to_empty(device="cpu")
        torch.manual_seed(3)  # what is not divided is drawn alike
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert agree(model), name
        loss = case.loss(model, model(batch(case).float()))
        loss.backward()
        assert loss.isfinite() and torch.equal(mean_of_all(loss), loss), name


def refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for module, style, message in (
        (
            nn.Linear(4, 4),
            AttentionParallel(),
            "AttentionParallel: expected a SpanAttention or SparseAttention, got Linear",
        ),
        (
            SpanAttention(12, 3),
            AttentionParallel(),
            "number of key heads to be 1 or a multiple of that of processes = 2, got 3",
        ),
        (nn.Linear(4, 4), RoutedFFNParallel(), "RoutedFFNParallel: expected a RoutedFFN, got Linear"),
        (RoutedFFN(4, 4), RoutedFFNParallel(), "at least as many hidden units in a block as processes = 2, got 1"),
        (
            RoutedFFN(4, 16, gated=True),
            RoutedFFNParallel(),
            "expected a gated layer without bias and LoRA, got one with",
        ),
        (nn.Linear(4, 4), STFParallel(), "STFParallel: expected an STFLinear, got Linear"),
        (STFLinear(4, 4, 3, 2).pack(), STFParallel(), "expected the form factored or straight-through, got packed"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize_module(module, mesh, style)
    attention = SpanAttention(16, 4)
    attention.q_proj = nn.Identity()
    with pytest.raises(ValueError, match="expected projections to be nn.Linear or STFLinear, got Identity"):
        parallelize_module(attention, mesh, AttentionParallel())
    with pytest.raises(ValueError, match="expected a model with SpanAttention, SparseAttention or RoutedFFN, got one"):
        tensor_parallel_plan(nn.Linear(4, 4))


# ---- checkpoints ------------------------------------------------------------------------------


def folder(name: str) -> str:
    return os.path.join(os.environ[CHECKPOINTS], name)


def save(model: nn.Module, name: str) -> None:
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder(name))


def loaded(model: nn.Module, name: str) -> nn.Module:
    state = {"model": get_model_state_dict(model)}
    checkpoint.load(state, checkpoint_id=folder(name))
    set_model_state_dict(model, state["model"])
    return model


def saved(rank: int) -> None:
    for name, case in CASES.items():
        save(sharded(built(case)), name)
    for name, case in BLOCKS.items():
        save(parallelized(case, init_device_mesh("cpu", (2,))), name)


def loaded_by_one() -> None:
    for name, case in (CASES | BLOCKS).items():
        assert_same(loaded(built(case, seed=5), name).state_dict(), built(case).state_dict(), name)


def loaded_by_four(rank: int) -> None:
    for name, case in (CASES | BLOCKS).items():
        assert_same(full_state(loaded(fully_shard(built(case, seed=5)), name)), built(case).state_dict(), name)


def two_dimensions(rank: int) -> None:
    """Blocks that two processes divide, whose parameters two pairs of them share out, from a checkpoint of two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    for name, case in BLOCKS.items():
        inputs, whole = batch(case), built(case)
        loss = case.loss(whole, whole(inputs))
        loss.backward()
        model = fully_shard(parallelized(case, mesh["model"]), mesh=mesh["data"])
        loaded(model, name)
        own = case.loss(model, model(inputs.chunk(2)[mesh["data"].get_local_rank()]))
        own.backward()
        torch.testing.assert_close(mean_of_all(own), loss.detach())
        assert_same(gradients(model), gradients(whole), name)
