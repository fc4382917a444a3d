"""`x.data` in forward, of which a trace loses sight."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DATA: Any = torch.Tensor.data
READ = DATA.__get__


class DataDetached(TorchFunctionMode):
    """Reads `x.data` as `x.detach()`: the same values in the same memory, which is traced."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every call as it is, but for that."""
        return args[0].detach() if function == READ else function(*args, **(kwargs or {}))
