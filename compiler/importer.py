"""model_dir → onnx_ir.Model: plain opset-24 ONNX whose weights are lazy and whose linears are all claimed.

The only file that knows mobius-onnx. It builds the graph from config.json without reading a weight, under an execution
provider of our own that leaves standard operators alone; its fusions to contrib operators are not function-preserving
and are not used.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from rqc.compiler.rope import exact_rope
from rqc.compiler.variants import heeded
from rqc.compiler.windows import add_sliding_windows
from rqc.models.checkpoint import Checkpoint, read_config
from rqc.models.description import EMBEDDING, HEAD, Architecture, Description, require_claim, segments
from rqc.models.families import Family, family_of
from rqc.models.weights import Weight
from rqc.passes.base import LINEAR, initializer, insert_after, replace_uses, set_weight, sizes, weight_of
from rqc.runtime.errors import CheckpointError, UnsupportedModelError

PROVIDER = "rqc"
DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Buffers of old checkpoints that follow from the config."""
ROWS_COMPARED = 2048


@dataclass(frozen=True)
class Imported:
    """A model on its way through the compiler: the graph, what the algebra knows of it, and the Hugging Face config."""

    model: ir.Model
    description: Description
    checkpoint: Checkpoint
    config: dict[str, Any]


def import_model(model_dir: str | Path) -> Imported:
    """Build the standard ONNX graph of a model directory (or a GGUF file); weights stay in their files.

    Raises CheckpointError (missing, damaged or mismatched files) and UnsupportedModelError (unknown family, unclaimed
    linear).
    """
    raw = read_config(model_dir)
    family = family_of(str(raw.get("model_type")))
    checkpoint = Checkpoint.open(model_dir)
    settings = heeded(full_config(checkpoint.directory))
    settings.tie_word_embeddings = settings.tie_word_embeddings and not _has_own_head(checkpoint)
    config = settings.to_dict()
    architecture = _architecture(config)
    model = _skeleton(settings)
    exact_rope(model, settings, architecture)
    description = Description.of(architecture, model.graph.initializers)
    _add_dropped_biases(model, description, checkpoint)
    if architecture.tied:
        _tie(model)
    _attach_weights(model, description, checkpoint, family)
    _mark_linears(model, description)
    _exact_embedding_scale(model, architecture)
    _exact_attention_scale(model, config)
    add_sliding_windows(model, config, architecture)
    _check_all_used(model, checkpoint, architecture)
    return Imported(model, description, checkpoint, config)


def full_config(model_dir: Path) -> Any:
    """The transformers config of a model directory, defaults filled in. Raises CheckpointError if it is not usable."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # validators of config classes raise what they like, ZeroDivisionError included
        raise CheckpointError(f"config.json of {model_dir} is not usable: {error}", hint="download it again") from error


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint stores a head that is not the embedding: transformers then ties nothing, whatever
    config.json says. Both tables are read, in pieces, only where both are stored."""
    if HEAD not in checkpoint or EMBEDDING not in checkpoint:
        return False
    shape = checkpoint.info(HEAD).shape
    if shape != checkpoint.info(EMBEDDING).shape:
        return True
    pieces = ((start, start + ROWS_COMPARED) for start in range(0, shape[0], ROWS_COMPARED))
    return any(not np.array_equal(checkpoint.read(HEAD, *rows), checkpoint.read(EMBEDDING, *rows)) for rows in pieces)


def _architecture(config: dict[str, Any]) -> Architecture:
    try:
        return Architecture.from_config(config)
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}", hint="download it again") from error


def _skeleton(config: Any) -> ir.Model:
    """The importer's graph for a transformers config; no weight is looked at."""
    import mobius

    logging.getLogger("mobius").setLevel(logging.ERROR)  # what it warns of (dropped windows) is put right below
    capabilities = mobius.EpCapabilities(name=PROVIDER, supports_skip_layer_norm=False)
    mobius.register_ep(capabilities, overwrite=True)
    with warnings.catch_warnings(), TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        config.save_pretrained(directory)
        try:
            package = mobius.build(directory, execution_provider=PROVIDER, load_weights=False, dtype="f32")
        except Exception as error:  # of whatever kind: a setting that the importer does not take
            raise UnsupportedModelError(f"the importer cannot build this {config.model_type}: {error}") from error
    model: ir.Model = package["model"]
    model.graph.name = "model"  # by default the directory, which is not to be part of an engine
    foreign = sorted({node.domain for node in model.graph if node.domain})
    if foreign:
        raise UnsupportedModelError(f"the importer left operators of domain {foreign[0]!r} in the graph")
    return model


def _exact_embedding_scale(model: ir.Model, architecture: Architecture) -> None:
    """Gemma multiplies embeddings with √hidden; the skeleton rounds that constant to bfloat16, a float32 model does
    not."""
    if not architecture.model_type.startswith("gemma"):
        return
    root = np.asarray(architecture.hidden_size**0.5, np.float32)
    for node in model.graph:
        constants = [value for value in node.inputs if value is not None and value.is_initializer()]
        if node.op_type == "Mul" and "embed_tokens" in (node.name or "") and len(constants) == 1:
            exact = initializer(model, "rqc.embedding_scale", root)
            node.replace_input_with(list(node.inputs).index(constants[0]), exact)
            return
    raise UnsupportedModelError(f"{architecture.model_type}: the graph does not scale its embeddings")


def _exact_attention_scale(model: ir.Model, config: dict[str, Any]) -> None:
    """Gemma's query_pre_attn_scalar replaces the head size in 1/√d; the skeleton of Gemma 3 passes it over."""
    scalar = config.get("query_pre_attn_scalar")
    for node in model.graph:
        if node.op_type != "Attention":
            continue
        if scalar:
            node.attributes["scale"] = ir.AttrFloat32("scale", float(scalar) ** -0.5)
        elif "scale" in node.attributes:  # Granite's multiplier may be a whole number in config.json
            node.attributes["scale"] = ir.AttrFloat32("scale", float(node.attributes["scale"].value))


def _add_dropped_biases(model: ir.Model, description: Description, checkpoint: Checkpoint) -> None:
    """Put back biases that the checkpoint has and the skeleton lacks (a Llama with mlp_bias or a biased o_proj)."""
    for node in list(model.graph):
        name = _weight_name(node) if node.op_type == "MatMul" else None
        claim = description.by_weight.get(name or "")
        if claim is None or claim.bias not in checkpoint or claim.bias in model.graph.initializers:
            continue
        bias = ir.Value(name=claim.bias)
        set_weight(bias, Weight(checkpoint, claim.bias, checkpoint.info(claim.bias).shape))
        model.graph.register_initializer(bias)
        add = ir.node("Add", [node.outputs[0], bias], name=(node.name or "").replace("MatMul", "Add"))
        old, new = node.outputs[0], add.outputs[0]
        new.name, new.shape, new.type = f"{old.name}.biased", old.shape, old.type
        insert_after(node, [add])
        replace_uses(old, new, keep=[add])


def _check_all_used(model: ir.Model, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise UnsupportedModelError if the graph leaves a tensor of the checkpoint unread: the function would be another
    one."""
    read = {weight.name for value in model.graph.initializers.values() if (weight := weight_of(value)) is not None}
    for name in checkpoint.tensors:
        derived = name.endswith(DERIVED) or (architecture.tied and name == HEAD)
        if name not in read and not derived:
            raise UnsupportedModelError(
                f"{architecture.model_type}: the graph does not use tensor {name!r} of the checkpoint",
                hint="rqc does not know this variant of the architecture",
            )


def _tie(model: ir.Model) -> None:
    """Let the head read the embedding's table where the graph gives it a parameter of its own: stored once."""
    head = model.graph.initializers.pop(HEAD, None)
    users = [] if head is None else list(head.uses())
    for user, index in users:
        user.replace_input_with(index, model.graph.initializers[EMBEDDING])


def _attach_weights(model: ir.Model, description: Description, checkpoint: Checkpoint, family: Family) -> None:
    """Give every initializer that the skeleton left empty its lazy weight, with shapes checked against the
    checkpoint."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        source, start, packed = _source(name, description, checkpoint, family)
        stored = checkpoint.info(source).shape
        shape = sizes(value)
        whole = stored == shape
        part = packed and stored[1:] == shape[1:] and start + shape[0] <= stored[0]
        if not whole and not part:
            raise CheckpointError(
                f"tensor {source!r} has shape {list(stored)}, config.json asks for {list(shape)}",
                hint="config.json and weights are of different models; download both again",
            )
        set_weight(value, Weight(checkpoint, source, shape, start))


def _source(name: str, description: Description, checkpoint: Checkpoint, family: Family) -> tuple[str, int, bool]:
    """The checkpoint tensor behind a graph parameter, its first row there, and whether it is part of a packed
    tensor."""
    claim = description.by_weight.get(name)
    if name in checkpoint or claim is None:
        return name, 0, False
    for path, source, packed in family.sources:
        if path != claim.linear.path:
            continue
        expert = claim.weight.split("experts.")[1].split(".")[0] if claim.expert else ""
        stem, tail = claim.weight.rsplit(path.replace("{e}", expert), 1)
        first = segments(packed, description.sizes())[claim.linear.writes[0]].start if packed else 0
        return stem + source.replace("{e}", expert) + tail, first, bool(packed)
    return name, 0, False


def _mark_linears(model: ir.Model, description: Description) -> None:
    """Write on every MatMul of a weight which parameter it multiplies with; fail on one that no description claims."""
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        name = _weight_name(node)
        if name is None:
            continue
        if name not in (HEAD, EMBEDDING):
            claim = require_claim(description, name)
            shape = sizes(model.graph.initializers[name])
            if shape != description.shape(claim):
                raise UnsupportedModelError(
                    f"{name!r} has shape {shape}, its description says {description.shape(claim)}"
                )
        node.metadata_props[LINEAR] = HEAD if name == EMBEDDING else name


def _weight_name(node: ir.Node) -> str | None:
    """The initializer that a MatMul reads, directly or through the importer's Transpose."""
    right = node.inputs[1]
    producer = right.producer() if right is not None else None
    if producer is not None and producer.op_type == "Transpose":
        right = producer.inputs[0]
    return right.name if right is not None and right.is_initializer() else None
