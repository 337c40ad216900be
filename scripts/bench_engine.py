"""Dense and MoE in llama.cpp: tokens per second of prefill and decode, and perplexity, by type of weights.

python scripts/bench_engine.py --model_path .cache/SmolLM2-135M-Instruct --moe_path MOE-36 MOE-24 MOE-12 \\
  --text_path .cache/llama_data/heldout/wikipedia.jsonl --work .engine
python scripts/bench_engine.py --model_path .cache/SmolLM2-135M-Instruct --shape 1B --layers 4 --num_experts 16 32 64 \\
  --work .engine

The models are those given (RECIPE=engine makes what llama.cpp holds), or random ones of a shape, for time alone, of
which an eighth of the experts is shared; their tokenizer is that of --model_path. `over` is time over the dense model's
in the same type, of files read in turn. Files stay in --work.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import timing
import torch
from random_models import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM
from run_moefication import command_line
from run_moefication.moefication import llama_cpp
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.checkpoints.engine_model import EngineModel
from run_moefication.moefication.checkpoints.moe import StoredMoE
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.text.tokens import first_tokens
from run_moefication.settings import OUTTYPES

if TYPE_CHECKING:  # what writes GGUF files wants a package that may be missing
    from run_moefication.moefication.checkpoints.gguf_file import GGUFModel
    from run_moefication.moefication.checkpoints.gguf_tokenizer import Tokenizer

SHARED = 8  # one expert of so many, of random models
COLUMNS = ("model", "type", "megabytes", "prefill", "over", "decode", "over_decode", "perplexity")


class File(NamedTuple):
    """A GGUF file: what it is of, and the type of its weights."""

    model: str
    type: str
    path: Path


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", **command_line.MODEL)
    parser.add_argument("--moe_path", nargs="+", type=Path, help="LlamaMoE checkpoints made of it")
    parser.add_argument("--shape", choices=SHAPES, help="random models of this shape instead")
    parser.add_argument("--layers", type=timing.positive, default=4, help="of random models")
    parser.add_argument("--num_experts", type=timing.positive, nargs="+", default=[16, 32, 64], help="of random models")
    parser.add_argument("--active", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of their experts")
    parser.add_argument("--types", nargs="+", choices=OUTTYPES, default=["f16", "q8_0", "q4_0"], help="of weights")
    parser.add_argument("--text_path", type=command_line.path, help="to measure perplexity on")
    parser.add_argument("--text_tokens", type=timing.positive, default=512, help="of it")
    parser.add_argument("--prompt_tokens", type=timing.positive, default=256, help="to read at once")
    parser.add_argument("--new_tokens", type=timing.positive, default=64, help="to decode after them")
    parser.add_argument("--rounds", type=timing.positive, default=3, help="rounds, of which the median counts")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for, and print a table."""
    if not llama_cpp.is_installed():
        raise MoEficationError("this wants llama.cpp: pip install -e '.[engine]' -c constraints.txt")
    if (arguments.moe_path is None) == (arguments.shape is None):
        raise MoEficationError("give one of --moe_path and --shape")
    if arguments.new_tokens < 2:
        raise MoEficationError("--new_tokens 1 is part of reading the prompt: decode at least 2")
    dense = DenseCheckpoint(arguments.model_path)
    files = write_files(arguments, dense)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, dense.config.vocab_size, (arguments.prompt_tokens,), generator=generator).tolist()
    question = {"prompts": [prompt], "new_tokens": arguments.new_tokens, "ignore_eos": True}
    threads, seconds = torch.get_num_threads(), {file: [] for file in files}
    for _, file in product(range(arguments.rounds), files):
        seconds[file].append(llama_cpp.ask(file.path, question, threads)["seconds"][0])
    blocks = []
    if arguments.text_path:
        vocabulary = dense.config.vocab_size
        blocks = [first_tokens(Path(arguments.text_path), dense.path, arguments.text_tokens, vocabulary).tolist()]
    print(f"{timing.machine(torch.device('cpu'))}; llama.cpp, {threads} threads")
    print(timing.table_line(COLUMNS))
    rows: list[dict[str, Any]] = []
    for file in files:
        prefill, decode = (statistics.median(values) for values in zip(*seconds[file], strict=True))
        row = {"model": file.model, "type": file.type, "megabytes": file.path.stat().st_size / 1e6}
        row |= {"prefill": len(prompt) / prefill, "decode": 1 / decode}
        first = next((one for one in rows if one["type"] == file.type), row)  # the dense model
        row |= {"over": first["prefill"] / row["prefill"], "over_decode": first["decode"] / row["decode"]}
        if blocks:
            (logprobs,) = llama_cpp.ask(file.path, {"blocks": blocks}, threads)["logprobs"]
            row["perplexity"] = math.exp(-statistics.mean(one for one in logprobs if one is not None))
        rows.append(row)
        print(timing.table_line(COLUMNS, row), flush=True)
    timing.write_json(arguments.json, torch.device("cpu"), rows)


def write_files(arguments: argparse.Namespace, dense: DenseCheckpoint) -> list[File]:
    """Those that are not there yet are made; the dense model's come first. What cannot be one is refused before."""
    from run_moefication.moefication.checkpoints.gguf_file import GGUFModel
    from run_moefication.moefication.checkpoints.gguf_tokenizer import Tokenizer

    tokenizer = Tokenizer(dense.path, dense.config.vocab_size)
    if arguments.moe_path:
        dense_model, moes = dense.load_causal_lm("cpu", torch.float32), arguments.moe_path
        name = dense.name
    else:
        name = f"{arguments.shape}-{arguments.layers}"
        dense_model, moes = random_models(arguments, dense, name)
    files: dict[File, Callable[[Path], object]] = {}
    for kind in arguments.types:
        file = File("dense", kind, arguments.work / f"{name}-{kind}.gguf")
        files[file] = partial(write_dense, dense_model, tokenizer, kind)
    for moe, kind in product(map(StoredMoE, moes), arguments.types):
        config = moe.config
        experts = config.num_experts + config.num_shared_experts
        label = f"{config.num_selects}/{experts}x{config.moe_intermediate_size}"
        path = arguments.work / f"{moe.path.name}-{config.num_selects}-of-{experts}-{kind}.gguf"
        files[File(label, kind, path)] = partial(write_moe, GGUFModel(EngineModel(moe), tokenizer, moe.path.name, kind))
    arguments.work.mkdir(parents=True, exist_ok=True)
    for file, write in files.items():
        make_once(file.path, write)
    return list(files)


def make_once(path: Path, make: Callable[[Path], object]) -> None:
    """A file or folder that `make` writes, under its own name when it is whole; what is there stays."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        make(unfinished)
        unfinished.replace(path)


def random_models(
    arguments: argparse.Namespace, dense: DenseCheckpoint, name: str
) -> tuple[PreTrainedModel, list[Path]]:
    """A dense model of the shape, and the folders of MoEs, saved."""
    torch.manual_seed(0)
    width = SHAPES[arguments.shape]["intermediate_size"]
    if uneven := [experts for experts in arguments.num_experts if width % experts]:
        raise MoEficationError(f"--num_experts {uneven[0]} does not divide {width} neurons")
    fields = SHAPES[arguments.shape] | dict(
        num_hidden_layers=arguments.layers, vocab_size=dense.config.vocab_size, tie_word_embeddings=True
    )
    folders = []
    for experts, active in product(arguments.num_experts, arguments.active):
        shared = experts // SHARED
        of_moe = dict(num_experts=experts - shared, num_shared_experts=shared, gate_network="linear", gate_bias=True)
        of_moe["num_experts_per_tok"] = round(active * experts) - shared
        folders.append(arguments.work / f"{name}-{experts}-{active}")
        make_once(folders[-1], LlamaMoEForCausalLM(LlamaMoEConfig(**fields, **of_moe)).save_pretrained)
    return LlamaForCausalLM(LlamaConfig(**fields)), folders


def write_moe(model: "GGUFModel", path: Path) -> None:
    """As the export writes it."""
    with path.open("wb") as file:
        model.write(file)


def write_dense(model: PreTrainedModel, tokenizer: "Tokenizer", kind: str, path: Path) -> None:
    """A dense LLaMA as llama.cpp's own converter writes it."""
    import gguf

    from run_moefication.moefication.checkpoints.gguf_file import TYPES, add_value

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.head_dim,
    }
    for key, value in values.items():
        add_value(writer, f"llama.{key}", value)
    for key, value in tokenizer.metadata().items():
        add_value(writer, f"tokenizer.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if (projection := name.split(".")[-2]) in heads:  # the engine rotates neighbours, not halves
            data = data.reshape(heads[projection], 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        of_type = TYPES[kind] if data.ndim > 1 else TYPES["f32"]
        if of_type == TYPES["q4_0"] and "embed" in name:
            of_type = TYPES["q8_0"]
        raw = gguf.quantize(np.ascontiguousarray(data), of_type)
        writer.add_tensor(names.get_name(name, (".weight",)), raw, raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
