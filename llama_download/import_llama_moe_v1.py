r"""Import a published LLaMA-MoE v1 checkpoint: its weights in the layout of a LlamaMoE, for `from_pretrained`.

  python import_llama_moe_v1.py --model_path LLaMA-MoE-v1-3_5B-2_8 --save_path LLaMA-MoE-v1-3_5B-2_8-Imported

The result computes what the original does when it is not in training. No code of the folder is run. What a LlamaMoE
cannot compute is refused. Memory: twice one shard of at most 2 GiB.
"""

import argparse
import sys

from run_moefication.command_line import NEW_CHECKPOINT, OVERWRITE, new_parser, path_option, run, took


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = new_parser(__doc__)
    parser.add_argument("--model_path", **path_option("folder of the LLaMA-MoE v1 checkpoint, or its hub id"))
    parser.add_argument("--save_path", **NEW_CHECKPOINT)
    parser.add_argument("--overwrite", **OVERWRITE)
    return run(parser, import_v1, argv)


def import_v1(arguments: argparse.Namespace) -> None:
    """Import, and print what came out."""
    from llama_download.llama_moe_v1 import import_checkpoint

    writer = import_checkpoint(arguments.model_path, arguments.save_path, overwrite=arguments.overwrite)
    print("left out: the noise on gate scores and the balance loss, which are for training")
    if writer.was_finished:
        print(f"already finished: {writer.folder} (--overwrite redoes it)")
    else:
        print(f"written: {writer.folder} ({took(arguments)})")
    print("next: llama_evaluate.py, or from_pretrained")


if __name__ == "__main__":
    sys.exit(main())
