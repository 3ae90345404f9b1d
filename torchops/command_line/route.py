"""``python -m torchops route``."""

import argparse

from ..nn import route_ffn_
from . import transformers_models as models
from .errors import user_errors

HELP = "route the feed-forward layers of a transformers model (SPT)"
DESCRIPTION = """\
Replaces the feed-forward layers of a model of transformers by routed ones
(torchops.nn.route_ffn_), of whose blocks every token computes some, prints what
became of each, and saves the model so that from_pretrained reads it. With
--calibration blocks and routers are fitted to what layers compute, without it
they are cut as they come. Train the model afterwards."""
EXAMPLES = """\
example:
  python -m torchops route gpt2/ -o gpt2-routed/ --blocks 4 --top-k 2 \\
      --calibration texts.txt"""

ENOUGH_TOKENS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--blocks", type=int, default=4, metavar="G", help="blocks of a layer; default: 4")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="those that compute a token; default: 2")
    parser.add_argument(
        "--lora-rank", type=int, default=0, metavar="R", help="freeze layers and train LoRA of this rank; default: 0"
    )


def run(arguments: argparse.Namespace) -> int:
    models.check(arguments)
    model = models.load(arguments)
    calibration = models.calibration(arguments, model, ENOUGH_TOKENS)
    with user_errors():
        route_ffn_(model, arguments.blocks, arguments.top_k, arguments.skip, calibration, arguments.lora_rank)
    from ..integrations.transformers_routed_ffn import keep_routed

    models.save(arguments, keep_routed(model), "transformers_routed_ffn")
    return 0
