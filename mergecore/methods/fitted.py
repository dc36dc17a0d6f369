"""Methods whose coefficients are fitted on samples of text before the first tensor is written.

What is fitted, and how, is in mergecore/features; here are the names, the parameters and what a tensor is given.
"""

from __future__ import annotations

from mergecore.methods.base import Coefficients, Method, Parameter, Statistics, TensorView


def _coefficients(view: TensorView) -> Coefficients:
    assert view.fitted is not None
    return view.fitted


SLTA = Method(
    name="slta",
    summary="base plus the deltas of each submodule, with the weights that best keep every task's features",
    reference="Dai et al. 2025, Leveraging submodule linearity enhances task arithmetic performance in LLMs, eq. 12-14",
    coefficients=_coefficients,
    parameters=(
        Parameter(
            "level",
            "attn_mlp",
            "what has weights of its own",
            choices=("layer", "attn_mlp", "head_mlp", "model"),
        ),
        Parameter("balance", True, "divide each sample's terms by the mean squared length of its differences (eq. 33)"),
        Parameter(
            "weight",
            None,
            "weight of a model's deltas outside of the modules (embeddings, last norm, head); 1 / models if absent",
            per_model=True,
            optional=True,
        ),
    ),
    statistics=Statistics.FITTED,
)

FITTED = (SLTA,)
