"""Where the threshold of a top set lies, from a sample of a tensor: few bins have to be counted then.

Not for the threshold itself (topsets.py): a bracket that misses costs a read, and changes no result.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

DEVIATIONS = 4.0
"""Standard errors of the share of larger entries between the sample's threshold and each end of its bracket."""
WIDEST = 0.25
"""Share of the entries within a bracket beyond which it is not worth while."""
REACH = 16.0
"""How far beyond the sample's largest entry others may lie; as likely, as many times below its smallest as there are
entries for each of the sample."""


class Sample:
    """Magnitudes of one model in pieces of a tensor of `entries`, float64 (pieces, length of each)."""

    def __init__(self, pieces: NDArray[np.float64], entries: int) -> None:
        self.pieces, self.entries = pieces, entries
        self.rising = np.sort(pieces, axis=None)

    def bracket(self, count: int) -> tuple[float, float] | None:
        """Between which magnitudes the smallest of the `count` largest lies in all likelihood, ends included.

        None where they are too far from each other. Pieces differ more than their entries alone would make them where
        rows have scales of their own: how much is seen from piece to piece.
        """
        size, rising = self.rising.size, self.rising
        if size == self.entries:
            return float(rising[size - count]), float(rising[size - count])
        share = count / self.entries
        likely = rising[min(size - 1, size - round(share * size))]
        larger = (self.pieces >= likely).mean(axis=1)
        apart = DEVIATIONS * float(larger.std()) / math.sqrt(larger.size) + 2.0 / size
        low, high = (math.floor(size * (1.0 - share + side * apart)) for side in (-1, 1))
        zeros = int(np.searchsorted(rising, 0.0, side="right"))
        smallest = float(rising[min(size - 1, zeros)])
        least = float(rising[max(0, low)]) if low >= 0 or zeros else smallest / (REACH * self.entries / size)
        most = float(rising[high]) if high < size else float(rising[-1]) * REACH
        return (least or min(smallest, most), most) if 2.0 * apart < WIDEST and math.isfinite(most) else None
