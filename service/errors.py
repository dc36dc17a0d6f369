"""The service's own exception; a merge's are in mergecore.errors."""

from __future__ import annotations

from mergecore.errors import MergecoreError


class ServiceError(MergecoreError):
    """The service cannot start with what it was given: its configuration, its folders, its port."""

    exit_code = 2
