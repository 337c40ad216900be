r"""Stage 5, calibrate: refine gates, set thresholds and refit down_proj of a converted model, layer by layer in closed
form; then fit a few parameters of all layers together to the dense model's predictions.

  python llama_calibrate.py --model_path MODEL --moe_path NAME-MoE --save_path NAME-MoE-Calibrated \
    --train_data_path ../llama_data --max_tokens 131072 --refit_gates --fit_logits

Writes a LlamaMoE checkpoint like the one it read. Memory: a layer of each model, five matrices of its neurons squared
(LLaMA-7B: 6.5 GB together), and up to 2 GB of activations; disk, until it is done: 16 bytes a token for each of
hidden_size (LLaMA-7B: 66 kB a token), and down_proj once more.
"""

import sys

from run_moefication.command_line import DEVICE, MOE, NEW_CHECKPOINT, Run, add_corpus, stage_script
from run_moefication.settings import CalibrateSettings


@stage_script(__doc__, CalibrateSettings, add_corpus, moe_path=MOE, save_path=NEW_CHECKPOINT, device=DEVICE)
def main(run: Run) -> None:
    """Run the stage and print what each layer's fit gained."""
    from run_moefication.moefication.stages import calibrate as stage

    given = run.arguments
    writer = stage.calibrate(run.checkpoint, given.moe_path, run.corpus, given.save_path, run.settings, **run.options)
    run.print_mix()
    print(f"{'layer':>5} {'routed that run':>17} {'error before':>13} {'after':>8} {'strength':>9}")
    layers, final = stage.gains(writer)
    for layer, m in enumerate(layers):
        errors = f"{m['error_before']:>13.4f} {m['error_after']:>8.4f}"
        print(f"{layer:>5} {m['active_share']:>17.1%} {errors} {m['strength']:>9g}")
    if final:
        before, after = final["divergence_before"], final["divergence_after"]
        print(
            f"divergence from the dense model: {before:.4f} nats a token, {after:.4f} with all layers fitted together"
        )
    run.report(writer, "llama_distill.py (6_distill.sh), or llama_evaluate.py (evaluate.sh)")


if __name__ == "__main__":
    sys.exit(main())
