"""A smallest spec, those of the documentation, and what the reader says of one that it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mergecore.errors import SpecError
from mergecore.spec import parse_spec

MINIMAL = "merge_method: linear\nmodels: [{model: A}]\n"
DOCS = Path(__file__).parents[1] / "docs" / "spec.md"
FULL, FITTED, SLICED, *OTHERS = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)

ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refusal(text: str | bytes, name: str = "merge.yaml") -> str:
    """The message of the SpecError that the text leads to."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name)
    assert caught.value.exit_code == 2
    return str(caught.value)
