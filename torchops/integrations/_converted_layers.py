"""Models with converted layers in transformers' files: the configuration has what it takes to build each of them."""

from typing import Any, Callable, Dict, Mapping, Optional, Type, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._attention_files import METHOD as ATTENTION
from ._attention_files import ConvertedAttentionQuantizer

Model = TypeVar("Model", bound=PreTrainedModel)
Layers = Dict[str, Dict[str, Any]]


class ConvertedLayersConfig(QuantizationConfigMixin):
    """How the layers of a model are to be converted, or were: ``layers`` has a description of each, by its name."""

    def __init__(self, quant_method: str, layers: Optional[Layers]) -> None:
        self.quant_method: Any = quant_method
        self.layers = layers


class ConvertedLayersQuantizer(ConvertedAttentionQuantizer):
    """Builds converted layers before ``from_pretrained`` loads their tensors, or converts what it has loaded. Attention
    may be converted, too."""

    quantization_config: Any

    def build(self, model: PreTrainedModel, layers: Layers) -> None:
        raise NotImplementedError

    def convert(self, model: PreTrainedModel) -> None:
        raise NotImplementedError

    @staticmethod
    def layers_of(model: nn.Module) -> Layers:
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.pre_quantized:
            self.build(model, in_this_model(model, self.quantization_config.layers or {}))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self.convert(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        """Layers may have changed since."""
        self.quantization_config.layers = self.layers_of(model)
        config: Any = model.config
        config.quantization_config = self.quantization_config
        return super().get_state_dict_and_metadata(model)


def in_this_model(model: PreTrainedModel, layers: Mapping[str, Dict[str, Any]]) -> Layers:
    """Descriptions by the names that layers have in this model, which may be saved with a head and loaded without, or
    the other way round. Layers of a head that is not there are left out, as their tensors are."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, description in layers.items():
        here = next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in names), None)
        if here is not None:
            found[here] = description
    return found


def keep_layers(
    model: Model,
    function: str,
    converted: str,
    config: Callable[..., ConvertedLayersConfig],
    quantizer: Type[ConvertedLayersQuantizer],
) -> Model:
    """Lets a model be saved with descriptions of its converted layers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{function}: expected model to be one of transformers, got a {type(model).__name__}")
    layers = quantizer.layers_of(model)
    if not layers:
        raise ValueError(f"{function}: expected a model with {converted} layers, got {type(model).__name__} with none")
    ours = config(layers=layers)
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", ours.quant_method)
    if method not in (ours.quant_method, ATTENTION):
        raise ValueError(
            f"{function}: expected a model whose configuration has room for {converted} layers, got one with those of"
            f" {getattr(method, 'value', method)}"
        )
    model.config.quantization_config = ours
    setattr(model, "hf_quantizer", quantizer(ours))  # noqa: B010
    return model
