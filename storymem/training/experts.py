"""The model of a training run: Wan's experts, frozen, those that train with a memory adapter inside."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from storymem.training.objective import ExpertName
from storymem.training.settings import AdapterTrainingSettings, ParallelSettings
from storymem.training.sharding import assign, shard
from storymem.wan.acceleration import set_attention
from storymem.wan.lora import (
    AdapterInfo,
    Layout,
    memory_lora_config,
    read_memory_lora,
    write_memory_lora,
)
from storymem.wan.runtime import make_current
from storymem.wan.settings import MemoryMode, ModelSettings
from storymem.wan.spec import COMPONENTS
from storymem.wan.transformer import enable_layouts
from storymem.weights import locate

logger = logging.getLogger(__name__)

ADAPTER = "memory"


def add_adapter(transformer: Any, expert: ExpertName, settings: AdapterTrainingSettings, *, seed: int) -> None:
    """Freeze a transformer and put a memory adapter into it: B = 0, A from ``seed``, or both from ``settings.start``.

    The adapter is kept in float32 whatever the base is kept in.

    Raises:
        ValueError: if the adapter to start from has another rank or scale.
    """
    transformer.requires_grad_(False)
    config = memory_lora_config(settings.rank, settings.alpha, settings.use_rslora, settings.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(transformer, torch.float32)
    if settings.start is not None:
        start = read_memory_lora({expert: transformer}, settings.start)[expert]
        check_same_adapter(start.info, settings, f"adapter.start={settings.start}")
        load_adapter(transformer, start.tensors(torch.float32))


def check_start(settings: AdapterTrainingSettings, model: ModelSettings, experts: Sequence[ExpertName]) -> None:
    """Hold the adapter to start from against the experts, by header; say what of it is not as usual.

    Raises:
        FileNotFoundError, ValueError: if it is not on this machine, does not fit, or has another rank or scale.
    """
    from storymem.wan.folders import check_component, on_meta

    if settings.start is None:
        return
    if model.weights is None:
        shape = {**model.network.transformer, "in_channels": model.spec.in_channels}
        networks = dict.fromkeys(experts, on_meta("WanTransformer3DModel", shape, "model.network.transformer"))
    else:
        networks = {expert: check_component(locate(model.weights), COMPONENTS[expert]) for expert in experts}
    for adapter in read_memory_lora(networks, settings.start).values():
        where = f"adapter.start={settings.start}"
        check_same_adapter(adapter.info, settings, where)
        if adapter.config["rank_pattern"] or adapter.config["alpha_pattern"]:
            raise ValueError(f"{where}: modules of {adapter.file.path} have several ranks or scales; training has one")
        if not adapter.as_usual:
            print(f"{where}: {adapter.report}", file=sys.stderr)


def check_same_adapter(found: AdapterInfo, settings: AdapterTrainingSettings, where: str) -> None:
    """Raise ``ValueError`` if an adapter to go on from is not one of these settings."""
    for name in ("rank", "alpha", "use_rslora"):
        has, wanted = getattr(found, name), getattr(settings, name)
        if has != wanted:
            raise ValueError(
                f"{where} has {name}={has}, and the settings say adapter.{name}={wanted}: write adapter.{name}={has}, "
                "or begin another run"
            )


def adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """``blocks.0.attn1.to_q.lora_A.weight`` ... -> the parameters of the memory adapter."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if f".{ADAPTER}." in name
    }


def load_adapter(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors into the adapter of a transformer, sharded or not."""
    parameters = adapter_parameters(transformer)
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        assign(parameter, tensors[name])


def check_only_adapters_train(transformer: nn.Module, expert: ExpertName) -> None:
    """Raise ``ValueError`` if anything but the adapter would get gradients."""
    adapter = {id(parameter) for parameter in adapter_parameters(transformer).values()}
    trainable = [
        name
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapter
    ]
    if trainable:
        raise ValueError(
            f"the base of the {expert} expert is trainable ({len(trainable)} parameters, first {trainable[0]}): "
            "only the adapter may be; call requires_grad_(False) on it"
        )


class Experts:
    """Wan's experts on the processes of a run.

    Whole experts take turns on the accelerator: the frozen weights of the others lie in the CPU's memory. Adapters
    always lie on the accelerator. Sharded experts all stay where they are.

    Args:
        transformers: one or both; those of ``trained`` carry an adapter.
        trained: which of them train.
        accelerator: the processes.
        parallel: how the networks lie on them.

    Attributes:
        transformers: as given, in place; what a pipeline takes.
        networks: what training calls: the transformers of ``trained``, wrapped for distributed training.
    """

    def __init__(
        self,
        transformers: Mapping[ExpertName, Any],
        *,
        trained: Sequence[ExpertName],
        accelerator: Accelerator,
        parallel: ParallelSettings,
    ) -> None:
        self.transformers = dict(transformers)
        self.device = accelerator.device
        self._sharded = parallel.strategy == "fsdp"
        self.networks: dict[ExpertName, nn.Module] = {}
        for name, transformer in self.transformers.items():
            check_only_adapters_train(transformer, name)
            enable_layouts(transformer)
            if parallel.gradient_checkpointing:
                transformer.enable_gradient_checkpointing()
            if self.device.type == "cpu":
                # The backward pass of the fused attention takes several times as long as that of the plain one.
                set_attention(transformer, "_native_math")
            _keep_time_embedding_exact(transformer, self.device)
            network = self._placed(transformer, name in trained, accelerator)
            if name in trained:
                self.networks[name] = network
        self._active: ExpertName | None = None
        self.activate(trained[0])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """``high_noise/blocks.0.attn1.to_q.lora_A.weight`` ... -> everything that is trained."""
        return {
            f"{expert}/{name}": parameter
            for expert in self.networks
            for name, parameter in adapter_parameters(self.transformers[expert]).items()
        }

    def activate(self, expert: ExpertName) -> None:
        """Have ``expert`` on the accelerator, and the frozen weights of the others in the CPU's memory."""
        if self._sharded or self._active == expert or len(self.transformers) == 1:
            return
        self._active = expert
        for name, transformer in self.transformers.items():
            if name != expert:
                _move_frozen(transformer, torch.device("cpu"))
        _move_frozen(self.transformers[expert], self.device)

    def _placed(self, transformer: Any, trains: bool, accelerator: Accelerator) -> nn.Module:
        if self._sharded:
            mesh = init_device_mesh(self.device.type, (accelerator.num_processes,))
            shard(transformer, transformer.blocks, mesh)
            return transformer
        transformer.to(self.device)
        if trains:
            _exchange_adapters_only(transformer)
        network = accelerator.prepare_model(transformer) if trains else transformer
        if len(self.transformers) > 1:
            _move_frozen(transformer, torch.device("cpu"))
        return network


def make_accelerator(device: torch.device | None) -> Accelerator:
    """The processes that ``torchrun`` or ``accelerate launch`` started; one if neither did.

    Args:
        device: of the one process; None chooses.

    Raises:
        ValueError: for a device by its number where several processes run.
    """
    on_cpu = (device is not None and device.type == "cpu") or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu)
    own = accelerator.device
    if device is None or (device.type == own.type and device.index in (None, own.index or 0)):
        return accelerator
    if device.type != own.type:
        logger.warning("runtime.device=%s: Accelerate does not know such devices, so training runs on %s", device, own)
        return accelerator
    if accelerator.num_processes > 1:
        raise ValueError(
            f"runtime.device={device}: each of several processes takes the device of its own number; write "
            "runtime.device=auto"
        )
    make_current(device)
    accelerator.state.device = device  # Accelerate takes the first
    return accelerator


def check_parallel(parallel: ParallelSettings, accelerator: Accelerator) -> None:
    """Raise ``ValueError`` for a strategy that cannot run on these processes."""
    if parallel.strategy == "fsdp" and accelerator.num_processes == 1:
        raise ValueError(
            "parallel.strategy=fsdp shares the experts among several processes and there is one: start it with "
            "torchrun --nproc-per-node=N scripts/train.py ..., or use parallel.strategy=ddp"
        )


def write_adapters(
    tensors: Mapping[str, Tensor], folder: Path, *, info: AdapterInfo, layout: Layout = "storymem"
) -> None:
    """Write whole tensors under the names of :attr:`Experts.parameters` as an adapter."""
    states: dict[ExpertName, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        expert, _, name = key.partition("/")
        states.setdefault(expert, {})[name] = tensor.contiguous()  # type: ignore[arg-type]
    write_memory_lora(states, folder, info=info, layout=layout)


def read_adapters(folder: Path, experts: Sequence[ExpertName]) -> dict[str, Tensor]:
    """What :func:`write_adapters` wrote in our own layout."""
    return {
        f"{expert}/{name}": tensor
        for expert in experts
        for name, tensor in load_file(folder / f"{expert}.safetensors").items()
    }


def adapter_info(
    settings: AdapterTrainingSettings,
    *,
    rope_stride: int,
    conditioning: str,
    training: Mapping[str, Any],
    memory_attention: MemoryMode = "joint",
) -> AdapterInfo:
    """What the files of a trained adapter say about it."""
    return replace(
        AdapterInfo(rank=settings.rank, alpha=settings.alpha, use_rslora=settings.use_rslora),
        memory_attention=memory_attention,
        rope_stride=rope_stride,
        conditioning=conditioning,
        training=dict(training),
    )


def _exchange_adapters_only(transformer: nn.Module) -> None:
    """Have ``DistributedDataParallel`` leave alone what is the same in all processes and never changes."""
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in transformer.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)


def _move_frozen(transformer: nn.Module, device: torch.device) -> None:
    """By new parameters: not every accelerator lets a tensor take data of another device."""
    for module in transformer.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                moved = weight.to(device, non_blocking=device.type != "cpu")
                setattr(module, name, nn.Parameter(moved, requires_grad=False))
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(device))


def _keep_time_embedding_exact(transformer: Any, device: torch.device) -> None:
    """Have autocast leave the float32 time embedding alone, which generation computes in float32 as well."""
    embedder = transformer.condition_embedder.time_embedder
    embedder.forward = torch.autocast(device.type, enabled=False)(embedder.forward)
