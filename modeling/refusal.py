"""What modeling says no with."""


class Refusal(ValueError):
    """A configuration or an input that cannot be, in words for whoever chose it: the numbers, and what to take instead.

    The commands print it as one sentence. Any other error, a plain ValueError too, is a fault of the code and keeps its
    traceback.
    """
