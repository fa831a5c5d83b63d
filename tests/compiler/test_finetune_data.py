"""Training data: the ids and labels that come out of data files are those of the prompts that the engine is fed."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rqc.compiler import data_files, records
from rqc.compiler.finetune.data import Collate, Examples, load_examples, read_training_tokenizer, split
from rqc.compiler.finetune.tokenizer import TrainingTokenizer
from rqc.runtime.chat import load_chat_template
from rqc.runtime.errors import CheckpointError, InputError
from rqc.runtime.text import TextCodec

END, TEXT_END, BEGIN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
SPECIAL = [TEXT_END, BEGIN, END]
CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen3's: the last answer is rendered with its (empty) reasoning, an earlier one without.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED_SHORT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
MARKED_WIDE = "".join(
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_PROMPT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
MARKED_OTHER_PROMPT = MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_STOP = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORDS = ["the cat sat on the mat and the dog ran to the hat", "a capital of France is Paris\n\n\n", "system user 0123"]
TALK = [
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "And the dog 🐶?"},
    {"role": "assistant", "content": "In the hât. 🎉"},
]
INSTRUCTION = {"instruction": "Say where.", "input": "the cat", "output": "On the mat."}


def make_model(directory: Path, template: str | None = CHATML, *, bos: bool = False, **config: Any) -> Path:
    """A directory with a byte-level tokenizer that joins line breaks, and the files around it that the engine reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        WORDS * 8,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": END, "pad_token": END, "bos_token": BEGIN}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 2, "vocab_size": 330, **config}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **ids}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainingTokenizer]:
    made: dict[tuple[Any, ...], TrainingTokenizer] = {}

    def make(template: str | None = CHATML, **options: Any) -> TrainingTokenizer:
        key = (template, *sorted(options.items()))
        if key not in made:
            made[key] = read_training_tokenizer(make_model(tmp_path_factory.mktemp("model"), template, **options))
        return made[key]

    return make


@pytest.fixture
def load(tmp_path: Path, tokenizers: Callable[..., TrainingTokenizer]) -> Callable[..., Examples]:
    """Load records, given as values, as text of a .jsonl file, or (name=...) as bytes of any file."""

    def call(
        content: Any, template: str | None = CHATML, *, seq_len: int = 512, vocab_size: int = 330,
        name: str = "data.jsonl", **options: Any,
    ) -> Examples:  # fmt: skip
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        tokenizer = tokenizers(template, **options)
        return load_examples(tmp_path / name, tokenizer, seq_len=seq_len, vocab_size=vocab_size)

    return call


def fed(tokenizer: TrainingTokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """What Engine.chat_ids feeds, by the runtime's own code on the engine's files."""
    text = load_chat_template(tokenizer.templates.files).render(messages)
    return TextCodec(tokenizer.tokenizer.to_str().encode()).encode(text, special=False)


def answers(example: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """(where it starts, ids) of every run of tokens with loss."""
    found: list[tuple[int, list[int]]] = []
    labels = example["labels"].tolist()
    for place, label in enumerate(labels):
        if label != -100:
            assert label == example["input_ids"][place]
            if place and labels[place - 1] != -100:
                found[-1][1].append(label)
            else:
                found.append((place, [label]))
    return found


@pytest.mark.parametrize("template", [CHATML, THINKING, MARKED, MARKED_SHORT, MARKED_WIDE])
@pytest.mark.parametrize("first", ["On the mat.", "\n\nOn the mat", " on", "1. a\n\n2. b", "🎉"])
def test_every_answer_stands_once_behind_the_ids_that_the_engine_is_fed(load, tokenizers, template, first):
    talk = [TALK[0], {"role": "assistant", "content": first}, *TALK[2:]]
    tokenizer = tokenizers(template)
    found = [(example, run) for example in load([{"messages": talk}], template) for run in answers(example)]
    assert len(found) == 2
    for (example, (start, ids)), place in zip(found, (1, 3), strict=True):
        assert example["input_ids"][:start].tolist() == fed(tokenizer, talk[:place])
        assert ids.count(2) == 1
        assert ids[-1] == 2, "the model learns to stop, and nothing behind it"
        assert tokenizer.decode(ids).removeprefix("<think>\n\n</think>\n\n") == talk[place]["content"] + END


@pytest.mark.parametrize(("template", "count"), [(CHATML, 1), (MARKED, 1), (MARKED_WIDE, 1), (THINKING, 2)])
def test_a_conversation_is_one_example_unless_its_template_renders_earlier_answers_otherwise(load, template, count):
    examples = load([{"messages": TALK}], template)
    assert len(examples) == count
    assert examples.answer_tokens == sum(int((example["labels"] != -100).sum()) for example in examples)
    assert all(example["input_ids"][-1] == 2 for example in examples)


@pytest.mark.parametrize("template", [MARKED, MARKED_WIDE, MARKED_OTHER_PROMPT])
def test_the_templates_own_marks_are_those_of_transformers(load, tokenizers, tmp_path, template):
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(make_model(tmp_path / "m", template), local_files_only=True)
    expected = peer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = load([{"messages": TALK}], template)
    ids = example["input_ids"].tolist()
    assert ids == expected["input_ids"][: len(ids)]
    learned = (example["labels"] != -100).int().tolist()
    marked = expected["assistant_masks"][: len(ids)]
    if template is MARKED_WIDE:  # marks the header too, which the engine is given
        assert all(mark >= one for mark, one in zip(marked, learned, strict=True))
        assert sum(marked) > sum(learned)
    else:
        assert learned == marked
        assert sum(expected["assistant_masks"]) == sum(learned)


def test_a_prompt_that_is_no_beginning_of_the_answered_conversation_is_refused(load):
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: the chat template renders message 4") as caught:
        load([{"text": "a"}, {"messages": TALK}], OTHER_PROMPT)
    assert "generation" in caught.value.hint


def test_an_instruction_is_a_question_and_an_answer_in_the_chat_template(load, tokenizers):
    asked = {"role": "user", "content": "Say where.\n\nthe cat"}
    chat = {"messages": [asked, {"role": "assistant", "content": "On the mat."}]}
    bare = {"instruction": "Say where.", "output": "x", "text": "the formatted record, which has no answer"}
    first, second, third, fourth = load([INSTRUCTION, chat, {**INSTRUCTION, "input": None}, bare])
    assert first["input_ids"].equal(second["input_ids"])
    assert first["labels"].equal(second["labels"])
    assert answers(fourth)[0][0] == answers(third)[0][0] == len(fed(tokenizers(), [{**asked, "content": "Say where."}]))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("output", ["On the mat.", "\n\nx"])
def test_without_a_chat_template_an_instruction_is_an_alpaca_prompt_as_the_engine_tokenizes_it(
    load, tokenizers, bos, output
):
    record = {**INSTRUCTION, "output": output}
    tokenizer = tokenizers(None, bos=bos)
    (example,) = load([record], None, bos=bos)
    prompt = records.Instruction("", "Say where.", "the cat", "").prompt
    assert prompt.endswith("### Instruction:\nSay where.\n\n### Input:\nthe cat\n\n### Response:\n")
    ((start, ids),) = answers(example)
    assert example["input_ids"][:start].tolist() == tokenizer.encode(prompt, special=True)
    assert (example["input_ids"][0] == 1) == bos
    assert tokenizer.decode(ids) == output + END


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_is_learned_whole_and_ends(load, tokenizers, bos):
    (example,) = load([{"text": "the cat sat"}], bos=bos)
    ids = example["input_ids"].tolist()
    assert ids == [*tokenizers(bos=bos).encode("the cat sat", special=True), 2]
    assert (ids[0] == 1) == bos
    assert example["labels"][1:].tolist() == ids[1:]
    assert example["length"] == len(ids)
    (ended,) = load([{"text": f"the cat sat{END}"}], bos=bos)
    assert ended["input_ids"].tolist() == ids


def test_answers_that_the_engine_would_not_stop_after_are_counted(load):
    examples = load([{"messages": TALK}, {"text": "a b"}], NO_STOP)
    assert examples.unended == 2
    assert "2 answers without a token at which the engine stops" in examples.summary()
    assert load([{"messages": TALK}]).unended == 0


def test_tools_reach_the_template(load, tokenizers):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    record = {"messages": TALK[:2], "tools": [{"type": "function", "function": {"name": "f"}}]}
    with_tools, without = load([record, {"messages": TALK[:2]}], template)
    text = tokenizers(template).decode(with_tools["input_ids"].tolist())
    assert text.startswith('[{"type": "function"')
    assert answers(with_tools)[0][1] == answers(without)[0][1]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "DATA.JSON"])
def test_forms_mix_and_both_files_say_the_same(load, name):
    records = [{"text": "the cat\u2028 sat"}, INSTRUCTION, {"messages": TALK}]
    lines = ("\ufeff" + "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)).encode()
    listed = ("\ufeff" + json.dumps(records, indent=1, ensure_ascii=False)).encode()
    expected = [example["input_ids"].tolist() for example in load(records)]
    assert len(expected) == 3
    found = load(lines if name.endswith("l") else listed, name=name)
    assert [example["input_ids"].tolist() for example in found] == expected


@pytest.mark.parametrize("length", [2, 7, 64, 1000])
def test_a_text_file_is_packed_into_windows(load, tokenizers, length):
    text = "the cat sat\n\non the mat. 🐶 " * 9
    examples = load("\ufeff" + text.replace("\n", "\r\n"), name="a.txt", seq_len=length, bos=True)
    whole = [*tokenizers(bos=True).encode(text, special=True), 2]
    found = [token for example in examples for token in example["input_ids"].tolist()]
    assert found == whole[: len(found)]
    assert len(whole) - len(found) <= 1, "a single token at the end predicts nothing"
    assert set(examples.lengths[:-1]) <= {length}
    assert examples.answer_tokens == examples.tokens - len(examples)


def test_pieces_of_a_long_text_join_to_the_text_and_end_at_lines(tmp_path, monkeypatch, tokenizers):
    monkeypatch.setattr(data_files, "PIECE", 64)
    monkeypatch.setattr(data_files, "_LONGEST", 256)
    text = "".join(f"line {n} of the dög 🐶\n{' ' * (n % 3)}" for n in range(40)) + "x🐶" * 300
    (tmp_path / "a.txt").write_text(text)
    pieces = list(data_files.text_pieces(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 256 + 64
    assert sum(piece.endswith("\n") for piece in pieces) > 10
    tokenizer = tokenizers()
    lines = [piece for piece in pieces if piece.endswith("\n")]
    apart = [token for piece in lines for token in tokenizer.encode(piece, special=False)]
    assert apart == tokenizer.encode("".join(lines), special=False)


def test_long_records_are_cut_from_the_right_and_those_without_an_answer_are_dropped_and_counted(load):
    records = [{"messages": TALK}, {"text": "the cat " * 20}, {**INSTRUCTION, "instruction": "where " * 40}]
    whole = load(records)
    cut = load(records, seq_len=60)
    assert (cut.dropped, cut.truncated, whole.dropped, whole.truncated) == (1, 1, 0, 0)
    assert cut.lengths == [min(length, 60) for length in whole.lengths[:2]]
    for short, long in zip(cut, whole, strict=False):
        assert short["input_ids"].tolist() == long["input_ids"][:60].tolist()
        assert short["labels"].tolist() == long["labels"][:60].tolist()
    assert "1 dropped" in cut.summary()
    assert "1 cut" in cut.summary()


def test_if_all_are_dropped_the_hint_is_the_length_that_is_enough(load):
    records = [{**INSTRUCTION, "input": "cat " * 20}, INSTRUCTION]
    with pytest.raises(InputError, match="any of the 2 records within 8 tokens") as caught:
        load(records, seq_len=8)
    needed = int(caught.value.hint.split()[1])
    assert len(load(records, seq_len=needed)) == 1
    with pytest.raises(InputError):
        load(records, seq_len=needed - 1)


def test_a_batch_is_padded_right_to_a_multiple_and_padding_changes_no_loss(load, tiny_model):
    from transformers import AutoModelForCausalLM

    examples = load([INSTRUCTION, {"text": "the cat sat"}, {"messages": TALK}])
    batch = Collate(pad_id=2)(list(examples))
    assert batch["input_ids"].shape == (3, -(-max(examples.lengths) // 8) * 8)
    assert batch["attention_mask"].sum(1).tolist() == examples.lengths
    assert (batch["labels"] != -100).sum() == examples.answer_tokens
    for row, example in enumerate(examples):
        length = example["length"]
        assert batch["input_ids"][row, :length].equal(example["input_ids"])
        assert batch["labels"][row, :length].equal(example["labels"])
        assert (batch["input_ids"][row, length:] == 2).all()
        assert (batch["labels"][row, length:] == -100).all()
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama16", vocab_size=330), dtype=torch.float64)
    with torch.no_grad():
        together = model(**batch).loss * examples.answer_tokens
        singly = [
            model(input_ids=e["input_ids"][None], labels=e["labels"][None]).loss * (e["labels"] != -100).sum()
            for e in examples
        ]
    assert float(together) == pytest.approx(float(sum(singly)), rel=1e-9)


def test_the_trainer_groups_by_length_and_trains(load, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    examples = load([{"text": "the cat " * n} for n in range(1, 33)])
    order = list(LengthGroupedSampler(4, examples, generator=torch.Generator().manual_seed(0)))
    assert sorted(order) == list(range(32))
    batches = [[examples.lengths[place] for place in order[start : start + 4]] for start in range(0, 32, 4)]
    unsorted = [examples.lengths[start : start + 32 : 8] for start in range(8)]
    assert sum(map(max, batches)) < sum(map(max, unsorted))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, train_sampling_strategy="group_by_length",
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    train, held_out = split(examples, 4, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama16", vocab_size=330))
    trainer = Trainer(model, arguments, Collate(2), train_dataset=train, eval_dataset=held_out)
    assert trainer.train().training_loss == pytest.approx(torch.log(torch.tensor(330.0)).item(), abs=1)
    assert all("eval_loss" in log for log in trainer.state.log_history[:2])


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 0.999999, 1, 3, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_is_a_partition_with_two_sides_and_the_same_each_time(load, fraction, seed):
    examples = load(
        [{"messages": [{"role": "user", "content": str(n)}, TALK[1], *TALK[2:]]} for n in range(10)], THINKING
    )
    assert len(examples) == 20
    train, held_out = split(examples, fraction, seed)
    assert held_out is not None
    assert not set(train.records) & set(held_out.records), "both examples of a conversation are on one side"
    assert len(train) + len(held_out) == 20
    assert train.tokens + held_out.tokens == examples.tokens
    assert train.answer_tokens + held_out.answer_tokens == examples.answer_tokens
    count = fraction if fraction >= 1 else min(max(round(10 * fraction), 1), 9)
    assert len(held_out) == 2 * count
    again = split(load([{"text": f"{n} a"} for n in range(10)]), fraction, seed)[1]
    assert again is not None
    assert set(again.records) == set(held_out.records)


def test_a_draw_is_the_same_on_every_machine_and_version(load):
    held_out = split(load([{"text": f"{n} a"} for n in range(10)]), 3, 0)[1]
    assert held_out is not None
    assert held_out.records.tolist() == [4, 7, 9]


def test_a_split_that_cannot_be(load):
    examples = load([{"text": f"{n} a"} for n in range(4)])
    assert split(examples, 0, 0) == (examples, None)
    for fraction in (4, 5, -0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(InputError) as caught:
            split(examples, fraction, 0)
        assert caught.value.hint
    with pytest.raises(InputError, match="leave none"):
        split(load([{"text": "a b"}]), 0.5, 0)


def test_examples_survive_pickling_and_iteration_ends(load):
    examples = load([INSTRUCTION, {"text": "a b"}])
    copy = pickle.loads(pickle.dumps(split(examples, 1, 0)[0]))
    assert len(list(copy)) == len(copy) == 1
    with pytest.raises(IndexError):
        examples[2]


MESSAGE = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl", b"", "no records"),
        ("a.jsonl", b"\n \n", "no records"),
        ("a.json", b"", "no records"),
        ("a.json", b"[]", "no records"),
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n", "no text"),
        ("a.csv", b"a", "'.csv'"),
        ("data", b"a", "without a suffix"),
        ("a.txt", b"ab\ncd\xff", "line 2: not UTF-8"),
        ("a.txt", b"ab\n\xf0\x9f", "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a b"}\n{"text": "\xff"}', "line 2: not UTF-8"),
        ("a.jsonl", '{"text": "a b"}'.encode("utf-16"), "line 1: not UTF-8"),
        ("a.json", b'[\n{"text": "\xff"}]', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a b"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a b"} {"text": "a b"}', "line 1: not JSON (Extra data)"),
        ("a.jsonl", b'{\n"text": "a b"}', "line 1: not JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON (nested too deeply)"),
        ("a.jsonl", b"1" * 5000, "line 1: not JSON"),
        ("a.json", b'[{"text": "a b"},\n{"text": }]', "line 2: not JSON"),
        ("a.json", b'[{"text": "a b"}\n{"text": "a b"}]', "line 2: not JSON (no comma"),
        ("a.json", b'[{"text": "a b"},\n]', "line 2: not JSON (a comma"),
        ("a.json", b'[{"text": "a b"}\n', "line 2: not JSON (the list has no end"),
        ("a.json", b'[{"text": "a b"},\n', "line 2: not JSON"),
        ("a.json", b'[{"text": "a b"}]\n[]', "more text"),
        ("a.json", b'{"text": "a b"}\n{"text": "a b"}', "line 2: not JSON"),
        ("a.json", b'{"text": "a b"}', "one object where a list"),
        ("a.json", b'[\n{"text": "a b"},\n\n{"text": 3}]', 'line 4: "text" is a number'),
        ("a.jsonl", b'"text"', "line 1: a string where a record"),
        ("a.jsonl", b"null", "line 1: a null where a record"),
        ("a.jsonl", b"{}", "line 1: a record of nothing"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}', 'line 1: a record of "prompt", "completion" has no known'),
        ("a.jsonl", b'{"text": ""}', '"text" is empty'),
        ("a.jsonl", b'{"text": ["a"]}', '"text" is a list'),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: the text is not valid Unicode"),
        ("a.jsonl", b'{"instruction": "a", "input": "b"}', 'without an "output"'),
        ("a.jsonl", b'{"instruction": "a", "output": null}', '"output" is a null'),
        ("a.jsonl", b'{"instruction": "a", "output": " \\n"}', '"output" is empty'),
        ("a.jsonl", b'{"instruction": "", "output": "b"}', '"instruction" is empty'),
        ("a.jsonl", b'{"instruction": "a", "input": 1, "output": "b"}', '"input" is a number'),
        ("a.jsonl", [{"messages": []}], "no list of messages"),
        ("a.jsonl", [{"messages": "Hi"}], "no list of messages"),
        ("a.jsonl", [{"messages": ["Hi"]}], "message 1: a string where a message"),
        ("a.jsonl", [{"messages": [MESSAGE]}], "no message of the assistant"),
        ("a.jsonl", [{"messages": [ANSWER, MESSAGE]}], "starts with the assistant"),
        ("a.jsonl", [{"messages": [MESSAGE, {**ANSWER, "role": "gpt"}]}], "message 2: unknown role 'gpt'"),
        ("a.jsonl", [{"messages": [MESSAGE, {"content": "Ho"}]}], "message 2: unknown role 'None'"),
        ("a.jsonl", [{"messages": [MESSAGE, {**ANSWER, "content": " "}]}], "message 2: the assistant's answer is"),
        ("a.jsonl", [{"messages": [MESSAGE, {**ANSWER, "content": None}]}], "message 2: \"content\" is a null"),
        ("a.jsonl", [{"messages": [{**MESSAGE, "content": ["Hi"]}, ANSWER]}], 'message 1: "content" is a list'),
        ("a.jsonl", [{"messages": [MESSAGE, {**ANSWER, "tool_calls": "f"}]}], '"tool_calls" is no list'),
        ("a.jsonl", [{"messages": [MESSAGE, ANSWER], "tools": {}}], '"tools" is no list'),
    ],
)  # fmt: skip
def test_malformed_data_is_refused_with_place_and_way_out(load, tmp_path, name, content, cause):
    with pytest.raises(InputError) as caught:
        load(content, name=name)
    assert caught.value.message.startswith(str(tmp_path / name))
    assert cause in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.jsonl", "missing.txt", "folder.json"])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, tokenizers, name):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=name) as caught:
        load_examples(tmp_path / name, tokenizers(), seq_len=8, vocab_size=330)
    assert caught.value.hint


def test_what_the_model_or_its_template_cannot_take_is_refused_by_line(load):
    messages = {"messages": TALK}
    with pytest.raises(InputError, match="line 2: the model has no chat template"):
        load([INSTRUCTION, messages], None)
    refusing = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(InputError, match="line 2: the model's chat template refuses these messages: no system"):
        load([messages, {"messages": [{"role": "system", "content": "x"}, *TALK]}], refusing)
    with pytest.raises(InputError, match=r"line 2: token 3\d\d is outside of the model's vocabulary of 300"):
        load([{"text": "zq"}, messages], vocab_size=300)
    with pytest.raises(InputError, match="sequence length of 1"):
        load([messages], seq_len=1)


def test_a_model_without_a_usable_tokenizer_is_refused(tmp_path):
    model = make_model(tmp_path / "m")
    (model / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match="chat template cannot be read"):
        read_training_tokenizer(model)
    (model / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_training_tokenizer(model)
    (model / "chat_template.jinja").unlink()
    assert not read_training_tokenizer(model).has_chat
    (model / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(CheckpointError, match="'two' stands where"):
        read_training_tokenizer(model)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        read_training_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        read_training_tokenizer(model)
    with pytest.raises(CheckpointError, match="not a model directory"):
        read_training_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "end", "stops", "pad"),
    [
        ({}, 2, {0, 2}, 2),
        ({"eos_token_id": 0}, 0, {0}, 2),  # the engine would run past the tokenizer's end of text
        ({"eos_token_id": None, "pad_token_id": None}, 2, {2}, 2),
        ({"pad_token_id": 400}, 2, {0, 2}, 2),
    ],
)
def test_ends_and_padding_are_the_engines(tmp_path, config, end, stops, pad):
    tokenizer = read_training_tokenizer(make_model(tmp_path / "m", **config))
    assert (tokenizer.end_id, tokenizer.stop_ids, tokenizer.pad_id) == (end, stops, pad)


def test_a_gguf_has_a_tokenizer_too(tiny_model, tmp_path):
    from as_gguf import write_gguf

    gguf = write_gguf(tiny_model("llama16", vocab_size=260), tmp_path / "g" / "model.gguf", pre="smollm")
    tokenizer = read_training_tokenizer(gguf.parent)
    assert (tokenizer.end_id, tokenizer.stop_ids, tokenizer.has_chat) == (2, {2, 3}, False)
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "1 2"}')
    (example,) = load_examples(tmp_path / "a.jsonl", tokenizer, seq_len=256, vocab_size=260)
    assert tokenizer.decode(answers(example)[0][1]) == "1 2" + END


def test_a_large_file_is_read_record_by_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "the cat " * 200}) + "\n") * 3000)
    tracemalloc.start()
    count = sum(1 for _ in data_files.json_values(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < path.stat().st_size / 10


@pytest.mark.real
def test_smollm2_is_trained_on_the_ids_of_transformers_chat(smollm2, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = read_training_tokenizer(smollm2)
    peer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps(INSTRUCTION))
    chat, instruction = load_examples(tmp_path / "a.jsonl", tokenizer, seq_len=256, vocab_size=49152)
    whole = peer.apply_chat_template(TALK, return_dict=False)
    assert chat["input_ids"].tolist() == whole[:-1], "all but the line break behind the last end of turn"
    for place, (start, ids) in zip((1, 3), answers(chat), strict=True):
        prompt = peer.apply_chat_template(TALK[:place], add_generation_prompt=True, return_dict=False)
        assert chat["input_ids"][:start].tolist() == prompt == fed(tokenizer, TALK[:place])
        assert peer.decode(ids) == TALK[place]["content"] + END
    assert peer.decode(answers(instruction)[0][1]) == "On the mat." + END
