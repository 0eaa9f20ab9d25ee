"""The networks of a training run: Wan's experts, with a memory adapter (LoRA) inside, or trained as a whole."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from storymem.devices import resolve_device
from storymem.io import read_json_object
from storymem.training.optimization import assign
from storymem.training.run_settings import AdapterTrainingSettings, ParallelSettings
from storymem.wan.components import expert_on_meta
from storymem.wan.keyframe_query import KeyframeQuery
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config, read_memory_lora
from storymem.wan.processes import Launch
from storymem.wan.runtime import make_current, set_attention
from storymem.wan.settings import ModelSettings, RuntimeSettings
from storymem.wan.spec import COMPONENTS, Expert
from storymem.wan.transformer import enable_layouts
from storymem.weights import locate

ADAPTER = "memory"


def prepare_expert(transformer: Any, settings: AdapterTrainingSettings | None, *, seed: int) -> None:
    """Make an expert trainable: freeze it and add a memory adapter, B = 0 and A from ``seed``.

    What trains is in float32 in any case. Without adapter settings all parameters train.
    """
    transformer.requires_grad_(settings is None)
    if settings is None:
        transformer.float()
        return
    config = memory_lora_config(settings.rank, settings.alpha, settings.use_rslora, settings.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(transformer, torch.float32)


def load_start(transformer: Any, expert: Expert, start: str) -> None:
    """Give the adapter of a prepared expert, and its KeyframeQuery, the weights of the adapter in ``start``."""
    adapter, trained = read_memory_lora({expert: transformer}, start)[expert], trained_parameters(transformer)
    for name, tensor in adapter.tensors(torch.float32).items():
        assign(trained[name], tensor)
    if not hasattr(transformer, "keyframe_query"):
        return
    if adapter.file.query:
        where = f"adapter.start={start}"
        transformer.keyframe_query = KeyframeQuery.from_tensors(adapter.query(), transformer, where=where)
    else:
        print(f"adapter.start={start} holds no KeyframeQuery: one is trained from the beginning", file=sys.stderr)


def check_start(
    settings: AdapterTrainingSettings, model: ModelSettings, experts: Sequence[Expert], objective: str
) -> None:
    """Compare the adapter to start from with the experts, by its header; print what of it is unusual.

    Raises:
        FileNotFoundError, ValueError: if it is not on this machine, does not fit, or has another rank or scale.
    """
    if settings.start is None:
        return
    networks = {expert: expert_on_meta(model, expert) for expert in experts}
    where = f"adapter.start={settings.start}"
    for adapter in read_memory_lora(networks, settings.start).values():
        for name in ("rank", "alpha", "use_rslora"):
            if (has := getattr(adapter.info, name)) != (wanted := getattr(settings, name)):
                raise ValueError(
                    f"{where} has {name}={has}, and the settings have adapter.{name}={wanted}: write "
                    f"adapter.{name}={has}, or start another run"
                )
        if adapter.config["rank_pattern"] or adapter.config["alpha_pattern"]:
            raise ValueError(f"{where}: modules of {adapter.file.path} have several ranks or scales; training has one")
        wanted = {"objective": objective, "memory_attention": model.memory_attention, "rope_stride": model.rope_stride}
        for name, now in wanted.items() if adapter.file.info is not None else ():
            if (had := getattr(adapter.info, name)) != now:
                print(f"{where} was trained with {name}={had}, now {name}={now}", file=sys.stderr)
        if not adapter.as_usual:
            print(f"{where}: {adapter.report}", file=sys.stderr)


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """``blocks.0.attn1.to_q.lora_A.weight`` ... -> the parameters that train."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }


class Experts:
    """Wan's experts on the processes of a run.

    Whole experts take turns on the accelerator: the frozen weights of the others are in RAM. What trains is always on
    the accelerator. Sharded experts all stay where they are.

    Args:
        transformers: one or both; those of ``trained`` come from :func:`prepare_expert`.

    Attributes:
        transformers: as given, in place; what a pipeline takes.
        networks: what training calls: the transformers of ``trained``, wrapped for distributed training.
        parameters: ``high_noise/blocks.0.attn1.to_q.lora_A.weight`` ... -> everything that is trained.
    """

    def __init__(
        self,
        transformers: Mapping[Expert, Any],
        *,
        trained: Sequence[Expert],
        accelerator: Accelerator,
        parallel: ParallelSettings,
    ) -> None:
        self.transformers, self.device = dict(transformers), accelerator.device
        self._sharded = parallel.strategy == "fsdp"
        self.networks: dict[Expert, nn.Module] = {}
        for name, transformer in self.transformers.items():
            enable_layouts(transformer)
            if parallel.gradient_checkpointing:
                transformer.enable_gradient_checkpointing()
            if self.device.type == "cpu":
                # The backward pass of the fused attention takes several times as long as that of the plain one.
                set_attention(transformer, "_native_math")
            # Generation computes the time embedding in float32 as well.
            embedder = transformer.condition_embedder.time_embedder
            embedder.forward = torch.autocast(self.device.type, enabled=False)(embedder.forward)
            network = self._placed(transformer, name in trained, accelerator)
            if name in trained:
                self.networks[name] = network
        self.parameters = {
            f"{expert}/{name}": parameter
            for expert in self.networks
            for name, parameter in trained_parameters(self.transformers[expert]).items()
        }
        self._active: Expert | None = None
        self.activate(trained[0])

    def activate(self, expert: Expert) -> None:
        """Move ``expert`` to the accelerator, and the frozen weights of the others to RAM."""
        if self._sharded or self._active == expert or len(self.transformers) == 1:
            return
        self._active = expert
        for name, transformer in self.transformers.items():
            if name != expert:
                _move_frozen(transformer, torch.device("cpu"))
        _move_frozen(self.transformers[expert], self.device)

    def _placed(self, transformer: Any, trains: bool, accelerator: Accelerator) -> nn.Module:
        if self._sharded:
            # No mixed-precision policy: parameters are gathered in their own dtype, and autocast does the rest, so
            # that a sharded network computes what a whole one computes.
            mesh = init_device_mesh(self.device.type, (accelerator.num_processes,))
            for block in transformer.blocks:
                fully_shard(block, mesh=mesh)
            return fully_shard(transformer, mesh=mesh)
        transformer.to(self.device)
        if not trains:
            network = transformer
        else:
            # DistributedDataParallel ignores what is the same in all processes and never changes.
            frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
            frozen += [name for name, _ in transformer.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
            network = accelerator.prepare_model(transformer)
        if len(self.transformers) > 1:
            _move_frozen(transformer, torch.device("cpu"))
        return network


class _OnDevice(Accelerator):
    """One process on any device; Accelerate has one device per interpreter, that of its first accelerator."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        self._device = device
        super().__init__(**options)

    @property
    def device(self) -> torch.device:
        return self._device


def make_accelerator(device: torch.device | None) -> Accelerator:
    """The processes that ``torchrun`` or ``accelerate launch`` started; one if neither did.

    Args:
        device: None chooses; of several processes each has the device of its own number.

    Raises:
        ValueError: for a device by its number where several processes run, or if an earlier Accelerator of this process
            set mixed precision.
    """
    if is_initialized() and (precision := AcceleratorState().mixed_precision) != "no":
        raise ValueError(
            f"this process has an Accelerator with mixed_precision={precision}, which would change the training's "
            "own, model.dtype: train in a process of its own"
        )
    several = Launch.of_environment().world > 1
    if several and device is not None and device.index is not None:
        raise ValueError(
            f"runtime.device={device}: each of several processes takes the device of its own number; write "
            "runtime.device=auto"
        )
    device = device or resolve_device("auto")
    options: dict[str, Any] = {"mixed_precision": "no"}  # autocast follows model.dtype, see method.py
    options["cpu"] = device.type == "cpu" and not is_initialized()
    make_current(device)
    return Accelerator(**options) if several else _OnDevice(device, **options)


def by_expert(tensors: Mapping[str, Tensor]) -> dict[Expert, dict[str, Tensor]]:
    """Tensors under the names of :attr:`Experts.parameters`, by expert."""
    states: dict[Any, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        expert, _, name = key.partition("/")
        states.setdefault(expert, {})[name] = tensor.contiguous()
    return states


def save_model(tensors: Mapping[str, Tensor], folder: Path, model: ModelSettings) -> None:
    """Write the base model with fully trained experts, as a folder that ``model.weights.source`` loads.

    The files of what did not train are copied, so that caches of the base are caches of the new model too.
    """
    whole = model.weights is None or not (locate(model.weights) / "model_index.json").exists()
    pipe = load_pipeline(model, runtime=RuntimeSettings(device="cpu"), text_encoder=whole)
    trained = {COMPONENTS[expert]: state for expert, state in by_expert(tensors).items()}
    for name, state in trained.items():
        getattr(pipe, name).load_state_dict(state)
    if whole or model.weights is None:
        pipe.save_pretrained(folder)
        return
    source = locate(model.weights)
    for name in ("model_index.json", *read_json_object(source / "model_index.json")):
        if name in trained:
            getattr(pipe, name).save_pretrained(folder / name)
        elif (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _move_frozen(transformer: nn.Module, device: torch.device) -> None:
    """By new parameters: not every accelerator lets a tensor take data of another device."""
    for module in transformer.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                moved = weight.to(device, non_blocking=device.type != "cpu")
                setattr(module, name, nn.Parameter(moved, requires_grad=False))
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(device))
