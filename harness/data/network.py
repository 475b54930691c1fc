"""Is a server there at all? Asked before any download library is imported, because those wait 20 to 170 seconds."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request

from harness.errors import UserError

PATIENCE = 3.0  # seconds: with the start of Python, the user hears of it within five


class HubUnreachable(UserError):
    """The server that holds the data is out of reach, or broke off again and again."""


def reason_unreachable(url: str) -> str | None:
    """None if `url` gives any HTTP answer within PATIENCE, else why not, as half a sentence.

    The question runs in a thread of its own: name resolution has no timeout, and a server may accept and say nothing.
    """
    reason: list[str | None] = [f"no answer in {PATIENCE:.0f} seconds"]

    def ask() -> None:
        request = urllib.request.Request(url, headers={"Range": "bytes=0-0", "User-Agent": "attention-ablation"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            if not isinstance(cause, TimeoutError):
                reason[0] = str(cause) or type(cause).__name__
            return
        reason[0] = None

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reason[0]
