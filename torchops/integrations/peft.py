"""LoRA adapters of peft on factored linear layers (:class:`torchops.nn.STFLinear`)."""

from functools import wraps
from typing import Any, Dict, List, Optional, Tuple

from torch import nn

from ..nn.stf import STFLinear
from ._requirements import imports_of

with imports_of(__name__, "peft", "0.21"):
    from peft import LoraConfig, TaskType
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

__all__ = ["LoraSTFLinear", "linear_names", "register_stf_linear"]


class LoraSTFLinear(Linear):
    """An :class:`STFLinear` with plain LoRA adapters beside it, which peft makes of a layer it adapts.

    The sum of factors and an adapter is no product of a basis and a sparse factor of the same sizes, so merging
    raises an error, before any layer of the model is merged, as do the variants of LoRA that look at the weight (DoRA
    and others).

    Raises:
        ValueError: the layer is packed, and gradients do not pass through it.
    """

    def __init__(self, base_layer: STFLinear, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
            raise ValueError(
                "LoraSTFLinear: expected init_lora_weights to be True, False or 'gaussian', for a factored layer has no"
                f" weight of its own, got {config.init_lora_weights!r}"
            )
        # Another adapter may stand around the layer already.
        factored = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if factored.form() == "packed" and not config.inference_mode:
            raise ValueError(
                "LoraSTFLinear: expected a layer that gradients pass through, got a packed one: call its factored()"
                " first"
            )
        super().__init__(base_layer, adapter_name, config, **options)

    def _get_in_out_features(self, module: nn.Module) -> Tuple[int, int]:
        assert isinstance(module, STFLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> Dict[Tuple[str, ...], None]:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: Optional[List[str]] = None) -> None:
        raise ValueError(
            "LoraSTFLinear: an adapter cannot be merged into the factors of an STFLinear: keep it beside the layer, or"
            " take it off with unload()"
        )


_check_merge_allowed = BaseTuner._check_merge_allowed


@wraps(_check_merge_allowed)
def _check_layers_before_merging(self: BaseTuner) -> None:
    """Refuses before peft merges the first of several layers: it would stop at a factored one, half merged."""
    _check_merge_allowed(self)
    names = [name for name, module in self.model.named_modules() if isinstance(module, LoraSTFLinear)]
    if names:
        raise ValueError(
            "LoraSTFLinear: an adapter cannot be merged into the factors of an STFLinear: keep it beside the layer, or"
            f" take it off with unload(); nothing was merged, for {', '.join(names)} cannot be"
        )


BaseTuner._check_merge_allowed = _check_layers_before_merging  # type: ignore[method-assign]


def linear_names(model: nn.Module, task_type: Optional[str] = None) -> List[str]:
    """The names of a model's linear layers, factored ones among them, for a configuration's ``target_modules``.

    ``target_modules="all-linear"`` passes over factored layers, since peft looks for classes that it knows. These are
    the names it finds in the model before it was factored: without the layer of a language model that gives its logits
    and, for ``task_type="SEQ_CLS"``, without the head of a classifier. So the one stands for the other::

        config = LoraConfig(target_modules=linear_names(model), modules_to_save=[...])
        model = get_peft_model(model, register_stf_linear(config))

    Args:
        model: that the adapters are for. Layers that have an adapter already count, and what is in them does not.
        task_type: of the configuration.

    >>> from torchops.integrations.peft import linear_names
    >>> linear_names(nn.Sequential(torchops.nn.STFLinear(8, 20, 6, 3), nn.ReLU(), nn.Linear(20, 8)))
    ['0', '2']
    """
    head = None
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
        if head is None and task_type == TaskType.SEQ_CLS:
            head = next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    names: List[str] = []
    left_out: Tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(left_out):
            continue
        if module is head or isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            left_out += (f"{name}.",)
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if module is not head and isinstance(layer, (nn.Linear, Conv1D, STFLinear)):
            names.append(name)
    return names


def register_stf_linear(config: LoraConfig) -> LoraConfig:
    """Tells a LoRA configuration how factored layers are adapted, and returns it.

    peft does not save that: register again when an adapter is loaded::

        config = register_stf_linear(LoraConfig.from_pretrained(folder))
        model = PeftModel.from_pretrained(model, folder, config=config)

    Only the adapters train. Factor the model first (:func:`torchops.nn.factorize_`), and leave its layers
    factored: gradients do not pass through packed ones.
    """
    config._register_custom_module({STFLinear: LoraSTFLinear})
    return config
