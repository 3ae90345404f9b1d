"""Factored models (:func:`torchops.nn.factorize_`) in transformers' ``save_pretrained`` and ``from_pretrained``.

Importing this module is what ``from_pretrained`` needs to find factored layers.
"""

from typing import Any, List, Optional, Sequence, TypeVar

from torch import nn

from ..nn.stf import STFLinear
from ..nn.stf_conversion import factorize_
from ..nn.stf_restoration import FactoredLayer, place_
from ..nn.stf_sizes import Sizes
from ._requirements import imports_of

with imports_of(__name__, "transformers", "5.23"):
    from transformers import PreTrainedModel
    from transformers.quantizers import register_quantization_config, register_quantizer

    from ._converted_layers import ConvertedLayersConfig, ConvertedLayersQuantizer, Layers, keep_layers

__all__ = ["STFConfig", "STFQuantizer", "keep_factored"]

METHOD = "torchops_stf"
Model = TypeVar("Model", bound=PreTrainedModel)


@register_quantization_config(METHOD)
class STFConfig(ConvertedLayersConfig):
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
        layers: Optional[Layers] = None,
        quant_method: str = METHOD,
    ) -> None:
        super().__init__(quant_method, layers)
        self.compression = compression
        self.skip: List[str] = list(skip)


@register_quantizer(METHOD)
class STFQuantizer(ConvertedLayersQuantizer):
    """Builds factored layers before ``from_pretrained`` loads their tensors, or factors what it has loaded."""

    quantization_config: STFConfig

    def build(self, model: PreTrainedModel, layers: Layers) -> None:
        place_(model, {name: factored_layer(**description) for name, description in layers.items()})

    def convert(self, model: PreTrainedModel) -> None:
        factorize_(model, self.quantization_config.compression, self.quantization_config.skip, verbose=False)

    @staticmethod
    def layers_of(model: nn.Module) -> Layers:
        """In the forms that they have now."""
        layers = {
            name: FactoredLayer.of(module) for name, module in model.named_modules() if isinstance(module, STFLinear)
        }
        return {name: {**of.sizes._asdict(), "form": of.form, "bias": of.bias} for name, of in layers.items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        super()._process_model_after_weight_loading(model, **kwargs)
        for module in model.modules():
            if isinstance(module, STFLinear):
                module.loaded()
        return model


def factored_layer(form: str, bias: bool, **sizes: Any) -> FactoredLayer:
    return FactoredLayer(Sizes(**sizes), form, bias)


def keep_factored(model: Model) -> Model:
    """Lets ``save_pretrained`` write in the model's configuration which layers are factored, so that
    ``from_pretrained`` builds them again, in the form in which they were saved.

    Import this module before you load such a model. A model that was loaded in this way needs no further call.

    Args:
        model: one that :func:`torchops.nn.factorize_` has converted. Its layers can take other forms afterwards.

    Returns:
        model.

    Raises:
        TypeError: not a model of transformers.
        ValueError: no factored layers in it, or the configuration has another quantization.

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
    return keep_layers(model, "keep_factored", "factored", STFConfig, STFQuantizer)
