"""The one exception that means: the user can put this right."""

_MOST_CHARACTERS = 2000


class UserError(Exception):
    """A mistake in the input, said in one sentence that names the remedy.

    The entry scripts print it without a traceback and exit with status 2. Whatever it quotes of a file, it is one line
    that a terminal shows as it is: line ends, control characters and halves of surrogate pairs become spaces.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _MOST_CHARACTERS:
            message = f"{message[: _MOST_CHARACTERS // 2]} ... {message[-_MOST_CHARACTERS // 2 :]}"
        super().__init__("".join(character if character.isprintable() else " " for character in message))
