"""A model run layer by layer is the model; streams on the disk are whole or absent."""

import resource

import pytest
import torch
from conftest import TINY, VARIANTS, make_llama
from transformers import LlamaForCausalLM

from run_moefication.moefication.artifacts.streams import Streams
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.layers.decoder import PreMLP, embed
from run_moefication.moefication.layers.mlp import GatedMLP
from run_moefication.moefication.storage.folder import ArtifactWriter
from run_moefication.moefication.storage.manifest import Claim
from run_moefication.moefication.text.batches import Batch, batches_of

# The same float32 products in another batch shape.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
LENGTHS = [9, 1, 24, 100, 2, 24, 7]


def random_blocks(lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, TINY["vocab_size"], (length,), generator=generator).int() for length in lengths]


# ---------------------------------------------------------------------------------------------------- the walk


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_by_layer_is_the_model(variant, batch_size, tmp_path):
    checkpoint = DenseCheckpoint(str(make_llama(tmp_path, **VARIANTS[variant])))
    config, blocks = checkpoint.config, random_blocks()
    batches = batches_of(blocks, batch_size, num_held_out=2)
    stream = torch.full((sum(LENGTHS), config.hidden_size), float("nan"))
    embed(stream, blocks, batches, checkpoint.tensor("embed_tokens.weight"))
    model = LlamaForCausalLM.from_pretrained(checkpoint.path).eval()
    seen = []  # by the MLPs
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        states = [model(block[None].long(), output_hidden_states=True).hidden_states for block in blocks]
    for index in range(config.num_hidden_layers):
        torch.testing.assert_close(stream, torch.cat([s[index][0] for s in states]), **TOLERANCE)
        half = PreMLP.of_dense(checkpoint, index, "cpu")
        mlp = GatedMLP.of_dense(checkpoint, index, "cpu")
        of_mlp = []
        with torch.no_grad():
            for batch in batches:
                before_mlp, inputs = half(stream[batch.rows], batch)
                of_mlp.append(inputs)
                stream[batch.rows] = before_mlp + mlp.output(mlp.activations(inputs))
        torch.testing.assert_close(torch.cat(of_mlp), torch.cat(seen[index :: config.num_hidden_layers]), **TOLERANCE)
    assert stream.std() > 0.5
    # The last of the hidden states is normalised.
    normed = model.model.norm(stream)
    torch.testing.assert_close(normed, torch.cat([s[-1][0] for s in states]), **TOLERANCE)


def test_half_precision_weights_are_computed_with_in_float32(tmp_path):
    checkpoint = DenseCheckpoint(str(make_llama(tmp_path, dtype=torch.bfloat16)))
    half = PreMLP(checkpoint.config, lambda name: checkpoint.tensor(f"layers.0.{name}"), "cpu")
    batch = Batch(slice(0, 12), [12])
    stream = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    layer = LlamaForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval().model.layers[0]
    inputs = []
    layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    rotary = LlamaForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).model.rotary_emb
    with torch.no_grad():
        layer(stream[None], position_embeddings=rotary(stream[None], torch.arange(12)[None]))
        found = half(stream, batch)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, inputs[0], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_tokens_rows_in_float32(dtype):
    blocks, weight = random_blocks(), torch.randn(TINY["vocab_size"], 5).to(dtype)
    stream = torch.empty(sum(LENGTHS), 5)
    embed(stream, blocks, batches_of(blocks, 2, 1), weight)
    assert torch.equal(stream, torch.cat([weight[block.long()].float() for block in blocks]))


# ---------------------------------------------------------------------------------------------------- streams

SHAPE = (2, 5, 3)


@pytest.fixture
def writer(tmp_path) -> ArtifactWriter:
    return ArtifactWriter(tmp_path / "folder", Claim("calibrate", {}, {"fingerprint": "abc"}, {}), ["only"])


def test_what_is_committed_is_read_again_by_another_process(writer):
    values = torch.randn(SHAPE)
    streams = Streams(writer, SHAPE)
    assert not streams.has(1)
    streams.begin(1).copy_(values)
    assert not streams.has(1)  # begun is not whole
    streams.commit(1)
    assert Streams(writer, SHAPE).has(1)
    assert torch.equal(Streams(writer, SHAPE).before(1), values)
    assert not streams.has(0)
    streams.remove(1)
    assert not streams.has(1)
    streams.remove(1)  # twice does not matter


def test_a_stream_begun_twice_is_the_second_one(writer):
    streams = Streams(writer, SHAPE)
    streams.begin(0).fill_(1)
    second = streams.begin(0)
    assert (second == 0).all()
    streams.commit(0)
    assert (streams.before(0) == 0).all()


@pytest.mark.parametrize("damage", ["missing", "begun", "cut", "of more tokens"])
def test_streams_that_are_not_whole_are_refused_by_name(damage, writer):
    streams = Streams(writer, SHAPE)
    streams.begin(2).fill_(1)
    path = writer.scratch("streams.2")
    if damage != "begun":
        streams.commit(2)
    if damage == "missing":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "of more tokens":
        streams = Streams(writer, (2, 4, 3))
    with pytest.raises(MoEficationError, match=r"streams\.2\.scratch is missing or cut; run again with overwrite"):
        streams.before(2)


def test_finishing_takes_the_streams_away(writer):
    streams = Streams(writer, SHAPE)
    for layer in (0, 1):
        streams.begin(layer)
        streams.commit(layer)
    streams.begin(2)  # of a run that died
    writer.write_piece("only", {"file": writer.write("file", lambda file: file.write(b"x"))})
    assert writer.finish()
    assert {path.name for path in writer.folder.rglob("*")} == {"file", "manifest.json"}


def test_no_room_for_a_stream_is_an_error_before_it_is_filled(writer):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            Streams(writer, SHAPE).begin(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
