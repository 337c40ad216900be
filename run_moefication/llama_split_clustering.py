r"""Stage 1, split: cut the neurons of every MLP into experts by balanced k-means.

  python llama_split_clustering.py --model_path MODEL --save_path ../llama_moe_temp_files --num_experts 8
  ... --num_experts 128 --cluster_on activations --num_shared_experts 16 --train_data_path ../llama_data

On weights: neurons whose weight rows point the same way. On activations: neurons that the same tokens need, as far as
a small gate can foresee it, beside shared experts of the neurons that add most. Writes
SAVE_PATH/NAME-8Expert-Split-Clustering, one file per layer with the expert of each neuron.
"""

import sys
from functools import partial

from run_moefication.command_line import DEVICE, FEATURES, SEVERAL_TEMPLATES, Run, add_corpus, path_option, stage_script
from run_moefication.moefication.errors import SettingError
from run_moefication.settings import SplitSettings


@stage_script(
    __doc__,
    SplitSettings,
    partial(add_corpus, required=False),
    save_path=path_option("folder in which NAME-nExpert-Split-Clustering is made"),
    device=DEVICE,
    templates=SEVERAL_TEMPLATES,
    hidden_features_path=FEATURES,
)
def main(run: Run) -> None:
    """Run the stage and print the balance of what came out."""
    from run_moefication.moefication.artifacts.split import parse_templates
    from run_moefication.moefication.stages.split import split_by_weights
    from run_moefication.moefication.stages.split_on_activations import split_by_activations

    given, settings, templates = run.arguments, run.settings, parse_templates(run.arguments.templates)
    if settings.cluster_on == "weights":
        for name in ("train_data_path", "hidden_features_path"):
            if getattr(given, name):
                raise SettingError(f"{name} is for cluster_on activations")
        run.refuse_unread_text_options()
        writer = split_by_weights(run.checkpoint, given.save_path, templates, settings, **run.options)
    elif len(templates) > 1:
        raise SettingError("cluster_on activations takes one of templates: the split is the same for both")
    else:
        text = run.text_or_features(templates[0])
        writer = split_by_activations(run.checkpoint, text, given.save_path, templates[0], settings, **run.options)
    if given.train_data_path:
        run.print_mix()
    run.print_experts()
    neurons = run.checkpoint.config.intermediate_size
    num_layers, width = run.checkpoint.config.num_hidden_layers, neurons // settings.num_experts
    metrics, routed = writer.metrics(), neurons - settings.num_shared_experts * width
    for template in templates:
        costs = [metrics[template.format(layer)]["cost"] / routed for layer in range(num_layers)]
        print(f"{template}: mean {settings.distance} distance to the centre {min(costs):.3f} to {max(costs):.3f}")
    run.report(writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


if __name__ == "__main__":
    sys.exit(main())
