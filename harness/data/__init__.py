"""Text to tokens on disk (`prepare`, `open_prepared`); batches of it come from harness.data.loader.WindowLoader."""

from harness.data.network import HubUnreachable
from harness.data.prepare import prepare, prepared_as
from harness.data.prepared import PreparedData, VerifiedSplit, open_prepared, verify_prepared
from harness.data.sources import check_corpus
from harness.data.tokenizer import Tokenizer

__all__ = [
    "HubUnreachable",
    "PreparedData",
    "Tokenizer",
    "VerifiedSplit",
    "check_corpus",
    "open_prepared",
    "prepare",
    "prepared_as",
    "verify_prepared",
]
