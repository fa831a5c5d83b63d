"""Training data: a .jsonl, .json or .txt file as tokenized examples for the transformers Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rqc.compiler.data_files import checked_suffix, text_pieces
from rqc.compiler.finetune.chat_spans import Tokenized, tokenized, whole_text
from rqc.compiler.finetune.collate import Collate
from rqc.compiler.finetune.examples import Examples, Gathering, split
from rqc.compiler.finetune.tokenizer import TrainingTokenizer, read_training_tokenizer
from rqc.compiler.records import read_records
from rqc.runtime.errors import InputError

__all__ = ["Collate", "Examples", "TrainingTokenizer", "load_examples", "read_training_tokenizer", "split"]


def load_examples(path: str | Path, tokenizer: TrainingTokenizer, *, seq_len: int, vocab_size: int) -> Examples:
    """The examples of a data file, each at most `seq_len` tokens.

    .jsonl and .json: records {"text"}, {"instruction", "input", "output"} or {"messages"}, in any mixture, cut from the
    right; loss on the answers where there are any, else on all tokens. .txt: one text, packed into windows.
    Raises InputError, naming file and line, for what is not such a file, and if no example is left after the cut.
    """
    path = Path(path)
    gathered = Gathering(seq_len, vocab_size)
    if checked_suffix(path) == ".txt":
        for number, window in enumerate(_windows(path, tokenizer, seq_len)):
            gathered.add(window, number, str(path))
        found = gathered.examples()
        if not len(found):
            raise InputError(f"{path}: no text in the file", hint="name a file with some paragraphs of text in it")
        return found
    count = 0
    for count, record in enumerate(read_records(path), 1):
        for example in tokenized(record, tokenizer):
            gathered.add(example, count, record.place)
    if not count:
        raise InputError(f"{path}: no records in the file", hint="write one JSON object on each line")
    found = gathered.examples()
    if not len(found):
        needed = (
            f"--seq-len {gathered.needed} would keep at least one" if gathered.needed else "give records with answers"
        )
        raise InputError(
            f"{path}: no answer token is left of any of the {count} records within {seq_len} tokens", hint=needed
        )
    return found


def _windows(path: Path, tokenizer: TrainingTokenizer, length: int) -> Iterator[Tokenized]:
    """The tokens of a text, its end included, in consecutive windows; the last may be shorter.

    Long texts are encoded in pieces, each on its own.
    """
    held: list[int] = []
    pieces = (piece for piece in text_pieces(path) if piece.strip())
    for number, piece in enumerate(pieces):
        try:
            held += tokenizer.encode(piece, special=number == 0)
        except InputError as error:
            raise InputError(f"{path}: {error.message}", hint=error.hint) from error
        full = len(held) // length * length
        yield from (whole_text(held[start : start + length], None) for start in range(0, full, length))
        held = held[full:]
    held = whole_text(held, tokenizer.end_id).ids
    for start in range(0, len(held), length):
        if len(held) - start > 1:  # a single token predicts nothing
            yield whole_text(held[start : start + length], None)
