"""Data-informed merging: streamed forward passes over samples of text, and what is fitted on them.

Needs the extra `features` (transformers). Imported only by what runs such a method.
"""

from mergecore.starting import load_deferred

load_deferred()
