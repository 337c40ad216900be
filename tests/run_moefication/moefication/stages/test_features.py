"""What is recorded is what the MLPs of the dense model see, each token once, without padding."""

import pytest
import torch
from conftest import make_llama
from pipeline import corpus_of
from transformers import LlamaForCausalLM

from run_moefication.moefication.artifacts.features import Features
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.layers.mlp import GatedMLP
from run_moefication.moefication.stages.features import extract_features
from run_moefication.moefication.text.corpus import Corpus
from run_moefication.settings import FeatureSettings

GATE, UP = "layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"
# The same float32 products in another batch shape.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tiny_llama) -> DenseCheckpoint:
    return DenseCheckpoint(str(tiny_llama))


@pytest.fixture(scope="module")
def corpus(checkpoint, text_folder) -> Corpus:
    return corpus_of(checkpoint, text_folder, None, block_size=16, max_tokens=200)


def extract(checkpoint, corpus, folder, **options) -> None:
    processes = {name: options.pop(name) for name in ("rank", "world_size") if name in options}
    settings = FeatureSettings(**({"dtype": "float32"} | options))
    assert extract_features(checkpoint, corpus, folder, settings, **processes).finished


def naive_features(folder, blocks, layer, template) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and activations of one layer, block by block, from a plain forward pass of the whole model."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    mlp = model.model.layers[layer].mlp
    seen = []
    mlp.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    with torch.no_grad():
        for block in blocks:
            model(block[None].long())
        inputs = torch.cat(seen)
        activations = torch.nn.functional.silu(mlp.gate_proj(inputs))
        return inputs, activations * mlp.up_proj(inputs) if template == UP else activations


@pytest.mark.parametrize("template", [GATE, UP])
@pytest.mark.parametrize(("batch_size", "save_interval"), [(1, 1), (4, 1), (3, 2), (100, 1)])
def test_features_are_the_models_own(template, batch_size, save_interval, checkpoint, corpus, tmp_path):
    assert len({len(block) for block in corpus.blocks}) > 1  # shorter blocks sit among the others
    extract(checkpoint, corpus, tmp_path, templates=template, batch_size=batch_size, save_interval=save_interval)
    features = Features(tmp_path / "tiny-llama-Hidden-Features", checkpoint, template)
    assert features.num_tokens == 200
    for layer in (0, 2):
        inputs, activations = naive_features(checkpoint.path, corpus.blocks, layer, template)
        assert inputs.std() > 0.1
        assert torch.allclose(torch.cat(list(features.inputs(layer))), inputs, atol=TOLERANCE)
        assert torch.allclose(torch.cat(list(features.gate_outputs(layer))), activations, atol=TOLERANCE)


@pytest.mark.parametrize("template", [GATE, UP])
def test_inputs_alone_give_the_same_activations(template, tmp_path, text_folder):
    checkpoint = DenseCheckpoint(str(make_llama(tmp_path / "biased", mlp_bias=True)))
    corpus = corpus_of(checkpoint, text_folder, None, block_size=16, max_tokens=100)
    extract(checkpoint, corpus, tmp_path / "full", templates=template)
    extract(checkpoint, corpus, tmp_path / "inputs", feature_format="inputs")
    full = Features(tmp_path / "full" / "biased-Hidden-Features", checkpoint, template)
    inputs = Features(tmp_path / "inputs" / "biased-Hidden-Features", checkpoint, template)
    assert not (inputs.artifact.folder / "hidden_gate_outputs").exists()
    mlp = GatedMLP.of_dense(checkpoint, 1, "cpu")
    recompute = mlp.gate_activations if "gate_proj" in template else mlp.activations
    for shard, stored in zip(inputs.inputs(1), full.gate_outputs(1), strict=True):
        assert torch.allclose(recompute(shard), stored, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_dtype(dtype, checkpoint, corpus, tmp_path):
    extract(checkpoint, corpus, tmp_path, dtype=dtype, feature_format="inputs")
    shard = torch.load(tmp_path / "tiny-llama-Hidden-Features" / "hidden_inputs" / "0_0.pth", weights_only=True)
    assert {tensor.dtype for tensor in shard.values()} == {getattr(torch, dtype)}
    assert list(shard) == [0, 1, 2]
    # Nothing but the tensors' own bytes: a view would drag its whole storage along.
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize for tensor in shard.values())


def test_values_beyond_the_stored_dtype_are_refused(text_folder, tmp_path):
    folder = make_llama(tmp_path / "loud")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(1e6)
    model.save_pretrained(folder)
    checkpoint = DenseCheckpoint(str(folder))
    corpus = corpus_of(checkpoint, text_folder, None, block_size=16, max_tokens=100)
    with pytest.raises(
        MoEficationError, match=r"hidden_inputs of layer 1 are not finite in torch.float16 in blocks 0 to"
    ):
        extract(checkpoint, corpus, tmp_path, dtype="float16")
    extract(checkpoint, corpus, tmp_path, dtype="bfloat16")  # in the same folder, where nothing was written


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1)])
def test_rank_outside_of_the_world_is_refused(rank, world_size, checkpoint, corpus, tmp_path):
    with pytest.raises(MoEficationError, match=f"RANK {rank} is outside of WORLD_SIZE {world_size}"):
        extract(checkpoint, corpus, tmp_path, rank=rank, world_size=world_size)


def test_lack_of_room_is_foreseen(checkpoint, corpus, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    # 200 tokens, 3 layers, 32 + 64 floats of 4 bytes: 0.2 MB
    with pytest.raises(MoEficationError, match=r"needs about 0.0 GB and 0.0 GB are free"):
        extract(checkpoint, corpus, tmp_path / "new")
    assert not (tmp_path / "new").exists()
