"""The one exception that means: the user can put this right."""

import contextlib
import errno
import re
import sys
from collections.abc import Collection, Iterator

from modeling.refusal import Refusal

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@|(?<=[?&])(?:access_token|api_key|auth|key|token)=[^&\s]*", re.IGNORECASE)
_MOST_CHARACTERS = 2000


class UserError(Exception):
    """A mistake in the input, said in one sentence that names the remedy.

    The entry scripts print it without a traceback and exit with status 2. Whatever it quotes of a file, it is one line
    that a terminal shows as it is, see `sentence`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


def sentence(message: str) -> str:
    """The message in one line, of bounded length and without credentials; what no terminal prints is escaped."""
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[: _MOST_CHARACTERS // 2]} ... {message[-_MOST_CHARACTERS // 2 :]}"
    message = re.sub(r"\s", " ", message)
    return without_credentials("".join(c if c.isprintable() else escaped(c) for c in message))


def in_a_line(error: BaseException) -> str:
    """What another one's error says, in a line that stands in a sentence of ours; its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def escaped(character: str) -> str:
    """As it stands in a Python string: \\x1b."""
    return character.encode("unicode_escape").decode("ascii")


def tell(message: str) -> None:
    """A sentence for people, on standard error: standard output belongs to results."""
    print(sentence(message), file=sys.stderr, flush=True)


def without_credentials(text: str) -> str:
    """The text with `user:password@` and `token=...` cut out of every address in it."""
    return _CREDENTIALS.sub("", text)


@contextlib.contextmanager
def as_user_error(before: str = "") -> Iterator[None]:
    """A Refusal inside, as modeling raises it, becomes a UserError: the same sentence behind `before`."""
    try:
        yield
    except Refusal as error:
        raise UserError(f"{before}{error}") from None


@contextlib.contextmanager
def writable(what: str, remedy: str, *, only: Collection[int] = ()) -> Iterator[None]:
    """What the system does not let be written inside becomes one sentence, a UserError. only: the errors that it is about."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        raise UserError(f"{what} cannot be written ({error.strerror or error}): {remedy}") from error


@contextlib.contextmanager
def readable(what: str, remedy: str, *, but_not: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What the system refuses inside (no permission, a name too long, a failing disk) becomes one sentence, a UserError.

    what: a path, as the user knows it. but_not: errors that mean something else.
    """
    try:
        yield
    except but_not:
        raise
    except OSError as error:
        said = error.filename is None or str(error.filename) in what or error.errno == errno.ENAMETOOLONG
        inside = "" if said else f": {error.filename}"
        raise UserError(f"{what} cannot be read ({error.strerror or error}{inside}): {remedy}") from error
