"""Hashes of what two tiny runs of all stages write, to see whether a change alters any byte.

    python scripts/golden_hashes.py > /tmp/before      # on the commit before, in its own checkout
    python scripts/golden_hashes.py | diff /tmp/before -

Runs the numbered shell scripts with RECIPE=plain and RECIPE=calibrated on a random LLaMA of two layers and a few
hundred lines of made-up text. Prints one line for each file: sha256 and path. Manifests, which hold versions and
timings, model cards and code are left out. Hashes depend on the machine and on versions, so none are kept in git.
"""

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from run_moefication.command_line import new_parser
from run_moefication.moefication.storage.files import file_sha256

STAGES = Path(__file__).resolve().parents[1] / "run_moefication"
SCRIPTS = ("1_split", "2_get_hidden_features", "3_select", "4_convert", "5_calibrate", "6_distill")
WORDS = "the cat sat on a mat and looked at moon road snow fell night morning city three bridges wall of ring"
SETTINGS = {
    "NUM_GPUS": "1",
    "OMP_NUM_THREADS": "1",  # sums are in another order on another number of threads
    "NUM_EXPERTS": "16",
    "NUM_SELECTS": "8",
    "BLOCK_SIZE": "32",
    "SPLIT_TOKENS": "2048",
    "MAX_TOKENS": "2048",
    "BATCH_SIZE": "4",
}
LEFT_OUT = (".py", ".md", "manifest.json")


def make_model(folder: Path) -> None:
    """A random LLaMA of two layers with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    symbols = dict(special_tokens=[*special.values()], initial_alphabet=sorted(byte_level.alphabet()))
    tokenizer.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=300, show_progress=False, **symbols))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_text(folder: Path) -> None:
    """Two domains of random sentences."""
    generator = random.Random(0)
    folder.mkdir()
    for domain in ("c4", "github"):
        sentences = (" ".join(generator.choices(WORDS.split(), k=12)) for _ in range(300))
        lines = [f'{{"text": "{domain} {sentence}."}}\n' for sentence in sentences]
        (folder / f"{domain}.jsonl").write_text("".join(lines))


def run(recipe: str, work: Path, dense: Path, text: Path) -> None:
    """All stages of a recipe; their messages go to stderr."""
    places = {"MODEL_PATH": dense, "TRAIN_DATA_PATH": text, "TRAIN_DATA_CACHE_PATH": work / "cache"}
    places |= {"SAVE_PATH": work / "artifacts", "MOE_PATH": work / "moe"}
    environment = os.environ | SETTINGS | places | {"RECIPE": recipe, "PYTHON": sys.executable}
    for script in SCRIPTS:
        print(f"== {recipe}: {script}.sh", file=sys.stderr)
        subprocess.run(["bash", STAGES / f"{script}.sh"], env=environment, stdout=sys.stderr, check=True)


def main() -> None:
    """Make both runs and print the hashes."""
    new_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense, text = Path(folder, "dense"), Path(folder, "text")
        make_model(dense)
        make_text(text)
        for recipe in ("plain", "calibrated"):
            work = Path(folder, recipe)
            run(recipe, work, dense, text)
            for path in sorted(path for path in work.rglob("*") if path.is_file()):
                if not path.name.endswith(LEFT_OUT) and "cache" not in path.relative_to(work).parts:
                    print(f"{file_sha256(path)}  {path.relative_to(folder)}")


if __name__ == "__main__":
    main()
