"""Configuration of one engine, resolved once; combinations that cannot work fail here, naming the options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from sfumato.core.spec import ParameterValue
from sfumato.engine.limits import Limits
from sfumato.engine.peer_config import PeerConfig
from sfumato.engine.profile_config import ProfileConfig
from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from sfumato.models.folder import Overrides


# Fields that are called otherwise on the command line.
_OPTIONS = {"num_replicas": "data-parallel", "num_threads": "threads"}
QUANTIZATIONS = ("int8", "fp8")
OVERLAPS = ("auto", "on", "device", "off")
GRAPHS = ("auto", "on", "off")
ATTENTION_LIBRARIES = ("flash-attn", "flashinfer")
ATTENTION_BACKENDS = ("auto", "triton", *ATTENTION_LIBRARIES, "torch")
# A rank that has not answered for so many seconds is taken for lost.
DEFAULT_RANK_TIMEOUT = 15.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an engine process is started with.

    dtype: "auto" takes the checkpoint's, or float32 on a CPU that only imitates bfloat16. device: "auto" is
    CUDA where there is one. kv_memory: bytes of KV pages; None takes what max_running_requests whole contexts
    need, within a share of the memory. page_size: tokens per page; None: the model's block length.
    num_threads: CPU threads of the forward; None: torch decides.
    memory_share: of the memory that an engine would take without kv_memory; engines beside it take the rest.
    overlap: "on" plans a step while the one before runs, "device" also launches it before that one's outcome
    is read; "auto": off on a CPU, where that was measured to be faster, "device" on a GPU.
    graphs: "on" fills forwards over pages up to a few shapes, whose launches are recorded once as CUDA
    graphs; "auto": on a GPU.
    attention_backend: what computes attention on a GPU: our kernels ("triton", "auto"), grouped SDPA
    ("torch"), or a library, for the forwards that are not recorded.
    deterministic_rows: images only: every forward has exactly so many rows, so that a result does not depend
    on its neighbours in a single bit. num_replicas, replica: engines that serve this model on this machine,
    and which of them this one is.
    max_chunk_bytes: float32 logits that exist at one time. algorithm, parameters: the operator's defaults.
    quantization: "int8" (CPU) and "fp8" (GPU) hold the weights of all layers in eight bits; None: as the
    checkpoint says.
    tensor_parallel: ranks that run every forward together, each with a part of the model.
    data_parallel_attention: ranks with requests of their own that share the weights of the experts, or of the
    MLPs where there are none. rank: which of them this is. rendezvous: host:port where they meet, if somebody
    else starts them; None: rank 0 spawns the others. is_rendezvous_open: somebody else has opened it.
    rank_timeout: seconds that a rank may keep the others waiting.
    peering: which rows run here, and which peers run the others. profile: which steps are recorded.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    kv_memory: int | None = None
    memory_share: float = 1.0
    page_size: int | None = None
    num_threads: int | None = None
    max_chunk_bytes: int = 64 << 20
    algorithm: str | None = None
    parameters: dict[str, ParameterValue] = {}
    mask_token_id: int | None = None
    eot_token_id: int | None = None
    block_length: int | None = None
    context_length: int | None = None
    overlap: str = "auto"
    graphs: str = "auto"
    attention_backend: str = "auto"
    quantization: str | None = None
    num_replicas: int = 1
    replica: int = 0
    deterministic_rows: int | None = None
    limits: Limits = Limits()
    peering: PeerConfig = PeerConfig()
    tensor_parallel: int = 1
    data_parallel_attention: int = 1
    rank: int = 0
    rendezvous: str | None = None
    is_rendezvous_open: bool = False
    rank_timeout: float = DEFAULT_RANK_TIMEOUT
    profile: ProfileConfig | None = None

    @property
    def world_size(self) -> int:
        """Return how many ranks hold the model together."""
        return self.tensor_parallel * self.data_parallel_attention

    def overrides(self) -> Overrides:
        """Return what replaces a checkpoint's own values."""
        # Imported here, so that a process that only passes a configuration on does not load torch.
        from sfumato.models.folder import Overrides

        return Overrides(
            mask_token_id=self.mask_token_id,
            eot_token_id=self.eot_token_id,
            block_length=self.block_length,
            context_length=self.context_length,
            quantization=self.quantization,
        )

    def check(self) -> None:
        """Raise ConfigError naming the option."""
        self.limits.check()
        for name in (
            "kv_memory",
            "page_size",
            "num_threads",
            "max_chunk_bytes",
            "deterministic_rows",
            "num_replicas",
            "tensor_parallel",
            "data_parallel_attention",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"--{_OPTIONS.get(name, name).replace('_', '-')} {value} must be at least 1"
                )
        rows = self.deterministic_rows
        if rows is not None and rows > 2 and rows % 4:
            raise ConfigError(
                f"--deterministic-rows {rows} must be 1, 2 or a multiple of 4: with other numbers "
                "kernels round a row by its place among the others"
            )
        if self.overlap not in OVERLAPS:
            raise ConfigError(f"--overlap {self.overlap!r} is not one of {', '.join(OVERLAPS)}")
        if self.graphs not in GRAPHS:
            raise ConfigError(f"--graphs {self.graphs!r} is not one of {', '.join(GRAPHS)}")
        if self.attention_backend not in ATTENTION_BACKENDS:
            known = ", ".join(ATTENTION_BACKENDS)
            raise ConfigError(f"--attention-backend {self.attention_backend!r} is not one of {known}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(
                f"--quantization {self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}"
            )
        self._check_ranks()
        self.peering.check()
        if self.profile is not None:
            self.profile.check()
        if self.parameters and self.algorithm is None:
            raise ConfigError(f"--algorithm-parameters {self.parameters} need --algorithm")

    def _check_ranks(self) -> None:
        if self.rank_timeout <= 0:
            raise ConfigError(f"--rank-timeout {self.rank_timeout:g} must be above 0 seconds")
        if self.tensor_parallel > 1 and self.data_parallel_attention > 1:
            raise ConfigError(
                f"--tensor-parallel {self.tensor_parallel} and --data-parallel-attention with "
                f"{self.data_parallel_attention} ranks divide the same weights in two ways; choose one"
            )
        if self.data_parallel_attention > 1 and self.rendezvous is None:
            raise ConfigError(
                f"{self.data_parallel_attention} ranks of --data-parallel-attention need a rendezvous"
            )
        if self.overlap == "device" and (self.tensor_parallel > 1 or self.data_parallel_attention > 1):
            raise ConfigError(
                "--overlap device does not go with --tensor-parallel, --data-parallel-attention: ranks that "
                "follow are sent the tokens of each forward; --overlap on does"
            )
        if self.world_size > 1 and self.attention_backend in ATTENTION_LIBRARIES:
            raise ConfigError(
                f"--attention-backend {self.attention_backend} does not go with --tensor-parallel, "
                "--data-parallel-attention: a library may compile for longer than ranks wait for one another"
            )
        if self.tensor_parallel > 1 and not self.peering.is_alone:
            raise ConfigError(
                f"--tensor-parallel {self.tensor_parallel} does not go with --role, --peers, --disaggregate: "
                "each rank would hand over its own part of keys and values"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is not one of the {self.world_size} ranks")


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
