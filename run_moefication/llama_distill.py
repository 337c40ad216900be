r"""Stage 6, distill: train gates and experts of a LlamaMoE checkpoint to predict as the dense model does.

  python llama_distill.py --model_path MODEL --moe_path NAME-MoE-Calibrated --save_path NAME-MoE-Distilled \
    --train_data_path ../llama_data --max_tokens 131072 --block_size 512
  torchrun --nproc_per_node=8 llama_distill.py (the same options) --bf16

Writes a LlamaMoE checkpoint like the one it read. Memory of each process: the dense model, the MoE in float32, and 12
more bytes for each parameter that is trained (of LLaMA-7B 92 GB; with --train gates 41), and activations; disk, until
it is done: 12, and twice that while a step is saved. Several processes take batches of their own: with as much text
for each as for one, there are as many steps.
"""

import os
import sys

from run_moefication.command_line import DEVICE, MOE, NEW_CHECKPOINT, Run, add_corpus, add_local_rank, stage_script
from run_moefication.settings import DistillSettings


@stage_script(
    __doc__, DistillSettings, add_corpus, add_local_rank, moe_path=MOE, save_path=NEW_CHECKPOINT, device=DEVICE
)
def main(run: Run) -> None:
    """Run the stage in this process of one or several, and print what the training gained."""
    place = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
    run.warn_if_not_started_together(f"it trains with the others, and waits for them at {place}")
    from run_moefication.moefication.stages import distill as stage

    given = run.arguments
    writer = stage.distill(run.checkpoint, given.moe_path, run.corpus, given.save_path, run.settings, **run.options)
    if run.process.rank != 0:
        return
    run.print_mix()
    metrics = writer.metrics()[stage.RESULT]
    shares = metrics["active_share"]
    print(f"KL to the dense model, held out: {metrics['loss_before']:.4f} before, {metrics['loss_after']:.4f} after")
    for row in metrics.get("nested", ()):
        losses = f"{row['loss_before']:.4f} before, {row['loss_after']:.4f} after"
        print(f"with {row['num_selects']} experts per token instead: {losses}")
    limits = f"{min(shares):.1%} to {max(shares):.1%} in {len(shares)} layers"
    print(f"routed experts that run: {sum(shares) / len(shares):.1%} ({limits})")
    run.report(writer, "llama_evaluate.py (evaluate.sh)")


if __name__ == "__main__":
    sys.exit(main())
