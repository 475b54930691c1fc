"""The one exception that means: the user can put this right."""

import re

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@|(?<=[?&])(?:access_token|api_key|auth|key|token)=[^&\s]*", re.IGNORECASE)
_MOST_CHARACTERS = 2000


class UserError(Exception):
    """A mistake in the input, said in one sentence that names the remedy.

    The entry scripts print it without a traceback and exit with status 2. Whatever it quotes of a file, it is one line
    that a terminal shows as it is: line ends, control characters and halves of surrogate pairs become spaces.
    Credentials in an address are left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _MOST_CHARACTERS:
            message = f"{message[: _MOST_CHARACTERS // 2]} ... {message[-_MOST_CHARACTERS // 2 :]}"
        message = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(without_credentials(message))


def without_credentials(text: str) -> str:
    """The text with `user:password@` and `token=...` cut out of every address in it."""
    return _CREDENTIALS.sub("", text)
