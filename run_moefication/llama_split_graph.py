r"""Stage 1, split: cut the graph of which neurons the same tokens need into experts, by METIS.

  python llama_split_graph.py --model_path MODEL --save_path ../llama_moe_temp_files --num_experts 8 \
    --train_data_path ../llama_data --max_tokens 32768
  ... --num_experts 128 --num_shared_experts 16 --hidden_features_path ../llama_moe_temp_files/NAME-Hidden-Features

Which tokens need a neuron, and which experts are shared, is as in llama_split_clustering.py --cluster_on activations.
Wants the package pymetis: pip install -e '.[graph]'. Writes SAVE_PATH/NAME-8Expert-Split-Graph, which the later stages
take as they take a clustering.
"""

import sys
from functools import partial

from run_moefication.command_line import DEVICE, FEATURES, Run, add_corpus, path_option, stage_script
from run_moefication.settings import TEMPLATES, GraphSplitSettings


@stage_script(
    __doc__,
    GraphSplitSettings,
    partial(add_corpus, required=False),
    save_path=path_option("folder in which NAME-nExpert-Split-Graph is made"),
    device=DEVICE,
    templates={
        "default": TEMPLATES[0],
        "choices": TEMPLATES,
        "help": "what the files are called; the split is the same",
    },
    hidden_features_path=FEATURES,
)
def main(run: Run) -> None:
    """Run the stage and print how much of the graph stays inside experts."""
    from run_moefication.moefication.stages.split_on_activations import split_by_activations

    given, settings, config = run.arguments, run.settings, run.checkpoint.config
    text = run.text_or_features(given.templates)
    writer = split_by_activations(run.checkpoint, text, given.save_path, given.templates, settings, **run.options)
    if given.train_data_path:
        run.print_mix()
    run.print_experts()
    inside = [layer["weight_inside"] for layer in writer.metrics().values()]
    width = config.intermediate_size // settings.num_experts
    routed = config.intermediate_size - width * settings.num_shared_experts
    by_chance = (width - 1) / max(1, routed - 1)
    print(f"weight of the graph inside experts: {min(inside):.2%} to {max(inside):.2%} (at random {by_chance:.2%})")
    run.report(writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


if __name__ == "__main__":
    sys.exit(main())
