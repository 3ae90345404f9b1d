"""Models with converted attention in transformers' files.

What a conversion was asked for is in the model's config, and so is the name of the implementation that reads it. But
``from_pretrained`` takes that name out, and where it was missing a model that is saved again would load as one with
full attention. So a converted model says that it is "quantized", by a method whose quantizer puts the name back, and
makes room for tensors that the conversion has added.
"""

from typing import Any, Callable, Dict

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "torchops_attention"

# The implementation that reads such arguments of a config, and where it is.
IMPLEMENTATIONS = {"span_attention": "span_attention", "pq_attention": "sparse_attention"}
MODULES = {
    "span_attention": "torchops.integrations.transformers",
    "pq_attention": "torchops.integrations.transformers_sparse_attention",
}
# What prepares a model for its tensors, of modules that have been imported.
prepare: Dict[str, Callable[[Any], None]] = {}


def converted(config: Any) -> Dict[str, Any]:
    """The arguments of conversions."""
    return {name: getattr(config, name) for name in IMPLEMENTATIONS if getattr(config, name, None) is not None}


def remember(config: Any, *others: Any) -> None:
    """In the file of a config with arguments this names what loads it, and loading takes it out. Others are configs of
    the whole that this one is a part of."""
    for name in converted(config):
        for part in (config, *others):
            part.attn_implementation = IMPLEMENTATIONS[name]


def keep(model: Any, **arguments: Any) -> None:
    """Writes the arguments of a conversion into a model's config, or takes them out where there are none."""
    whole, config = model.config, model.config.get_text_config()
    ours = getattr(getattr(whole, "quantization_config", None), "quant_method", METHOD) == METHOD
    for part in (whole, config):
        for name in (*IMPLEMENTATIONS, "attn_implementation"):
            vars(part).pop(name, None)
    for name, value in arguments.items():
        setattr(config, name, value)
    remember(config, whole)
    if ours and arguments:
        whole.quantization_config = ConvertedAttention()
        model.hf_quantizer = ConvertedAttentionQuantizer(whole.quantization_config)
    elif ours:
        vars(whole).pop("quantization_config", None)
        model.hf_quantizer = None


@register_quantization_config(METHOD)
class ConvertedAttention(QuantizationConfigMixin):
    def __init__(self, quant_method: str = METHOD) -> None:
        self.quant_method: Any = quant_method


@register_quantizer(METHOD)
class ConvertedAttentionQuantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = model.config.get_text_config()
        for name in converted(config):
            if name not in prepare:
                raise ImportError(f"{IMPLEMENTATIONS[name]}: import {MODULES[name]} to load this model")
            prepare[name](model)
        remember(config, model.config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Unlike quantized models, it can be cast and trained.
        model.is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
