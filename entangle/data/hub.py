"""The hub, asked only where it answers: without a network its libraries would try again for a minute."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from functools import cache
from urllib.parse import urlsplit

import datasets.config
import huggingface_hub.constants

SECONDS = 3.0
"""How long the hub has for its first answer."""

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def use_hub() -> None:
    """Before anything is asked of the hub: if it can't be reached, only what was downloaded before is used.

    This holds for the rest of the process, for transformers, peft and datasets alike.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or _is_reachable(huggingface_hub.constants.ENDPOINT):
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


@cache
def _is_reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in _PROXIES):
        return True  # the proxy looks the name up, not this machine
    address = urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    pool = ThreadPoolExecutor(1)
    try:  # in a thread: looking a name up has no time limit of its own
        connection = pool.submit(socket.create_connection, (address.hostname, port), SECONDS)
        connection.result(SECONDS).close()
    except (OSError, TookTooLong):
        return False
    finally:
        pool.shutdown(wait=False)
    return True
