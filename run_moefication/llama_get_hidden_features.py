r"""Stage 2, get_hidden_features: record what the MLPs see while the dense model reads pretraining-like text.

  python llama_get_hidden_features.py --model_path MODEL --train_data_path ../llama_data \
    --train_data_cache_path ../llama_data_cache --save_path ../llama_moe_temp_files --feature_format inputs
  torchrun --nproc_per_node=8 llama_get_hidden_features.py (the same options)

Writes SAVE_PATH/NAME-Hidden-Features. Disk, LLaMA-7B in 2-byte dtypes: 0.97 MB a token in full, 0.26 MB with inputs.
"""

import argparse
import os
import sys

from run_moefication import command_line


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    parser.add_argument(
        "--train_data_path",
        type=command_line.path,
        required=True,
        help="folder of .jsonl or .txt files, or .gz, .zst or .zip of them, whose names carry their domain (not read "
        "below it), or one such file",
    )
    parser.add_argument(
        "--train_data_cache_path",
        type=command_line.path,
        help="folder that keeps tokenised text, so that it is tokenised once; without it nothing is kept",
    )
    command_line.add_save_path(parser, "NAME-Hidden-Features")
    command_line.add_templates(parser)
    parser.add_argument(
        "--data_use_percent",
        type=float,
        default=1.0,
        help="fraction, in (0, 1], of the tokens that the domain mix allows; 0.01 is one percent",
    )
    parser.add_argument("--batch_size", type=int, default=4, help="blocks per forward pass; limits device memory")
    parser.add_argument(
        "--save_interval",
        type=int,
        default=1,
        help="batches per file; more means fewer, larger files and more host memory",
    )
    parser.add_argument(
        "--feature_format",
        default="full",
        choices=("full", "inputs"),
        help="full: MLP inputs and activations; inputs: the inputs alone, the rest is recomputed from the weights",
    )
    parser.add_argument("--block_size", type=int, help="tokens per block (default: 2048, or what the model takes)")
    parser.add_argument("--max_tokens", type=int, help="upper limit on tokens, all domains together (default: none)")
    parser.add_argument(
        "--domain_weights",
        help="domain=weight,..., a word of the file names each (default: the mix of LLaMA's pretraining)",
    )
    parser.add_argument(
        "--skip_bad_lines", action="store_true", help="count lines that hold no document, and go on without them"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"), help="of the stored features"
    )
    # The old launcher still passes this; torchrun says it by LOCAL_RANK.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    command_line.add_common(parser, seed="the choice and order of blocks")
    return parser


def get_hidden_features(arguments: argparse.Namespace) -> None:
    """Run the stage in this process of one or several, and print the mix of domains."""
    from run_moefication.moefication.errors import MoEficationError

    try:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", arguments.local_rank or 0))
    except ValueError:
        raise MoEficationError("RANK, WORLD_SIZE and LOCAL_RANK must be integers; torchrun sets them") from None
    device = command_line.pick_device(arguments, local_rank)
    from run_moefication.moefication.checkpoints import Checkpoint
    from run_moefication.moefication.corpus import parse_domain_weights, require_block_size, training_corpus
    from run_moefication.moefication.hidden_features import extract_features
    from run_moefication.moefication.progress import no_progress
    from run_moefication.moefication.splitting import require_template

    require_template(arguments.templates)
    progress = command_line.progress_bar if rank == 0 else no_progress
    domain_weights = parse_domain_weights(arguments.domain_weights)
    checkpoint = Checkpoint(arguments.model_path)
    positions = checkpoint.config.max_position_embeddings
    block_size = require_block_size(arguments.block_size, positions, checkpoint.name)
    corpus = training_corpus(
        checkpoint,
        arguments.train_data_path,
        arguments.train_data_cache_path,
        block_size=block_size,
        domain_weights=domain_weights,
        data_use_percent=arguments.data_use_percent,
        max_tokens=arguments.max_tokens,
        skip_bad_lines=arguments.skip_bad_lines,
        seed=arguments.seed,
        progress=progress,
    )
    writer = extract_features(
        checkpoint,
        corpus,
        arguments.save_path,
        template=arguments.templates,
        feature_format=arguments.feature_format,
        batch_size=arguments.batch_size,
        save_interval=arguments.save_interval,
        dtype=arguments.dtype,
        device=device,
        rank=rank,
        world_size=world_size,
        overwrite=arguments.overwrite,
        progress=progress,
    )
    if rank == 0:
        print(f"{'domain':<14} {'share':>6} {'there':>10} {'asked':>10} {'got':>10}  tokens")
        for row in corpus.mix:
            print(f"{row.domain:<14} {row.weight:>6.1%} {row.available:>10,} {row.asked:>10,} {row.got:>10,}")
        for row in corpus.mix:
            if row.skipped_lines:
                print(f"{row.domain}: {row.skipped_lines:,} bad lines skipped")
        print(f"{checkpoint.name}: {corpus.num_tokens:,} tokens in {len(corpus.blocks):,} blocks")
    if rank == 0 or (writer.finished and not writer.was_finished):
        command_line.report(writer, "llama_select_mlp.py (3_select.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), get_hidden_features, argv)


if __name__ == "__main__":
    sys.exit(main())
