"""Every operator's rows of the contract: one module per family, each with a list CASES."""

import importlib
import pkgutil

from contract import OpCase

ALL: list[OpCase] = [
    case
    for module in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{module.name}").CASES
]
