"""Models with feed-forward layers to route, and what they are given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchops.nn import RoutedFFN, route_ffn_

TOKENS = torch.arange(24).view(2, 12)
SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
BART = {"vocab_size": 40, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
OPT = {"vocab_size": 40, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "ffn_dim": 64}
OPT |= {"num_attention_heads": 2}
T5 = {"vocab_size": 40, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}


def sequential() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(16, 64), nn.Dropout(0.1), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16)]
    return nn.Sequential(*layers, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(100, 16)


def hugging_face(model: str, config: str, **options: Any) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config)(**options)
    return getattr(transformers, model)(config), torch.randn(2, 3, 32, 32) if "image_size" in options else TOKENS


def vision_transformer() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 5}
    return timm.models.VisionTransformer(**options), torch.randn(2, 3, 32, 32)


def gpt2() -> tuple[nn.Module, Tensor]:
    ids = {"bos_token_id": None, "eos_token_id": None}
    return hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=2, n_layer=2, vocab_size=40, **ids)


# Models with what they are given, and the names of their routed layers.
class Padded(nn.Module):
    """torch's encoder, whose fast path drops rows of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input: Tensor) -> Tensor:
        padding = torch.arange(input.shape[1]) >= torch.tensor([[input.shape[1]], [4]])
        return self.encoder(input, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 64, activation="gelu"), 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.decoder(input, input)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], list[str]]] = {
    "Sequential": (sequential, ["0", "5"]),
    "BERT": (
        lambda: hugging_face("BertModel", "BertConfig", **SIZE),
        ["encoder.layer.0.intermediate.dense", "encoder.layer.1.intermediate.dense"],
    ),
    "Swin": (
        lambda: hugging_face("DonutSwinModel", "DonutSwinConfig", **SWIN),
        ["encoder.layers.0.blocks.0.intermediate.dense"],
    ),
    "Bloom": (
        lambda: hugging_face("BloomModel", "BloomConfig", vocab_size=40, hidden_size=32, n_layer=1, n_head=2),
        ["h.0.mlp.dense_h_to_4h"],
    ),
    "GPT-2": (gpt2, ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]),
    "Llama": (
        lambda: hugging_face("LlamaForCausalLM", "LlamaConfig", **SIZE),
        ["model.layers.0.mlp", "model.layers.1.mlp"],
    ),
    "T5": (
        lambda: hugging_face("T5EncoderModel", "T5Config", **T5),
        ["encoder.block.0.layer.1.DenseReluDense.wi"],
    ),
    "gated T5": (
        lambda: hugging_face("T5EncoderModel", "T5Config", **T5, dropout_rate=0.0, feed_forward_proj="gated-gelu"),
        ["encoder.block.0.layer.1.DenseReluDense"],
    ),
    "BART": (
        lambda: hugging_face("BartModel", "BartConfig", **BART),
        ["encoder.layers.0.fc1", "decoder.layers.0.fc1"],
    ),
    "OPT": (lambda: hugging_face("OPTForCausalLM", "OPTConfig", **OPT), ["model.decoder.layers.0.fc1"]),
    "ALBERT": (
        lambda: hugging_face("AlbertModel", "AlbertConfig", embedding_size=16, **SIZE),
        ["encoder.albert_layer_groups.0.albert_layers.0.ffn"],
    ),
    "encoder": (lambda: (Padded(), torch.randn(2, 9, 16)), ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]),
    "decoder": (lambda: (Decoder(), torch.randn(2, 9, 16)), ["decoder.layers.0.linear1"]),
    "timm": (vision_transformer, ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def convert(model: nn.Module, **options: Any) -> Any:
    return route_ffn_(model, **{"verbose": False} | options)


def made(name: str) -> tuple[nn.Module, Tensor]:
    model, input = MODELS[name][0]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # their own start is so small that nearly nothing depends on anything
    return model.eval(), input


def output(model: nn.Module, input: Tensor) -> Tensor:
    result = model(input)
    return result if isinstance(result, Tensor) else result[0]


def routed_layers(model: nn.Module) -> dict[str, RoutedFFN]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedFFN)}
