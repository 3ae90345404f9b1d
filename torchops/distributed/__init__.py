"""Operators over several processes of torch.distributed, and how their inputs are cut.

``import torchops`` leaves this package out: import it by name.
"""

from .context_parallel import *  # noqa: F403
from .expert_modules import *  # noqa: F403
from .expert_parallel import *  # noqa: F403
from .sequence import *  # noqa: F403
from .sharding_plans import *  # noqa: F403
