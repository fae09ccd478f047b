from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V

from ltx_train.memory.blocks.compile import kernel_choices


@pytest.mark.parametrize(
    ("hint", "row", "theirs", "ours"),
    [
        (ReductionHint.INNER, 1024, True, True),
        (ReductionHint.INNER, 4096, False, True),
        (ReductionHint.INNER, 16384, False, False),
        (ReductionHint.OUTER, 4096, False, False),
    ],
)
def test_rows_as_wide_as_the_model_stay_in_registers(hint: ReductionHint, row: int, theirs: bool, ours: bool) -> None:
    features: Any = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(row))
    graph: Any = SimpleNamespace(sizevars=SizeVarAllocator())
    with V.set_graph_handler(graph):
        assert InductorChoices.should_use_persistent_reduction(features, False) == theirs
        assert kernel_choices().should_use_persistent_reduction(features, False) == ours
