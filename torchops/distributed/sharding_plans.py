"""Tensor parallelism for the modules of :mod:`torchops.nn`: styles for torch's ``parallelize_module``, and plans."""

from functools import partial
from typing import Any, Dict, Mapping, Tuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils._pytree import tree_map_only

from ..nn import PQAttention, RoutedFFN, STFLinear
from ..nn._self_attention import SelfAttention
from . import sharding  # noqa: F401  the rules by which the operators compute on what is distributed here

__all__ = ["AttentionParallel", "RoutedFFNParallel", "STFParallel", "tensor_parallel_plan"]


WHOLE = Replicate()


class ModuleStyle(ParallelStyle):
    """Distributes a module's tensors, gives it DTensors and takes them from it."""

    def distribute(self, module: nn.Module, mesh: DeviceMesh, dims: Mapping[str, int]) -> None:
        """Of the module's own tensors: shards of the named ones along a dimension, all others whole."""
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            placement = Shard(dims[name]) if name in dims else WHOLE
            part = distribute_tensor(tensor.detach(), mesh, [placement], src_data_rank=self.src_data_rank)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(part, tensor.requires_grad) if is_parameter else part)

    def connect(
        self, module: nn.Module, mesh: DeviceMesh, takes: Placement = WHOLE, gives: Placement = WHOLE
    ) -> nn.Module:
        """Lets it be called by modules that know nothing of DTensors: with whole tensors, or with parts of them."""
        module.register_forward_pre_hook(partial(distributed_arguments, mesh, takes), with_kwargs=True)
        module.register_forward_hook(partial(local_output, mesh, gives))
        return module


def distributed_arguments(
    mesh: DeviceMesh, placement: Placement, module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
    def distributed(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        return DTensor.from_local(tensor, mesh, [placement], run_check=False)

    return tree_map_only(Tensor, distributed, (args, kwargs))


def local_output(
    mesh: DeviceMesh, placement: Placement, module: nn.Module, args: Tuple[Any, ...], output: DTensor
) -> Tensor:
    return output.redistribute(mesh, [placement]).to_local()


class AttentionParallel(ModuleStyle):
    """Heads of a :class:`torchops.nn.SpanAttention` or :class:`torchops.nn.SparseAttention`, as many for each process.

    Input and output are whole tensors on every process, and so are padding_mask and start. What projects to heads is
    divided by them, and what projects back by its input, after which results are added up: one all-reduce in each
    direction. One key head is used by all processes. Projections that are factored (:class:`torchops.nn.STFLinear`)
    are divided with their sparse factor on the side of the heads, and computed as a whole otherwise.

    Raises:
        ValueError: when it is applied, for another module, or a number of key heads that the processes do not divide.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SelfAttention):
            raise ValueError(
                f"AttentionParallel: expected a SpanAttention or SparseAttention, got {type(module).__name__}"
            )
        num_kv_heads = int(module.k_proj.out_features) // module.head_dim
        if num_kv_heads > 1 and num_kv_heads % device_mesh.size():
            raise ValueError(
                "AttentionParallel: expected the number of key heads to be 1 or a multiple of that of processes ="
                f" {device_mesh.size()}, got {num_kv_heads}"
            )
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            is_divided = projection is module.q_proj or num_kv_heads > 1
            self.distribute(projection, device_mesh, dims_of_projection(projection, "output") if is_divided else {})
        self.distribute(module.out_proj, device_mesh, dims_of_projection(module.out_proj, "input"))
        self.distribute(module, device_mesh, {"sink": 0})
        for child in module.modules():
            if isinstance(child, PQAttention):
                self.distribute(child, device_mesh, {})
                child.register_forward_hook(with_whole_loss)
        return self.connect(module, device_mesh)


def dims_of_projection(projection: nn.Module, side: str) -> Dict[str, int]:
    """By which dimension of its tensors a linear layer is divided along the features of its input or its output."""
    if isinstance(projection, STFLinear):
        if projection.sparse_side != side or projection.form() == "packed":
            return {}
        names = ["values", "indices", "latent"] + (["bias"] if side == "output" else [])
        return dict.fromkeys(names, 0)
    if isinstance(projection, nn.Linear):
        return {"weight": 0, "bias": 0} if side == "output" else {"weight": 1}
    raise ValueError(
        f"AttentionParallel: expected projections to be nn.Linear or STFLinear, got {type(projection).__name__}"
    )


def with_whole_loss(module: nn.Module, args: Tuple[Any, ...], output: Tensor) -> None:
    """A loss for :func:`torchops.nn.quantization_loss`, which adds it to those of other modules."""
    loss = module.quantization_loss
    if isinstance(loss, DTensor):
        module.quantization_loss = loss.full_tensor()


class RoutedFFNParallel(ModuleStyle):
    """Hidden units of every block of a :class:`torchops.nn.RoutedFFN`, a part of them for each process.

    Input and output are whole tensors on every process, each of which also has the router, and makes all choices.
    Results are added up: one all-reduce in each direction.

    Raises:
        ValueError: when it is applied, for another module, fewer units in a block than processes, or a gated layer with
            biases or LoRA, whose rows of gates and of values do not stand together.
    """

    dims = {"w1": 1, "w_gate": 1, "b1": 1, "lora_b1": 1, "w2": 2, "lora_a2": 2}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, RoutedFFN):
            raise ValueError(f"RoutedFFNParallel: expected a RoutedFFN, got {type(module).__name__}")
        units = module.w2.shape[2]
        if units < device_mesh.size():
            raise ValueError(
                "RoutedFFNParallel: expected at least as many hidden units in a block as processes ="
                f" {device_mesh.size()}, got {units}"
            )
        if module.glu == "split" and (module.b1 is not None or module.lora_b1 is not None):
            raise ValueError("RoutedFFNParallel: expected a gated layer without bias and LoRA, got one with them")
        self.distribute(module, device_mesh, self.dims)
        module.router.register_forward_pre_hook(to_local)
        module.router.register_forward_hook(partial(from_local, device_mesh))
        return self.connect(module, device_mesh)


def to_local(module: nn.Module, args: Tuple[DTensor, ...]) -> Tuple[Tensor, ...]:
    return tuple(tensor.to_local() for tensor in args)


def from_local(
    mesh: DeviceMesh, module: nn.Module, args: Tuple[Tensor, ...], outputs: Tuple[Tensor, ...]
) -> Tuple[DTensor, ...]:
    return tuple(DTensor.from_local(output, mesh, [WHOLE], run_check=False) for output in outputs)


class STFParallel(ModuleStyle):
    """Rows of the sparse factor of a :class:`torchops.nn.STFLinear`, a part of them for each process.

    With the sparse factor on the output the layer takes whole tensors and gives each process its part of the features,
    as torch's ``ColwiseParallel`` does; with it on the input it takes parts and gives whole tensors, as
    ``RowwiseParallel``. Layers that :func:`torchops.nn.factorize_` makes of a feed-forward layer are one of each.

    Raises:
        ValueError: when it is applied, for another module, or a packed one.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, STFLinear):
            raise ValueError(f"STFParallel: expected an STFLinear, got {type(module).__name__}")
        if module.form() == "packed":
            raise ValueError("STFParallel: expected the form factored or straight-through, got packed")
        self.distribute(module, device_mesh, dims_of_projection(module, module.sparse_side))
        if module.sparse_side == "output":
            return self.connect(module, device_mesh, gives=Shard(-1))
        return self.connect(module, device_mesh, takes=Shard(-1))


def tensor_parallel_plan(model: nn.Module) -> Dict[str, ParallelStyle]:
    """A plan for ``torch.distributed.tensor.parallel.parallelize_module``: how to divide a model's attention modules
    and routed feed-forward layers among processes.

    Other modules are left as they are, and computed by every process; add styles for them to what is returned, torch's
    for pairs of ``nn.Linear`` and :class:`STFParallel` for pairs of factored ones.

    Args:
        model: with :class:`torchops.nn.SpanAttention`, :class:`torchops.nn.SparseAttention` or
            :class:`torchops.nn.RoutedFFN`.

    Returns:
        The names of these modules, each with its style.

    Raises:
        ValueError: there is no such module.

    >>> import torchops.distributed
    >>> block = nn.ModuleDict({"attention": torchops.nn.SpanAttention(64, 4), "ffn": torchops.nn.RoutedFFN(64, 256)})
    >>> {name: type(style).__name__ for name, style in torchops.distributed.tensor_parallel_plan(block).items()}
    {'attention': 'AttentionParallel', 'ffn': 'RoutedFFNParallel'}
    """
    plan: Dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            plan[name] = AttentionParallel()
        elif isinstance(module, RoutedFFN):
            plan[name] = RoutedFFNParallel()
    if not plan:
        raise ValueError(
            "tensor_parallel_plan: expected a model with SpanAttention, SparseAttention or RoutedFFN, got one without"
        )
    return plan
