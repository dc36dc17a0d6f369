"""Methods that decide each entry by itself: nearswap, RAM, MagMax, and the consensus of TALL masks."""

from __future__ import annotations

from dataclasses import replace

from mergecore.methods.base import Election, Keep, Method, Parameter, Statistics, TensorView
from mergecore.methods.linear import WEIGHT
from mergecore.methods.selection import IGNORED, LAMBDA, TIES
from mergecore.ops import Elect


def _everything(view: TensorView) -> tuple[Keep, ...]:
    return ()


def _nearswap(view: TensorView) -> Election:
    t = view.parameters["t"]
    if t < 0:
        raise ValueError(f"t is {t:g}; it must not be negative")
    return Election((1.0,), elect=Elect.LIMITED, limits=(t,))


NEARSWAP = Method(
    name="nearswap",
    summary="moves each entry of the base towards the model, by t at most",
    reference="alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (model card)",
    coefficients=_nearswap,
    parameters=(Parameter("t", None, "how far an entry may move"),),
    most=1,
    keeps=_everything,
)

RAM_EPSILON = Parameter("epsilon", 1e-5, "deltas up to it count as unchanged and are dropped")


def _epsilon(view: TensorView) -> float:
    epsilon = float(view.parameters["epsilon"])
    if epsilon < 0:
        raise ValueError(f"epsilon is {epsilon:g}; it must not be negative")
    return epsilon


def _ram(view: TensorView) -> Election:
    return Election((1.0,) * view.models, elect=Elect.SHARED, limits=(_epsilon(view),) * view.models)


def _ram_plus(view: TensorView) -> Election:
    """Deltas of one model alone are scaled by lambda_n = 1 + r min(rho_n, alpha), rho_n = shared_n / alone_n."""
    assert view.shared is not None
    r, alpha = view.parameters["r"], view.parameters["alpha"]
    # Where nothing is alone, there is nothing to scale either.
    overlaps = (min(shared / max(alone, 1), alpha) for shared, alone in view.shared)
    return replace(_ram(view), weights=tuple(1.0 + r * max(overlap, 0.0) for overlap in overlaps))


def _check_epsilon(view: TensorView) -> None:
    _epsilon(view)


_RAM = "Reinforced agent merging, 2026 (arXiv 2601.13572)"

RAM = Method(
    name="ram",
    summary="keeps a delta that one model has alone, takes the mean of those that several have",
    reference=_RAM,
    coefficients=_ram,
    parameters=(RAM_EPSILON,),
    keeps=_everything,
)
RAMPLUS_TL = Method(
    name="ramplus_tl",
    summary="ram that scales what a model has alone by how much of its change it shares, tensor by tensor",
    reference=_RAM,
    coefficients=_ram_plus,
    parameters=(
        Parameter("r", 0.1, "strength of the scaling"),
        Parameter("alpha", 0.2, "bound of the overlap that counts"),
        RAM_EPSILON,
    ),
    statistics=Statistics.SHARED,
    check=_check_epsilon,
    keeps=_everything,
)


def _magmax(view: TensorView) -> Election:
    return Election(view.parameters["weight"], view.parameters["lambda"], Elect.LARGEST)


MAGMAX = Method(
    name="magmax",
    summary="takes, at each entry, the delta of largest magnitude",
    reference="Marczak et al. 2024, MagMax: leveraging model merging for seamless continual learning",
    coefficients=_magmax,
    parameters=(WEIGHT, LAMBDA),
    keeps=_everything,
)

_CONSENSUS = (
    Parameter("k", 2, "how many models must hold on to an entry"),
    # The authors try 0.2 to 0.6 on validation data; this is the middle.
    Parameter("lambda_t", 0.4, "a model holds on where |d_n| > lambda_t |sum - d_n|", per_model=True),
)


def _agreed(view: TensorView, election: Election) -> Election:
    """What at least `k` task masks keep of an election (Wang et al. 2024, section 5.2)."""
    k, limits = view.parameters["k"], view.parameters["lambda_t"]
    if not 1 <= k <= view.models:
        raise ValueError(f"k is {k}; it must be from 1 to the number of models, {view.models}")
    if min(limits) < 0:
        raise ValueError(f"lambda_t is {min(limits):g}; it must not be negative")
    return replace(election, consensus=k, limits=limits)


def _consensus(view: TensorView) -> Election:
    return _agreed(view, Election(view.parameters["weight"], view.parameters["lambda"]))


def _consensus_ties(view: TensorView) -> Election:
    ties = TIES.coefficients(view)
    assert isinstance(ties, Election)
    return _agreed(view, ties)


_TALL = "Wang et al. 2024, Localizing task information for improved model merging and compression"

CONSENSUS_TA = Method(
    name="consensus_ta",
    summary="task arithmetic without the entries that fewer than k models hold on to",
    reference=_TALL,
    coefficients=_consensus,
    parameters=(WEIGHT, LAMBDA, *_CONSENSUS),
    keeps=_everything,
    least=2,
)
CONSENSUS_TIES = Method(
    name="consensus_ties",
    summary="ties without the entries that fewer than k models hold on to",
    reference=_TALL,
    coefficients=_consensus_ties,
    parameters=(*TIES.parameters, *_CONSENSUS),
    ignored=IGNORED,
    keeps=TIES.keeps,
    least=2,
)

ELEMENTWISE = (NEARSWAP, RAM, RAMPLUS_TL, MAGMAX, CONSENSUS_TA, CONSENSUS_TIES)
