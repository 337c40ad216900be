"""Tokenising text for the features: our way against a loop over documents and one call with all, and its memory.

python scripts/bench_tokenize.py --model_path .cache/SmolLM2-135M-Instruct --text_path .cache/llama_data
python scripts/bench_tokenize.py ... --gigabytes 5       # also: peak anonymous memory on a generated file of that size

The generated file repeats the documents of --text_path, shuffled, in a temporary folder, beside 4 bytes a token.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch

from run_moefication import command_line
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.checkpoints.tokenizers import load_tokenizer
from run_moefication.moefication.text.corpus import training_corpus
from run_moefication.moefication.text.documents import DocumentReader
from run_moefication.moefication.text.text_files import find_text_files
from run_moefication.moefication.text.tokens import tokenize
from run_moefication.settings import CorpusSettings

CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", **command_line.MODEL)
    parser.add_argument("--text_path", type=command_line.path, required=True, help="folder or file of documents")
    parser.add_argument("--rounds", type=timing.positive, default=5, help="rounds, of which the median counts")
    parser.add_argument("--gigabytes", type=float, help="size of a generated file to measure memory on (default: none)")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="seed of the order of documents")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure the speed and, if asked, the memory, printing as it goes."""
    checkpoint = DenseCheckpoint(arguments.model_path)
    reader = DocumentReader(find_text_files(Path(arguments.text_path)))
    documents = list(reader)
    random.Random(arguments.seed).shuffle(documents)
    texts = [document.text for document in documents]
    tokenizer = load_tokenizer(checkpoint.path)
    ends = (len(documents) - 1) * (tokenizer.eos_token_id is not None)  # which we put between documents
    ours = partial(tokenize, documents, tokenizer, checkpoint.config.vocab_size, reader.bad)
    alternatives: dict[str, Callable[[], int]] = {
        "loop over documents": lambda: sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in texts),
        "one call": lambda: sum(map(len, tokenizer(texts, verbose=False)["input_ids"])),
        "ours": lambda: sum(map(len, ours())) - ends,
    }
    tokens = {name: count() for name, count in alternatives.items()}
    print(timing.machine(CPU))
    print(f"{len(documents):,} documents; {tokens['ours']:,} tokens")
    seconds = timing.median_seconds(alternatives, rounds=arguments.rounds, device=CPU)
    for name, value in seconds.items():
        ratio = seconds["loop over documents"] / value
        print(f"{name:<20} {value:8.2f} s {tokens[name] / value:>12,.0f} tokens/s {ratio:6.2f} times the loop")
    rows = [{"way": name, "seconds": value, "tokens": tokens[name]} for name, value in seconds.items()]
    if arguments.gigabytes:
        rows.append(memory(checkpoint, texts, arguments.gigabytes))
    timing.write_json(arguments.json, CPU, rows)


def memory(checkpoint: DenseCheckpoint, texts: list[str], gigabytes: float) -> dict[str, Any]:
    """Peak anonymous memory of this process, above what it had, while a generated file becomes blocks."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as executor:
        path = Path(folder, "text.jsonl")
        lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
        with path.open("wb") as file:
            while (size := file.tell()) < gigabytes * 1e9:
                file.writelines(lines)
        corpus = training_corpus(checkpoint, path, folder, CorpusSettings(max_tokens=100_000))
        before = peak = anonymous_bytes()
        work = executor.submit(lambda: corpus.mix[0].available)
        while not work.done():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.02)
    print(
        f"{size / 1e9:.1f} GB of jsonl, {work.result():,} tokens: anonymous memory {before / 1e6:,.0f} MB before, "
        f"{peak / 1e6:,.0f} MB at most"
    )
    return {"way": "memory", "bytes": size, "tokens": work.result(), "before": before, "peak": peak}


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
