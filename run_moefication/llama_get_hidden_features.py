r"""Stage 2, get_hidden_features: record what the MLPs see while the dense model reads pretraining-like text.

  python llama_get_hidden_features.py --model_path MODEL --train_data_path ../llama_data \
    --train_data_cache_path ../llama_data_cache --save_path ../llama_moe_temp_files --feature_format inputs
  torchrun --nproc_per_node=8 llama_get_hidden_features.py (the same options)

Writes SAVE_PATH/NAME-Hidden-Features. Disk, LLaMA-7B in 2-byte dtypes: 0.97 MB a token in full, 0.26 MB with inputs.
"""

import sys

from run_moefication.command_line import DEVICE, Run, add_corpus, add_local_rank, path_option, stage_script
from run_moefication.settings import FeatureSettings


@stage_script(
    __doc__,
    FeatureSettings,
    add_corpus,
    add_local_rank,
    save_path=path_option("folder in which NAME-Hidden-Features is made"),
    device=DEVICE,
)
def main(run: Run) -> None:
    """Run the stage in this process of one or several, and print the mix of domains."""
    run.warn_if_not_started_together("it records its share, and the others must be started, too")
    from run_moefication.moefication.stages.features import extract_features

    rank, world_size = run.process.rank, run.process.world_size
    share = {"rank": rank, "world_size": world_size}
    writer = extract_features(run.checkpoint, run.corpus, run.arguments.save_path, run.settings, **share, **run.options)
    if rank == 0:
        run.print_mix()
    if rank == 0 or (writer.finished and not writer.was_finished):
        others = f"still missing, which the other processes of WORLD_SIZE {world_size} make"
        run.report(writer, "llama_select_mlp.py (3_select.sh)", others)


if __name__ == "__main__":
    sys.exit(main())
