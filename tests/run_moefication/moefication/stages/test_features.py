"""What is recorded is what the MLPs of the dense model see, each token once, without padding."""

import shutil

import pytest
import torch
from conftest import change_weights, make_llama
from pipeline import GATE, UP, Pipeline, contents, corpus_of, limited_files, load, mlp_inputs

from run_moefication.moefication.artifacts.features import Features
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.stages import features
from run_moefication.moefication.stages.features import extract_features
from run_moefication.moefication.text.corpus import Corpus
from run_moefication.settings import FeatureSettings

# The same float32 products in another batch shape.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(checkpoint, text_folder) -> Corpus:
    return corpus_of(checkpoint, text_folder, None, block_size=16, max_tokens=200)


def extract(checkpoint, corpus, folder, **options) -> None:
    settings = FeatureSettings(**({"dtype": "float32"} | options))
    assert extract_features(checkpoint, corpus, folder, settings).finished


@pytest.mark.parametrize(
    ("template", "batch_size", "save_interval"), [(GATE, 1, 1), (UP, 4, 1), (GATE, 3, 2), (UP, 100, 1)]
)
def test_features_are_the_models_own(template, batch_size, save_interval, checkpoint, corpus, tmp_path):
    assert len({len(block) for block in corpus.blocks}) > 1  # shorter blocks sit among the others
    extract(checkpoint, corpus, tmp_path, templates=template, batch_size=batch_size, save_interval=save_interval)
    features = Features(tmp_path / "tiny-llama-Hidden-Features", checkpoint, template)
    assert features.num_tokens == 200
    model = load(checkpoint.path)
    for layer in (0, 2):
        mlp, inputs = model.model.layers[layer].mlp, mlp_inputs(model, layer, corpus.blocks)
        with torch.no_grad():
            activations = torch.nn.functional.silu(mlp.gate_proj(inputs))
            activations = activations * mlp.up_proj(inputs) if template == UP else activations
        assert inputs.std() > 0.1
        assert torch.allclose(torch.cat(list(features.inputs(layer))), inputs, atol=TOLERANCE)
        assert torch.allclose(torch.cat(list(features.gate_outputs(layer))), activations, atol=TOLERANCE)


def test_inputs_alone_give_the_same_gates(text_folder, tmp_path):
    """Activations are then computed anew from the weights, biases included."""
    model, gates = make_llama(tmp_path / "biased", mlp_bias=True), []
    for feature_format in ("full", "inputs"):
        run = Pipeline(model, text_folder, tmp_path / feature_format, select_options=["--gate_network", "linear"])
        run.feature_options += ["--dtype", "float32", "--feature_format", feature_format]
        assert [run.split(), run.features(), run.select()] == [0, 0, 0]
        assert (run.features_folder / "hidden_gate_outputs").exists() == (feature_format == "full")
        gates.append(torch.load(run.select_folder / GATE.format(1), weights_only=True))
    torch.testing.assert_close(gates[1], gates[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_dtype(dtype, checkpoint, corpus, tmp_path):
    extract(checkpoint, corpus, tmp_path, dtype=dtype, feature_format="inputs")
    shard = torch.load(tmp_path / "tiny-llama-Hidden-Features" / "hidden_inputs" / "0_0.pth", weights_only=True)
    assert {tensor.dtype for tensor in shard.values()} == {getattr(torch, dtype)}
    assert list(shard) == [0, 1, 2]
    # Nothing but the tensors' own bytes: a view would drag its whole storage along.
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize for tensor in shard.values())


def test_values_beyond_the_stored_dtype_are_refused(text_folder, tmp_path):
    folder = make_llama(tmp_path / "loud")
    norm = "model.layers.1.post_attention_layernorm.weight"
    change_weights(folder, lambda state: state[norm].fill_(1e6))
    checkpoint = DenseCheckpoint(str(folder))
    corpus = corpus_of(checkpoint, text_folder, None, block_size=16, max_tokens=100)
    words = r"hidden_inputs of layer 1 are not finite in torch.float16 in blocks 0 to"
    with pytest.raises(MoEficationError, match=words):
        extract(checkpoint, corpus, tmp_path, dtype="float16")
    extract(checkpoint, corpus, tmp_path, dtype="bfloat16")  # in the same folder, where nothing was written


def test_rank_outside_of_the_world_is_refused(checkpoint, corpus, tmp_path):
    with pytest.raises(MoEficationError, match="RANK 2 is outside of WORLD_SIZE 2"):
        extract_features(checkpoint, corpus, tmp_path, FeatureSettings(), rank=2, world_size=2)


def test_lack_of_room_is_foreseen(checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    # 200 tokens, 3 layers, 32 + 64 floats of 4 bytes: 0.2 MB
    with pytest.raises(MoEficationError, match=r"needs about 0.0 GB and 0.0 GB are free"):
        extract(checkpoint, corpus, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_written_already_needs_no_room(checkpoint, corpus, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def fails_at_the_last(writer, number, features):
        if number == 3:
            raise Stop
        written(writer, number, features)

    settings, written = FeatureSettings(batch_size=4, save_interval=1, dtype="float32"), features._write_shard
    monkeypatch.setattr(features, "_write_shard", fails_at_the_last)
    with pytest.raises(Stop):
        extract_features(checkpoint, corpus, tmp_path, settings)
    monkeypatch.undo()
    # Of 4 shards the last is missing: less than a third of 200 tokens, 3 layers, 32 + 64 floats of 4 bytes.
    room = 200 * 3 * 96 * 4 // 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, room))
    with pytest.raises(MoEficationError, match="GB are free"):
        extract_features(checkpoint, corpus, tmp_path / "anew", settings)
    assert extract_features(checkpoint, corpus, tmp_path, settings).finished


def test_a_full_disk_ends_the_run(checkpoint, corpus, tmp_path):
    """Files are written beside the forward pass, and a failure there is the run's; with room again, it goes on."""
    with limited_files(10_000), pytest.raises(OSError, match="File too large"):
        extract(checkpoint, corpus, tmp_path / "full", batch_size=4)
    for name in ("full", "whole"):
        extract(checkpoint, corpus, tmp_path / name, batch_size=4)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")
