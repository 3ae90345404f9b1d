"""Factored models (:func:`torchops.nn.factorize_`) in transformers' ``save_pretrained`` and ``from_pretrained``.

Importing this module is what ``from_pretrained`` needs to find factored layers.
"""

from typing import Any, Dict, List, Optional, Sequence, TypeVar

from torch import nn

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("torchops.integrations.transformers_stf needs transformers: pip install transformers") from error

from ..nn.stf import STFLinear
from ..nn.stf_conversion import factorize_
from ..nn.stf_restoration import FactoredLayer, place_
from ..nn.stf_sizes import Sizes

__all__ = ["STFConfig", "STFQuantizer", "keep_factored"]

METHOD = "torchops_stf"
Model = TypeVar("Model", bound=PreTrainedModel)


@register_quantization_config(METHOD)
class STFConfig(QuantizationConfigMixin):
    """How the linear layers of a model are factored, or were.

    Args:
        compression, skip: of :func:`torchops.nn.factorize_`, for a model with dense weights.
        layers: the sizes of each factored layer, by its name. ``save_pretrained`` writes them.

    >>> from transformers import AutoModel
    >>> from torchops.integrations.transformers_stf import STFConfig
    >>> model = AutoModel.from_pretrained(folder, quantization_config=STFConfig(compression=2.0))  # doctest: +SKIP
    """

    def __init__(
        self,
        compression: float = 2.0,
        skip: Sequence[str] = (),
        layers: Optional[Dict[str, Dict[str, Any]]] = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method: Any = quant_method
        self.compression = compression
        self.skip: List[str] = list(skip)
        self.layers = layers


@register_quantizer(METHOD)
class STFQuantizer(HfQuantizer):
    """Builds factored layers before ``from_pretrained`` loads their tensors, or factors what it has loaded."""

    quantization_config: STFConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            layers = {}
            for name, described in (self.quantization_config.layers or {}).items():
                sizes = {**described}
                form, bias = sizes.pop("form"), sizes.pop("bias")
                layers[name] = FactoredLayer(Sizes(**sizes), form, bias)
            place_(model, layers)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            config = self.quantization_config
            factorize_(model, config.compression, config.skip, verbose=False)
        for module in model.modules():
            if isinstance(module, STFLinear):
                module.loaded()
        # Unlike quantized layers, factored ones can be cast and trained.
        setattr(model, "is_quantized", False)  # noqa: B010
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        """Layers may have taken another form since."""
        self.quantization_config.layers = factored_layers(model)
        config: Any = model.config
        config.quantization_config = self.quantization_config
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def factored_layers(model: nn.Module) -> Dict[str, Dict[str, Any]]:
    layers = {name: FactoredLayer.of(module) for name, module in model.named_modules() if isinstance(module, STFLinear)}
    return {name: {**of.sizes._asdict(), "form": of.form, "bias": of.bias} for name, of in layers.items()}


def keep_factored(model: Model) -> Model:
    """Lets ``save_pretrained`` write in the model's configuration which layers are factored, so that
    ``from_pretrained`` builds them again, in the form in which they were saved.

    Whoever loads such a model imports this module first. A model that was loaded so needs no further call.

    Args:
        model: one in which :func:`torchops.nn.factorize_` has been. Its layers can take other forms afterwards.

    Returns:
        model.

    Raises:
        TypeError: not a model of transformers.
        ValueError: no factored layers in it.

    >>> from tempfile import mkdtemp
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers_stf import keep_factored
    >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    >>> model = LlamaModel(LlamaConfig(**size)).eval()
    >>> report = torchops.nn.factorize_(model, compression=1.5, verbose=False)
    >>> folder = mkdtemp()
    >>> keep_factored(model).save_pretrained(folder)
    >>> tokens = torch.arange(10)[None]
    >>> again = LlamaModel.from_pretrained(folder)
    >>> torch.equal(again(tokens).last_hidden_state, model(tokens).last_hidden_state)
    True
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"keep_factored: expected model to be one of transformers, got a {type(model).__name__}")
    layers = factored_layers(model)
    if not layers:
        raise ValueError(f"keep_factored: expected a model with factored layers, got {type(model).__name__} with none")
    model.config.quantization_config = STFConfig(layers=layers)
    setattr(model, "hf_quantizer", STFQuantizer(model.config.quantization_config))  # noqa: B010
    return model
