"""Stage 2: what the MLPs see on real text, captured in a forward pass of the dense model and stored in shards.

The unit of work is a shard: `save_interval` batches of `batch_size` blocks, numbered globally. Rank r of W processes
takes the shards whose number is r modulo W. A shard's bytes depend on its blocks alone, its name on its number and the
W of the run that began the folder: a run may go on with another number of processes.
"""

import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaModel

from ...settings import TEMPLATES, FeatureSettings
from ..artifacts.features import GATE_OUTPUTS, INPUTS, shard_file
from ..checkpoints.dense import DTYPES, DenseCheckpoint
from ..errors import MoEficationError, SettingError
from ..names import features_folder
from ..precision import bfloat16_products
from ..progress import Progress, progress
from ..storage.folder import ArtifactWriter, require_place
from ..storage.manifest import ArtifactSpec, environment
from ..storage.tensors import tensor_sha256
from ..text.batches import Batch, batches_of
from ..text.corpus import Corpus


def extract_features(
    checkpoint: DenseCheckpoint,
    corpus: Corpus,
    save_path: str | Path,
    settings: FeatureSettings,
    *,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> ArtifactWriter:
    """Run the dense model over the corpus and store, per layer, the MLP's inputs and (format "full") activations:
    SiLU(gate_proj x), or with the template of up_proj SiLU(gate_proj x) * (up_proj x).

    The model runs in float32 on CPUs and in its own dtype elsewhere. Memory: the model, and two shards. `rank` of
    `world_size`: this process among those that share the work.
    """
    if not 0 <= rank < world_size:
        raise MoEficationError(f"RANK {rank} is outside of WORLD_SIZE {world_size}")
    folder = features_folder(save_path, checkpoint.name)
    require_place(folder, "hidden_features")
    is_full, dtype = settings.feature_format == "full", DTYPES[settings.dtype]
    spec = ArtifactSpec(
        stage="hidden_features",
        options=settings.recorded() | corpus.options,
        source=checkpoint.source,
        environment=environment(device),
        inputs={"train_data_path": corpus.digest},
        facts={"processes": world_size, "tokens": corpus.num_tokens, "mix": [asdict(share) for share in corpus.mix]},
    )
    blocks_per_shard = settings.batch_size * settings.save_interval
    num_shards = math.ceil(len(corpus.blocks) / blocks_per_shard)
    how = dict(overwrite=overwrite, shared=world_size > 1, exclusive=world_size == 1)
    with ArtifactWriter(folder, spec, map(str, range(num_shards)), **how) as writer:
        missing = {
            number: corpus.blocks[number * blocks_per_shard : (number + 1) * blocks_per_shard]
            for number in map(int, writer.missing())
        }
        shards = {number: blocks for number, blocks in missing.items() if number % world_size == rank}
        if shards:
            num_tokens = sum(len(block) for blocks in missing.values() for block in blocks)
            unused = writer.partial if len(missing) == num_shards else None
            _require_space(checkpoint, num_tokens, folder, unused, is_full, dtype)
            _record(checkpoint, shards, settings, writer, device)
        writer.finish()
    return writer


def _record(
    checkpoint: DenseCheckpoint,
    shards: dict[int, list[torch.Tensor]],
    settings: FeatureSettings,
    writer: ArtifactWriter,
    device: str,
) -> None:
    """Record shards, given as blocks by number, and write each while the model reads the next."""
    on_cpu = torch.device(device).type == "cpu"
    model = checkpoint.load_model(device, torch.float32 if on_cpu else checkpoint.dtype)
    recorder = _Recorder(model, settings.templates, DTYPES[settings.dtype])
    num_batches = sum(-(-len(blocks) // settings.batch_size) for blocks in shards.values())
    with progress(range(num_batches), "record hidden features", "batch") as bar, ThreadPoolExecutor(1) as disk:
        written: Future[None] | None = None
        for number, blocks in shards.items():
            first_block = number * settings.batch_size * settings.save_interval
            features = recorder.record(blocks, batches_of(blocks, settings.batch_size), first_block, bar)
            if written is not None:
                written.result()  # at most two shards are in memory, and a full disk ends the run here
            written = disk.submit(_write_shard, writer, number, features)
        written.result()


def _require_space(
    checkpoint: DenseCheckpoint, num_tokens: int, folder: Path, unused: Path | None, is_full: bool, dtype: torch.dtype
) -> None:
    """Refuse what the disk has no room for; what lies in the folder `unused`, of an earlier run, will go."""
    config = checkpoint.config
    width = config.hidden_size + is_full * config.intermediate_size
    needed = num_tokens * config.num_hidden_layers * width * dtype.itemsize
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    freed = sum(file.stat().st_size for file in unused.rglob("*.pth")) if unused else 0
    free = shutil.disk_usage(existing).free + freed
    if needed > free:
        room = f"about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        raise SettingError(f"{folder} needs {room}; use feature_format inputs, max_tokens or data_use_percent")


class _Recorder:
    """Hooks on every MLP of a model that copy what passes into tensors allocated for a whole shard."""

    def __init__(self, model: LlamaModel, template: str | None, dtype: torch.dtype):
        """`template`: of the weight whose activations are kept beside the inputs; None: none are."""
        self._model, self._dtype = model, dtype
        self._widths = {INPUTS: model.config.hidden_size}
        if template is not None:
            self._widths[GATE_OUTPUTS] = model.config.intermediate_size
        for layer, mlp in enumerate(layer.mlp for layer in model.layers):
            mlp.register_forward_pre_hook(lambda _, args, i=layer: self._keep(INPUTS, i, args[0]))
            if template == TEMPLATES[1]:  # SiLU(gate) * up is what enters down_proj
                mlp.down_proj.register_forward_pre_hook(lambda _, args, i=layer: self._keep(GATE_OUTPUTS, i, args[0]))
            elif template is not None:
                mlp.act_fn.register_forward_hook(lambda _, __, output, i=layer: self._keep(GATE_OUTPUTS, i, output))

    @bfloat16_products()
    @torch.inference_mode()
    def record(
        self, blocks: list[torch.Tensor], batches: list[Batch], first_block: int, bar: Progress
    ) -> dict[str, list[torch.Tensor]]:
        """Kind -> by layer, `[tokens, width]` without padding; what is not finite in the stored dtype is refused.
        `bar` counts the batches of the blocks."""
        tokens = torch.cat(blocks).long().to(self._model.device)
        self._features = {
            kind: [torch.empty(len(tokens), width, dtype=self._dtype) for _ in self._model.layers]
            for kind, width in self._widths.items()
        }
        for batch in batches:
            self._batch = batch  # for the hooks
            self._model(input_ids=batch.padded(tokens[batch.rows]), use_cache=False)
            bar.update()
        for kind, layers in self._features.items():
            for layer, features in enumerate(layers):
                if not features.sum(dtype=torch.float32).isfinite():
                    raise SettingError(
                        f"{kind} of layer {layer} are not finite in {self._dtype} in blocks {first_block} to "
                        f"{first_block + len(blocks) - 1}; use dtype float32, or look at the model's weights"
                    )
        return self._features

    def _keep(self, kind: str, layer: int, activations: torch.Tensor) -> None:
        self._features[kind][layer][self._batch.rows] = self._batch.flat(activations).to(self._dtype).cpu()


def _write_shard(writer: ArtifactWriter, number: int, features: dict[str, list[torch.Tensor]]) -> None:
    writer.begin()  # the spec may be another process's, with its own number of processes
    index, rank = divmod(number, writer.spec["facts"]["processes"])
    files = {}
    for kind, layers in features.items():
        file = shard_file(kind, rank, index)
        files[file] = writer.write_tensors(file, dict(enumerate(layers))) | {
            "shard": number,
            "tokens": len(layers[0]),
            "layers": {str(layer): tensor_sha256(tensor) for layer, tensor in enumerate(layers)},
        }
    writer.write_part(str(number), files)
