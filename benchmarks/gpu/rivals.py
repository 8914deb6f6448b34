"""Contenders from outside of this project: a Python file that is named on the command line, and defines `contenders`.

    def contenders(weight: Tensor, m: int) -> dict[str, Callable[[Tensor], Tensor]]

gets a weight [n, k] with zeros, on the GPU, and returns by name what maps x [m, k] to x W^T [m, n], both in its dtype;
nothing where it has no kernel. It is called for each layer of a cell and each m. The layers of a cell are equal, so
that it may pack one of them, and copy what it packed. A contender that a CUDA graph cannot capture is called as it is.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gpu.contest import Entrant


class RivalsError(ValueError):
    """The file is not what this module's docstring says."""


def load_rivals(path: Path) -> Any:
    """The module in the file."""
    spec = importlib.util.spec_from_file_location("rivals", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RivalsError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "contenders", None)):
        raise RivalsError(f"{path} does not define contenders(weight, m)")
    return module


def rival_entrants(
    module: Any, x: Tensor, weights: Sequence[Tensor], is_right: Callable[[Tensor], bool]
) -> list[Entrant]:
    """One for each name that the module knows for this cell."""
    layers: list[dict[str, Callable[[Tensor], Tensor]]] = [module.contenders(weight, len(x)) for weight in weights]
    return [
        Entrant(name, [partial(layer[name], x) for layer in layers], is_right, captured=True, peer=True)
        for name in layers[0]
    ]
