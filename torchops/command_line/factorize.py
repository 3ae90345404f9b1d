"""``python -m torchops factorize``."""

import argparse

from ..nn import STFLinear, factorize_
from ..nn._conversion import as_linear, is_plain_linear
from . import transformers_models as models
from .errors import CommandError, user_errors

HELP = "factor the linear layers of a transformers model (DSFormer)"
DESCRIPTION = """\
Replaces the linear layers of a model of transformers by factored ones
(torchops.nn.factorize_), prints what became of each, and saves the model so
that from_pretrained reads it. With --calibration layers are fitted to what they
compute, without it to their weights only."""
EXAMPLES = """\
example:
  python -m torchops factorize bert/ -o bert-half/ --compression 2 \\
      --calibration texts.txt --skip cls"""

FORMS = {"packed": STFLinear.pack, "factored": STFLinear.factored, "straight-through": STFLinear.straight_through}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument(
        "--compression",
        type=float,
        default=2.0,
        metavar="X",
        help="bytes of a layer for one of its factors; default: 2",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="packed",
        help="packed is the smallest, for inference (default); the others train: numbers, or positions, too",
    )
    parser.add_argument("--dtype", choices=models.DTYPES, help="of the saved weights; default: that of the model")


def run(arguments: argparse.Namespace) -> int:
    models.check(arguments)
    if not arguments.compression > 0:
        raise CommandError(f"--compression: expected a number above 0, got {arguments.compression:g}")
    model = models.load(arguments)
    dtype = models.DTYPES.get(arguments.dtype)
    # Several tokens for each feature of the widest layer.
    enough = 4 * max((as_linear(layer).in_features for layer in model.modules() if is_plain_linear(layer)), default=0)
    calibration = models.calibration(arguments, model, enough)
    with user_errors():
        factorize_(model, arguments.compression, arguments.skip, calibration=calibration, stored_dtype=dtype)
    for layer in model.modules():
        if isinstance(layer, STFLinear):
            FORMS[arguments.form](layer)
    from ..integrations.transformers_stf import keep_factored

    models.save(arguments, keep_factored(model.to(dtype or model.dtype)), "transformers_stf")
    return 0
