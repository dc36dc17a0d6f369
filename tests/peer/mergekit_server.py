"""Runs in the interpreter that has mergekit: one merge per line of stdin, as its command line would do it.

A line is a JSON list: `yaml` or `multi`, and the arguments of mergekit-yaml or mergekit-multi; `describe` tells what it
knows, `cd` changes the folder. The answer is one line of JSON: null, the description or {"error": the traceback}.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.registry import registered_methods
from mergekit.scripts import multimerge, run_yaml
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, TokenizerConfig

TABLES = {
    "": MergeConfiguration,
    "models[]": InputModelDefinition,
    "slices[]": OutputSliceDefinition,
    "slices[].sources[]": InputSliceDefinition,
    "modules.NAME": OutputModuleDefinition,
    "parameters.NAME[]": ConditionalParameter,
    "model": ModelReference,
    "model.model": ModelPath,
    "tokenizer": TokenizerConfig,
    "tokenizer.tokens.NAME": TokenEmbeddingConfig,
    "tokenizer.tokens.NAME.source": ModelTokenEmbedding,
}


def describe() -> dict[str, Any]:
    """The methods with their parameters, the keys of every table, and the options of the command lines."""
    return {
        "methods": {method.spec.name: [p.name for p in method.spec.parameters] for method in registered_methods()},
        "keys": {place: list(table.model_fields) for place, table in TABLES.items()},
        "options": sorted(
            {option for main in (run_yaml.main, multimerge.main) for p in main.params for option in p.opts}
        ),
    }


def answer(command: str, arguments: list[str]) -> Any:
    if command == "describe":
        return describe()
    if command == "cd":
        return os.chdir(*arguments)
    main = {"yaml": run_yaml.main, "multi": multimerge.main}[command]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            main(arguments, standalone_mode=False)
    except Exception:
        return {"error": traceback.format_exc()}
    return None


for line in sys.stdin:
    command, *arguments = json.loads(line)
    print(json.dumps(answer(command, arguments)), flush=True)
