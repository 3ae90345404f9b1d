"""Token merging (ToMe) in timm's Vision Transformers.

The classes of a model's blocks are switched to the ones here and back again; modules, parameters and
the state dict stay as they are. What the tokens between two blocks stand for travels with the tokens
themselves and not with the model, so nothing has to be reset: passes can overlap (several before one
backward, several threads), and a block that gradient checkpointing runs again finds what it found
the first time. TorchScript has no attributes of tensors; there the blocks' container hands it on.
"""

import functools
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any, List, Optional, Tuple, TypeVar, Union

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..nn.tokens import TokenMerger, proportional_attention_bias
from ..ops.span_attention import span_attention
from ..ops.tokens import unmerge_tokens
from ._requirements import imports_of
from ._token_merging import Merged, full_name, marked, parse_r, set_merged, switch_class

with imports_of(__name__, "timm", "1.0.26"):
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

__all__ = ["apply_token_merging", "remove_token_merging"]

Model = TypeVar("Model", bound=VisionTransformer)


def apply_token_merging(
    model: Model, r: Union[int, List[int], Tuple[int, float]], *, proportional_attention: bool = True
) -> Model:
    """Makes each block of a timm Vision Transformer remove tokens, by merging the most similar ones
    between attention and MLP (ToMe). Works with pretrained weights as they are, and in training.

    Tokens are compared by their attention keys averaged over heads, and averaged weighted by size, the
    number of patches they stand for. The model's prefix tokens (class, distillation, registers) never
    merge. Only inside the blocks are there fewer tokens: behind the last one every patch gets the value
    of its token back, so ``forward_features`` and ``forward_intermediates`` (each of its features)
    return the shapes they did, and every ``global_pool`` counts a token as often as it stands for a
    patch. Whoever wants the merged tokens finds them in the last block's output.

    Args:
        model: a ``timm.models.vision_transformer.VisionTransformer`` or subclass (ViT, DeiT, CLIP,
            DINOv2, SigLIP and others) whose blocks are timm's ``Block`` with ``Attention``; changed in
            place. Apply before wrapping it (torch.compile, DDP, FSDP) and before torch.jit.script.
        r: how many tokens each block removes: one number, a list with a number per block, or a tuple
            (r, inflection) for :func:`torchops.nn.merge_schedule`. Half of the unprotected tokens is the
            most a block removes. Blocks before the first that removes any run timm's own forward; 0 in
            every block is :func:`remove_token_merging`. Call again to change r, or after replacing
            ``model.norm`` or blocks.
        proportional_attention: add log(size) to the attention scores of each key. Meant for weights
            trained without merging; models trained with merging, and MAE's, do without.

    Returns:
        model.

    Raises:
        TypeError: a model, block or attention of another class (EVA, Swin, parallel blocks,
            differential attention, ...), or an r of another type. The model is then as it was.
        ValueError: a negative number in r, or a list of another length than the model has blocks; in
            the forward pass, an ``attn_mask`` or ``is_causal`` in a block with merging, since there is
            no position left to mask.
        RuntimeError: in the forward pass, tokens that are not the previous block's output, for example
            replaced by a hook: what they stand for is unknown.
        ImportError: on import, when timm is not installed.

    Gradient checkpointing, deepcopy, pickling, torch.compile, torch.export, torch.jit.script,
    torch.jit.trace and torch.fx (timm's feature extraction) work; compiling or scripting
    ``forward_intermediates`` does not. In a scripted model ``model.blocks`` returns unmerged tokens.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2023.

    >>> import timm
    >>> from torchops.integrations.timm import apply_token_merging
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3)
    >>> model = apply_token_merging(model, r=16)
    >>> _ = model.blocks[2].register_forward_hook(lambda block, args, output: print(output.shape))
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 149, 192])
    torch.Size([1, 1000])
    """
    blocks = checked_blocks(model)
    r_per_block = parse_r(r, len(blocks))
    if not any(r_per_block):
        return remove_token_merging(model)

    switch_class(model, merging_class(original_class(model)))
    # norm is where all of timm's paths through the blocks come together again.
    remove_hook(model.norm)
    model.norm.register_forward_pre_hook(unmerge_input)
    if type(model.blocks) is nn.Sequential:
        switch_class(model.blocks, TokenMergingBlocks)
    for index, block in enumerate(blocks):
        switch_class(block, TokenMergingBlock)
        switch_class(block.attn, TokenMergingAttention)
        block.token_merger = TokenMerger(r_per_block[index], model.num_prefix_tokens)
        block.follows_merging = any(r_per_block[:index])
        block.proportional_attention = proportional_attention
    return model


def remove_token_merging(model: Model) -> Model:
    """Undoes :func:`apply_token_merging`: the model has its own classes again and nothing besides.
    A model without token merging is left as it is.

    Args:
        model: changed in place.

    Returns:
        model.

    Raises:
        TypeError: not a timm Vision Transformer.

    >>> import timm
    >>> from torchops.integrations.timm import apply_token_merging, remove_token_merging
    >>> model = apply_token_merging(timm.create_model("vit_tiny_patch16_224", depth=3), r=16)
    >>> type(remove_token_merging(model).blocks[0])
    <class 'timm.models.vision_transformer.Block'>
    """
    blocks = checked_blocks(model)
    if isinstance(model, TokenMergingModel):
        switch_class(model, original_class(model))
        remove_hook(model.norm)
        if isinstance(model.blocks, TokenMergingBlocks):
            switch_class(model.blocks, nn.Sequential)
        for block in blocks:
            if isinstance(block, TokenMergingBlock):
                switch_class(block, Block)
                switch_class(block.attn, Attention)
                del block.token_merger, block.follows_merging, block.proportional_attention
    return model


def checked_blocks(model: nn.Module) -> List[Any]:
    supported = (
        "Supported are timm.models.vision_transformer.VisionTransformer and its subclasses, with blocks of "
        "timm.models.vision_transformer.Block and timm.layers.attention.Attention themselves"
    )

    def expect(name: str, module: Any, *classes: type) -> None:
        if type(module) not in classes:
            raise TypeError(f"token merging: {name} is a {full_name(type(module))}. {supported}")
        if "forward" in vars(module):
            raise TypeError(f"token merging: {name} has a forward of its own, set on the module. {supported}")

    if not isinstance(model, VisionTransformer):
        raise TypeError(f"token merging: model is a {full_name(type(model))}. {supported}")
    for index, block in enumerate(model.blocks):
        expect(f"model.blocks[{index}]", block, Block, TokenMergingBlock)
        expect(f"model.blocks[{index}].attn", block.attn, Attention, TokenMergingAttention)
    return list(model.blocks)


def get_merged(tokens: Tensor, num_skipped: int = 0) -> Optional[Merged]:
    """For tokens that a block returned, or a view of them without the first num_skipped."""
    merged = marked(tokens)
    if isinstance(tokens, torch.fx.Proxy):
        return merged
    if merged is None or tokens.dim() != 3 or tokens.shape[1] + num_skipped != merged.size.shape[1]:
        return None
    return merged


@torch.fx.wrap
def without_mask(x: Tensor, attn_mask: Optional[Tensor], is_causal: bool) -> Tensor:
    """x, where there is no mask. A function, since a torch.fx trace does not know yet whether there is one."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "token merging: attn_mask and is_causal cannot be followed where tokens are merged; "
            "call remove_token_merging(model) before passes with a mask"
        )
    return x


def renamed(method: Any, name: str) -> Any:
    """A class's own method for classes that override it: TorchScript has no super(), and of every name one method."""
    copy = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    copy.__annotations__ = method.__annotations__
    return copy


class TokenMergingAttention(Attention):
    """timm's attention; given a list for its keys [B, H, N, D], with a bias [B, N] to the scores of each key."""

    timm_forward = renamed(Attention.forward, "timm_forward")

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
        keys: Optional[List[Tensor]] = None,
        key_bias: Optional[Tensor] = None,
    ) -> Tensor:
        if keys is None:
            return self.timm_forward(x, attn_mask, is_causal)
        gate: Optional[Tensor] = None
        if hasattr(self, "gate"):  # noqa: SIM102 - timm 1.0.26 has none, and TorchScript compiles the right side of an `and`
            if self.gate is not None:
                gate = self.gate(x).sigmoid()
        query, key, value = self.qkv(x).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        keys.append(key)
        dropout = self.attn_drop.p if self.training else 0.0
        if dropout > 0:  # span_attention has none
            bias: Optional[Tensor] = None
            if key_bias is not None:
                bias = key_bias[:, None, None].to(query.dtype)
            x = scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        else:
            x = span_attention(query, key, value, key_bias=key_bias)
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class TokenMergingBlock(Block):
    """timm's block, with token merging between attention and MLP."""

    if TYPE_CHECKING:  # at run time TorchScript would take annotations of a class for types of its own
        token_merger: TokenMerger
        follows_merging: bool  # whether a block before removes tokens
        proportional_attention: bool

    timm_forward = renamed(Block.forward, "timm_forward")

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        if self.token_merger.r == 0 and not self.follows_merging:
            return self.timm_forward(x, attn_mask, is_causal)
        if not torch.jit.is_scripting():
            return self.merge_marked(x, attn_mask, is_causal)
        if self.follows_merging:
            raise RuntimeError(
                "token merging: in TorchScript a block cannot be called by itself; call model.blocks, which "
                "returns unmerged tokens"
            )
        return self.merge(without_mask(x, attn_mask, is_causal), None, None)[0]

    def merge(
        self, x: Tensor, size: Optional[Tensor], assign: Optional[Tensor]
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """From tokens [B, N', C] and what they stand for (None: themselves), as in :class:`Merged`, to those behind."""
        if self.token_merger.r == 0 and size is None:
            return self.timm_forward(x), size, assign
        bias: Optional[Tensor] = None
        if size is not None and self.proportional_attention:
            bias = proportional_attention_bias(size)
        keys: List[Tensor] = []
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), keys=keys, key_bias=bias)))
        if self.token_merger.r > 0:
            metric = keys[0].detach().mean(1)
            x, size, merged_assign = self.token_merger(x, metric, size)
            assign = merged_assign if assign is None else merged_assign.gather(1, assign)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, size, assign

    def merge_marked(self, x: Tensor, attn_mask: Optional[Tensor], is_causal: bool) -> Tensor:
        """Tokens that bring along what they stand for."""
        merged = get_merged(x) if self.follows_merging else None
        x = without_mask(x, attn_mask, is_causal)
        if self.follows_merging and merged is None:
            raise RuntimeError(
                f"token merging: the tokens {x.shape} that enter this block are not what the block before it "
                "returned (replaced by a hook, moved, or the block was called by itself), so how many patches "
                "each of them stands for is unknown"
            )
        size, assign = (None, None) if merged is None else merged
        x, size, assign = self.merge(x, size, assign)
        set_merged(x, None if size is None or assign is None else Merged(size, assign))
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        if self._forward_hooks or self._forward_pre_hooks:
            raise NotImplementedError("token merging: hooks of a block cannot be scripted")
        return self


class TokenMergingBlocks(nn.Sequential):
    """The blocks of a model; in TorchScript, and traced by torch.fx, from tokens to tokens unmerged again."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return unmerge_traced(super().forward(input))
        size: Optional[Tensor] = None
        assign: Optional[Tensor] = None
        for block in self:
            input, size, assign = block.merge(input, size, assign)  # type: ignore[operator]
        return input if assign is None else unmerge_tokens(input, assign)


def unmerge_traced(tokens: Tensor) -> Tensor:
    # Marks of proxies are gone when the graph runs.
    merged = get_merged(tokens) if isinstance(tokens, torch.fx.Proxy) else None
    return tokens if merged is None else unmerge_tokens(tokens, merged.assign)


@torch.fx.wrap
def unmerge_marked(tokens: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        merged = get_merged(tokens)
        return tokens if merged is None else unmerge_tokens(tokens, merged.assign)
    return tokens


def unmerge_input(module: nn.Module, args: Tuple[Tensor]) -> Tuple[Tensor]:
    """Forward pre-hook: merged tokens go in unmerged."""
    if not torch.jit.is_scripting():
        return (unmerge_marked(args[0]), *args[1:]) if args else args
    return args


def remove_hook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is unmerge_input]:
        del module._forward_pre_hooks[key]


class TokenMergingModel(VisionTransformer):
    """What :func:`merging_class` puts before a Vision Transformer class."""

    if TYPE_CHECKING:
        original_class: type

        def timm_forward_features(self, x: Tensor) -> Tensor: ...

    def forward_features(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        return self.timm_forward_features(without_mask(x, attn_mask, is_causal))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, with unmerged intermediates."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("token merging: forward_intermediates cannot be compiled")
        call = inspect.signature(super().forward_intermediates).bind(x, *args, **kwargs)
        call.apply_defaults()
        reshape = call.arguments["output_fmt"] == "NCHW"
        if reshape:
            call.arguments["output_fmt"] = "NLC"
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        num_prefix = self.num_prefix_tokens

        def unmerge(tokens: Any) -> Any:
            if isinstance(tokens, tuple):  # with its prefix tokens
                return (unmerge(tokens[0]), *tokens[1:])
            merged = get_merged(tokens, num_skipped=num_prefix)
            if merged is not None:
                tokens = unmerge_tokens(tokens, merged.assign[:, num_prefix:] - num_prefix)
            if reshape:
                tokens = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
            return tokens

        output = super().forward_intermediates(*call.args, **call.kwargs)
        if isinstance(output, dict):
            return {**output, "image_intermediates": [unmerge(tokens) for tokens in output["image_intermediates"]]}
        if isinstance(output, tuple):
            return output[0], [unmerge(tokens) for tokens in output[1]]
        return [unmerge(tokens) for tokens in output]

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        # The class is made at run time: copies and pickles name the original.
        made_from: Any = super().__reduce_ex__(protocol)
        return new_merging_model, (self.original_class,), *made_from[2:]


@functools.cache
def merging_class(cls: Any) -> Any:
    members = {
        "__module__": __name__,
        "__doc__": cls.__doc__,
        "original_class": cls,
        "timm_forward_features": renamed(cls.forward_features, "timm_forward_features"),
    }
    return type(f"TokenMerging{cls.__name__}", (TokenMergingModel, cls), members)


def original_class(model: VisionTransformer) -> type:
    return model.original_class if isinstance(model, TokenMergingModel) else type(model)


def new_merging_model(cls: Any) -> Any:
    merging = merging_class(cls)
    return merging.__new__(merging)
