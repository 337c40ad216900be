r"""Stage 3, select: train the gates that choose experts.

  python llama_select_mlp.py --model_path MODEL --save_path ../llama_moe_temp_files \
    --split_file_path ../llama_moe_temp_files/NAME-8Expert-Split-Clustering \
    --hidden_features_path ../llama_moe_temp_files/NAME-Hidden-Features --num_experts 8 --num_selects 2 --use_softmax
  ... --specify_layer 0-7 (and 8-15, ... in other processes: together they fill one folder)

Writes SAVE_PATH/NAME-8Expert-Select-MLP, a gate per layer. Memory: one layer's inputs (LLaMA-7B: 8 kB a token).
"""

import sys

from run_moefication.command_line import DEVICE, SPLIT, Run, path_option, stage_script
from run_moefication.settings import GateSettings


@stage_script(
    __doc__,
    GateSettings,
    split_file_path=SPLIT,
    hidden_features_path=path_option("folder that llama_get_hidden_features.py wrote"),
    save_path=path_option("folder in which NAME-nExpert-Select-MLP is made"),
    device=DEVICE,
    specify_layer={"nargs": "*", "help": "layers to train: 0-7 (ends included), 0 1 2, or both (default: all)"},
)
def main(run: Run) -> None:
    """Run the stage and print how good the gates are."""
    from run_moefication.moefication.stages.select import parse_layers, train_gates

    given = run.arguments
    layers = parse_layers(given.specify_layer or [], run.checkpoint.config.num_hidden_layers)
    paths = given.split_file_path, given.hidden_features_path, given.save_path
    writer = train_gates(run.checkpoint, *paths, run.settings, layers=layers, **run.options)
    metrics = writer.metrics()
    print(f"{'gate':<32} {'recall':>7} {'constant':>9} {'mass recall':>12} {'constant':>9} {'epoch':>6}")
    for name, m in metrics.items():
        recall = f"{m['recall']:>7.3f} {m['constant_recall']:>9.3f}"
        mass_recall = f"{m['mass_recall']:>12.3f} {m['constant_mass_recall']:>9.3f}"
        print(f"{name:<32} {recall} {mass_recall} {m.get('best_epoch', '-'):>6}")
    if any(m["constant_recall"] < 1 for m in metrics.values()):  # else experts are all selected, or always the same
        better = sum(m["mass_recall"] > m["constant_mass_recall"] for m in metrics.values())
        choice = f"the best constant choice of {run.settings.num_selects} experts"
        print(f"{better} of {len(metrics)} gates beat {choice} by mass recall")
    run.report(writer, "llama_convert.py (4_convert.sh)")


if __name__ == "__main__":
    sys.exit(main())
