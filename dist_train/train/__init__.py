"""The training loop; the only place that knows DeepSpeed."""

import logging

_SAYS_NOTHING = (
    "Setting accelerator to CPU",  # nor is a GPU missing where there is none
    "untested optimizer",  # with ZeRO: the tests here have all of torch's that a recipe may name
)


def _tells_something(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _SAYS_NOTHING)


logging.getLogger("DeepSpeed").addFilter(_tells_something)  # before its import, which is where the first is said
