"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """A mistake in the input, said in one sentence that names the remedy.

    The entry scripts print it without a traceback and exit with status 2.
    """
