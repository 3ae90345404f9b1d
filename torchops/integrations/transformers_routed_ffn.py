"""Models with routed feed-forward layers (:func:`torchops.nn.route_ffn_`) in transformers' ``save_pretrained`` and
``from_pretrained``.

Importing this module is what ``from_pretrained`` needs to find routed layers.
"""

from typing import Any, List, Optional, Sequence, TypeVar

from torch import nn

from ..nn.routed_ffn import RoutedFFN
from ..nn.routed_ffn_conversion import route_ffn_
from ..nn.routed_ffn_restoration import described, place_routed_
from ._requirements import imports_of

with imports_of(__name__, "transformers", "5.23"):
    from transformers import PreTrainedModel
    from transformers.quantizers import register_quantization_config, register_quantizer

    from ._converted_layers import ConvertedLayersConfig, ConvertedLayersQuantizer, Layers, keep_layers

__all__ = ["RoutedFFNConfig", "RoutedFFNQuantizer", "keep_routed"]

METHOD = "torchops_routed_ffn"
Model = TypeVar("Model", bound=PreTrainedModel)


@register_quantization_config(METHOD)
class RoutedFFNConfig(ConvertedLayersConfig):
    """How the feed-forward layers of a model are routed, or were.

    Args:
        num_blocks, top_k, skip, lora_rank: of :func:`torchops.nn.route_ffn_`, for a model with dense layers.
        layers: what it takes to build each routed layer, by its name. ``save_pretrained`` writes it.

    >>> from transformers import AutoModel
    >>> from torchops.integrations.transformers_routed_ffn import RoutedFFNConfig
    >>> model = AutoModel.from_pretrained(folder, quantization_config=RoutedFFNConfig(8, top_k=2))  # doctest: +SKIP
    """

    def __init__(
        self,
        num_blocks: int = 4,
        top_k: int = 2,
        skip: Sequence[str] = (),
        lora_rank: int = 0,
        layers: Optional[Layers] = None,
        quant_method: str = METHOD,
    ) -> None:
        super().__init__(quant_method, layers)
        self.num_blocks = num_blocks
        self.top_k = top_k
        self.skip: List[str] = list(skip)
        self.lora_rank = lora_rank


@register_quantizer(METHOD)
class RoutedFFNQuantizer(ConvertedLayersQuantizer):
    """Builds routed layers before ``from_pretrained`` loads their tensors, or routes what it has loaded."""

    quantization_config: RoutedFFNConfig

    def build(self, model: PreTrainedModel, layers: Layers) -> None:
        place_routed_(model, layers)
        for name in layers:
            # Nothing of it is missing in the file, and its class would draw weights of linear layers.
            setattr(model.get_submodule(name.rpartition(".")[0]), "_is_hf_initialized", True)  # noqa: B010

    def convert(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        route_ffn_(model, config.num_blocks, config.top_k, config.skip, lora_rank=config.lora_rank, verbose=False)

    @staticmethod
    def layers_of(model: nn.Module) -> Layers:
        return {name: described(module) for name, module in model.named_modules() if isinstance(module, RoutedFFN)}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        super()._process_model_after_weight_loading(model, **kwargs)
        for module in model.modules():
            if isinstance(module, RoutedFFN):
                module.freeze_beside_lora()
        return model


def keep_routed(model: Model) -> Model:
    """Lets ``save_pretrained`` write in the model's configuration which layers are routed and how, so that
    ``from_pretrained`` builds them again.

    Import this module before you load such a model. A model that was loaded in this way needs no further call.
    Attention may be converted, too, before or afterwards (``apply_sparse_attention``, ``apply_span_attention``).

    Args:
        model: one that :func:`torchops.nn.route_ffn_` has converted. ``top_k`` of its routers and the like can change
            afterwards.

    Returns:
        model.

    Raises:
        TypeError: not a model of transformers.
        ValueError: no routed layers in it, one with a router of another class than :class:`torchops.nn.Router`, or a
            configuration with another quantization, that of factored layers included.

    >>> from tempfile import mkdtemp
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from torchops.integrations.transformers_routed_ffn import keep_routed
    >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    >>> model = LlamaModel(LlamaConfig(**size)).eval()
    >>> report = torchops.nn.route_ffn_(model, num_blocks=4, top_k=2, verbose=False)
    >>> folder = mkdtemp()
    >>> keep_routed(model).save_pretrained(folder)
    >>> tokens = torch.arange(10)[None]
    >>> again = LlamaModel.from_pretrained(folder)
    >>> torch.equal(again(tokens).last_hidden_state, model(tokens).last_hidden_state)
    True
    """
    return keep_layers(model, "keep_routed", "routed", RoutedFFNConfig, RoutedFFNQuantizer)
