"""Methods whose coefficients are fitted on samples of text before the first tensor is written.

What is fitted, and how, is in mergecore/features; here are the names, the parameters and what a tensor is given.
"""

from __future__ import annotations

from mergecore.methods.base import Coefficients, Method, Parameter, Statistics, TensorView


def _check_learning(view: TensorView) -> None:
    given = view.parameters
    if given["learning_rate"] < 0 or given["epochs"] < 0 or given["batch"] < 1 or given.get("top_k", 0) < 0:
        raise ValueError("learning_rate, epochs and top_k must not be negative, batch must be 1 or more")


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

_EPOCHS = Parameter("epochs", 1, "how often each sample is taken; 0 learns nothing")
_BATCH = Parameter("batch", 1, "samples of a step")

DAM = Method(
    name="dam",
    summary="each model's linear layers with a learned coefficient for every column, summed",
    reference="Gauthier-Caron et al. 2024, Merging in a bottle: differentiable adaptive merging (DAM), section 3",
    coefficients=_coefficients,
    parameters=(
        Parameter(
            "loss",
            "kl",
            "of the merged model's predictions: kl (merged || model), forward_kl (model || merged), mse, entropy",
            choices=("kl", "forward_kl", "mse", "entropy"),
        ),
        Parameter("learning_rate", 2e-3, "of AdamW"),
        _EPOCHS,
        _BATCH,
        Parameter("lambda_cosine", 0.0, "weight of the cosines between the models' coefficients of a layer"),
        Parameter("lambda_l1", 0.0, "weight of the coefficients' sizes"),
        Parameter("lambda_l2", 0.0, "weight of the coefficients' squares"),
        Parameter("embeddings", "base", "from the base (without one: averaged), or learned", choices=("base", "merge")),
        Parameter("norms", "base", "the same of norms and biases", choices=("base", "merge")),
        Parameter("top_k", 0, "of each token's logits so many are kept; 0 keeps all"),
    ),
    statistics=Statistics.FITTED,
    deltas=False,
    check=_check_learning,
)

ADAMERGING = Method(
    name="adamerging",
    summary="base plus the deltas, with learned coefficients of each layer that make predictions most certain",
    reference="Yang et al. 2024, AdaMerging: adaptive model merging for multi-task learning",
    coefficients=_coefficients,
    parameters=(
        Parameter("level", "layer", "what has coefficients of its own", choices=("task", "layer", "tensor")),
        Parameter("start", 0.3, "all coefficients, before they are learned"),
        Parameter("learning_rate", 1e-3, "of AdamW"),
        _EPOCHS,
        _BATCH,
    ),
    statistics=Statistics.FITTED,
    check=_check_learning,
)

FITTED = (SLTA, DAM, ADAMERGING)
