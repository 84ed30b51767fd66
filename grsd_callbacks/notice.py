"""Warnings that end nothing: where a user's process makes warnings errors, they are logged instead."""

from __future__ import annotations

import logging
import warnings

LOGGER = "grsd_callbacks"


def notice(message: str, category: type[Warning], stacklevel: int = 2) -> None:
    """`warnings.warn` for what must not turn a measurement into a failed one.

    Args:
        message: what the user should know.
        category: kind of warning; also the attribute `category` of the log record, where the warning is an error.
        stacklevel: as in `warnings.warn`, 2 being the caller of the function that gives the notice.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error")
        ...     notice("the first of two ways was taken", UserWarning)
    """
    try:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    except category:
        logging.getLogger(LOGGER).warning(message, extra={"category": category})
