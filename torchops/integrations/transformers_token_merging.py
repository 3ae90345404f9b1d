"""Token merging (ToMe) in the image encoders of transformers.

The classes of a model's layers are switched to the ones here and back again; modules, parameters and the state dict
stay as they are. Between two layers there are as many tokens as ever, each with the value of the token it was merged
into: hidden states, outputs and whatever a model makes of them need no care. Inside of a layer each merged token is
there once. Which ones belong together travels with the tokens, see ``_token_merging.py``.
"""

import functools
import inspect
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeVar, Union

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..nn.tokens import TokenMerger, proportional_attention_bias
from ..ops.span_attention import span_attention
from ..ops.tokens import unmerge_tokens
from ._requirements import imports_of
from ._token_merging import Merged, full_name, marked, parse_r, set_merged, switch_class

with imports_of(__name__, "transformers", "5.23"):
    from ._attention_interface import NOT_OFFERED, AttentionInterface, PreTrainedModel, not_offered, records_attentions
    from ._attention_layers import own_mask, takes_implementations
    from ._layer_halves import halves

__all__ = ["apply_token_merging", "remove_token_merging"]

Model = TypeVar("Model", bound=PreTrainedModel)

IMPLEMENTATION = "token_merging"
# Parameters that an image encoder puts before its patches.
PREFIX_TOKENS = {"class_embedding", "cls_token", "distillation_token", "register_tokens"}


def apply_token_merging(
    model: Model, r: Union[int, List[int], Tuple[int, float]], *, proportional_attention: bool = True
) -> Model:
    """Makes each layer of an image encoder of transformers remove tokens, by merging the most similar ones between
    attention and MLP (ToMe). Works with pretrained weights as they are, and in training.

    Tokens are compared by their attention keys averaged over heads, and averaged weighted by size, the number of
    patches they stand for. Class, distillation and register tokens never merge. Only inside of the layers are there
    fewer tokens: what a layer returns has a row for every patch, that of the token it was merged into. So
    ``hidden_states``, ``last_hidden_state``, feature maps and pooled outputs have the shapes they had, and every
    patch is in its place where a language model takes the hidden states of some layer (LLaVA).

    Args:
        model: a model of transformers with one image encoder (ViT, DeiT, CLIP, SigLIP, DINOv2 with and without
            registers, and others), by itself or with a head, a text encoder or a language model (CLIP, LLaVA);
            changed in place. Apply before wrapping it (torch.compile, DDP, FSDP).
        r: how many tokens each layer removes: one number, a list with a number per layer, or a tuple
            (r, inflection) for :func:`torchops.nn.merge_schedule`. Half of the unprotected tokens is the most a
            layer removes. Layers before the first that removes any stay as they are; 0 in every layer is
            :func:`remove_token_merging`. Call again to change r.
        proportional_attention: add log(size) to the attention scores of each key. Meant for weights trained without
            merging; models trained with merging, and MAE's, do without.

    Returns:
        model.

    Raises:
        TypeError: a model without an image encoder or with several, one whose layers cannot be cut between attention
            and MLP, are given positions or biases besides the tokens, or whose tokens are not known to stand before
            the patches; or an r of another type. The model is then as it was.
        ValueError: a negative number in r, or a list of another length than the encoder has layers; in the forward
            pass, an ``attention_mask``, ``output_attentions``, or an attention implementation but those of
            transformers.
        RuntimeError: in the forward pass, tokens that are not the previous layer's output, for example replaced by
            a hook: what they stand for is unknown.
        ImportError: on import, when transformers is not installed.

    Layers with merging compute attention by :func:`torchops.span_attention`, whichever of transformers' implementations
    the model has (``"sdpa"``, ``"eager"``, flash or flex attention). Gradient checkpointing, deepcopy, pickling,
    torch.compile and torch.export work. ``save_pretrained`` writes the model that it was: apply again behind
    ``from_pretrained``.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.

    >>> from transformers import ViTConfig, ViTModel
    >>> from torchops.integrations.transformers_token_merging import apply_token_merging
    >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3)
    >>> model = apply_token_merging(ViTModel(ViTConfig(**size)), r=16)
    >>> _ = model.layers[2].mlp.register_forward_hook(lambda mlp, args, output: print(output.shape))
    >>> model(torch.randn(1, 3, 224, 224)).last_hidden_state.shape
    torch.Size([1, 149, 32])
    torch.Size([1, 197, 32])
    """
    encoder = checked_encoder(model)
    r_per_layer = parse_r(r, len(encoder.layers))
    remove_token_merging(model)
    if not any(r_per_layer):
        return model
    AttentionInterface.register(IMPLEMENTATION, token_merging_attention)
    for part in parts_with_images(encoder.tower):
        part.register_forward_pre_hook(refuse_mask, with_kwargs=True)
    layer: Any
    for index, layer in enumerate(encoder.layers):
        if not any(r_per_layer[: index + 1]):
            continue
        attention = attention_of(layer)
        switch_class(layer, merging_class(layer.__class__, attention_part(layer)))
        layer.attention_config = attention.config
        attention.config = MergingConfig(attention.config)
        layer.token_merger = TokenMerger(r_per_layer[index], encoder.num_prefix_tokens)
        layer.follows_merging = any(r_per_layer[:index])
        layer.proportional_attention = proportional_attention
    return model


def remove_token_merging(model: Model) -> Model:
    """Undoes :func:`apply_token_merging`: the model has its own classes again and nothing besides. A model without
    token merging is left as it is.

    Args:
        model: changed in place.

    Returns:
        model.

    >>> from transformers import ViTConfig, ViTModel
    >>> from torchops.integrations.transformers_token_merging import apply_token_merging, remove_token_merging
    >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3)
    >>> model = apply_token_merging(ViTModel(ViTConfig(**size)), r=16)
    >>> type(remove_token_merging(model).layers[0])
    <class 'transformers.models.vit.modeling_vit.ViTLayer'>
    """
    for module in list(model.modules()):
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is refuse_mask]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        if isinstance(module, TokenMergingLayer):
            attention_of(module).config = module.attention_config
            switch_class(module, original_class(module))
            del module.token_merger, module.follows_merging, module.proportional_attention, module.attention_config
    return model


# ---- which layers -----------------------------------------------------------------------------------

SUPPORTED = (
    "Supported are image encoders of transformers whose layers add attention and then an MLP to their tokens, and see "
    "no positions: ViT, DeiT, CLIP, SigLIP, DINOv2 and others"
)


class Encoder(NamedTuple):
    tower: PreTrainedModel
    layers: nn.ModuleList
    num_prefix_tokens: int


def checked_encoder(model: nn.Module) -> Encoder:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"token merging: model is a {full_name(type(model))}. {SUPPORTED}")
    found = [
        (f"{type(tower).__name__}.{name}", tower, stack)
        for tower in image_encoders(model)
        for name, stack in tower.named_modules()
        if isinstance(stack, nn.ModuleList) and any(attention_of(layer) for layer in stack)
    ]
    if len(found) != 1:
        where = f"several lists of layers, {', '.join(name for name, *_ in found)}" if found else "none"
        raise TypeError(
            f"token merging: expected a model with one image encoder, {type(model).__name__} has {where}. {SUPPORTED}"
        )
    name, tower, layers = found[0]
    for index, layer in enumerate(layers):
        reason = refusal(layer)
        if reason:
            raise TypeError(
                f"token merging: layer {index} of {name}, a {full_name(original_class(layer))}, {reason}. {SUPPORTED}"
            )
    return Encoder(tower, layers, num_prefix_tokens(tower))


def image_encoders(part: nn.Module) -> List[PreTrainedModel]:
    """The outermost parts that see images and nothing else."""
    if isinstance(part, PreTrainedModel) and part.input_modalities in ("image", ("image",)):
        return [part]
    return [found for child in part.children() for found in image_encoders(child)]


def attention_of(layer: nn.Module) -> Any:
    """The one part of a layer that calls an attention implementation, if there is one."""
    found = [module for module in layer.modules() if takes_implementations(type(module))]
    return found[0] if len(found) == 1 else None


def original_class(layer: nn.Module) -> Any:
    return layer.original_class if isinstance(layer, TokenMergingLayer) else type(layer)


def refusal(layer: nn.Module) -> Optional[str]:
    """Why tokens cannot merge in a layer, as the end of a sentence that begins with it."""
    attention = attention_of(layer)
    if attention is None:
        return "does not call one attention implementation from outside"
    for module in layer.modules():
        if "forward" in vars(module):
            return f"has a forward of its own, set on the module ({type(module).__name__})"
        if isinstance(module, (nn.modules.conv._ConvNd, nn.MultiheadAttention)):
            return f"mixes tokens by a {type(module).__name__}"
    kind: Any = type(attention)
    reason = own_mask(kind) or not_offered(attention)
    if reason:
        return f"has attention that {reason}"
    if getattr(attention, "is_causal", False):
        return "is causal"
    cut = halves(original_class(layer), attention_part(layer))
    return cut if isinstance(cut, str) else None


def attention_part(layer: nn.Module) -> str:
    """The name of the part of a layer that is its attention, or has it."""
    attention = attention_of(layer)
    return next(name for name, part in layer.named_children() if any(module is attention for module in part.modules()))


def num_prefix_tokens(tower: PreTrainedModel) -> int:
    """How many tokens stand before the patches: parameters of the module that embeds the patches."""
    try:
        patches = tower.get_input_embeddings()
        embeddings = next(module for module in tower.modules() if patches in module.children())
    except (NotImplementedError, StopIteration):
        raise TypeError(
            f"token merging: {type(tower).__name__} does not say which part of it embeds the patches. {SUPPORTED}"
        ) from None
    count = 0
    for name, parameter in embeddings.named_parameters(recurse=False):
        if name in PREFIX_TOKENS:
            count += parameter.numel() // parameter.shape[-1]
        elif "token" in name and name != "mask_token":
            raise TypeError(
                f"token merging: {type(tower).__name__} has {name}, which are not known to stand before the patches. "
                f"{SUPPORTED}"
            )
    return count


def parts_with_images(tower: PreTrainedModel) -> Iterator[nn.Module]:
    for module in tower.modules():
        if isinstance(module, PreTrainedModel) and "pixel_values" in inspect.signature(module.forward).parameters:
            yield module


# ---- a layer ----------------------------------------------------------------------------------------

# The implementations, beside flash attention, that compute what span_attention does.
REPLACED = ("eager", "flex_attention", "sdpa")
WITHOUT_MASK = (
    "token merging: attention_mask cannot be followed where tokens are merged; call remove_token_merging(model) before "
    "passes with a mask"
)


def refuse_mask(module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
    """Forward pre-hook: a program that is exported makes masks where there are none, and layers cannot tell."""
    if kwargs.get("attention_mask") is not None:
        raise ValueError(WITHOUT_MASK)


class MergingConfig:
    """The configuration of an attention layer, in which another implementation is named."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # asked for before it is there, by copies and pickles
            raise AttributeError(name)
        return getattr(self.config, name)


class AttentionCall:
    """What a layer hands to its attention in place of a mask, and finds its keys in."""

    def __init__(self, key_bias: Optional[Tensor]) -> None:
        self.key_bias = key_bias  # [B, M]
        self.key: Any = None  # [B, H, M, D]


def token_merging_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    **kwargs: Any,
) -> Tuple[Tensor, None]:
    """query, key and value [B, H, M, D] -> [B, M, H, D]."""
    if not isinstance(attention_mask, AttentionCall):
        raise RuntimeError("token merging: the attention of a layer with merging cannot be called by itself")
    asked = [what for name, what in {**NOT_OFFERED, "s_aux": "sinks"}.items() if kwargs.get(name)]
    if is_causal:
        asked.append("causal attention")
    if asked:
        raise ValueError(f"token merging: no {asked[0]} where tokens are merged")
    attention_mask.key = key
    bias = attention_mask.key_bias
    if dropout > 0:  # span_attention has none
        mask = None if bias is None else bias[:, None, None].to(query.dtype)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        output = span_attention(query, key, value, scale=scaling, key_bias=bias)
    return output.transpose(1, 2).contiguous(), None


class TokenMergingLayer(nn.Module):
    """What :func:`merging_class` puts before a class of layers. From tokens [B, N, C] of which those that are merged
    have equal rows to such tokens."""

    if TYPE_CHECKING:
        original_class: type
        attention_half: Any
        mlp_half: Any
        token_merger: TokenMerger
        follows_merging: bool  # whether a layer before removes tokens
        proportional_attention: bool
        attention_config: Any  # of the attention, which has a MergingConfig in its place

    def forward(self, hidden_states: Tensor, attention_mask: Optional[Tensor] = None, **kwargs: Any) -> Tensor:
        implementation = self.attention_config._attn_implementation
        if implementation not in REPLACED and not implementation.startswith("flash_attention"):
            raise ValueError(
                f"token merging: attention cannot be {implementation}'s where tokens are merged; call "
                'model.set_attn_implementation("sdpa") or remove_token_merging(model)'
            )
        if attention_mask is not None and not torch.compiler.is_exporting():
            raise ValueError(WITHOUT_MASK)
        if kwargs.get("output_attentions") or records_attentions():
            raise ValueError("token merging: no output_attentions where tokens are merged")
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                raise ValueError(f"token merging: {name} cannot be followed where tokens are merged")
        size, assign, tokens = None, None, hidden_states
        if self.follows_merging:
            size, assign = self.merged_before(hidden_states)
            tokens = unmerge_tokens(hidden_states, first_members(assign, size.shape[1]))

        bias = None if size is None or not self.proportional_attention else proportional_attention_bias(size)
        call = AttentionCall(bias)
        tokens = self.attention_half(tokens, call, **kwargs)
        if self.token_merger.r > 0:
            tokens, size, merged_assign = self.token_merger(tokens, call.key.detach().mean(1), size)
            assign = merged_assign if assign is None else merged_assign.gather(1, assign)
        tokens = self.mlp_half(tokens)

        assert size is not None and assign is not None
        output = unmerge_tokens(tokens, assign)
        set_merged(output, Merged(size, assign))
        return output

    def merged_before(self, hidden_states: Tensor) -> Merged:
        merged = marked(hidden_states)
        if merged is None or hidden_states.shape[:2] != merged.assign.shape:
            raise RuntimeError(
                f"token merging: the tokens {hidden_states.shape} that enter this layer are not what the layer before "
                "it returned (replaced by a hook, moved, or the layer was called by itself), so how many patches each "
                "of them stands for is unknown"
            )
        return merged

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        # The class is made at run time: copies and pickles name the original.
        made_from: Any = super().__reduce_ex__(protocol)
        return new_merging_layer, (self.original_class, attention_part(self)), *made_from[2:]


@functools.cache
def merging_class(cls: Any, attention: str) -> Any:
    cut: Any = halves(cls, attention)
    members = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "original_class": cls,
        "attention_half": cut.attention,
        "mlp_half": cut.mlp,
    }
    # By its name a class of layers is found where models are sharded.
    return type(cls.__name__, (TokenMergingLayer, cls), members)


def new_merging_layer(cls: Any, attention: str) -> Any:
    merging = merging_class(cls, attention)
    return merging.__new__(merging)


def first_members(assign: Tensor, num_groups: int) -> Tensor:
    """The position [B, M] of the first token of each group."""
    positions = torch.arange(assign.shape[1], device=assign.device).expand_as(assign)
    none = assign.new_full((assign.shape[0], num_groups), assign.shape[1])
    return none.scatter_reduce(1, assign, positions, "amin")
