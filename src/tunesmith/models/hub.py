"""Asking the Hugging Face hub quietly, and not for long when it does not answer."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, retry notes or "newly initialised" notes: all of them are expected here."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, hub_level, bars = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def unreachable(ask: Callable) -> bool:
    """True when the hub cannot be reached by `ask`, a call of the hub's API: one try here spares a minute of retries."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        ask()
    except (HfHubHTTPError, ValueError):
        return False  # it answers: the loader words the refusal
    except Exception:  # noqa: BLE001 - whichever HTTP client the hub library uses
        return True
    return False
