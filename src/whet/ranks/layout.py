"""How the processes of a run are laid out: which of them see the same rows, and which hold the same weights."""

from __future__ import annotations

from dataclasses import dataclass

from whet.config.backend import BackendConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the ways in which a model and its batch are divided. Their product is the number of ranks.

    Ranks are numbered with `tensor` running fastest, then `context`, then `data`, and `pipeline` slowest. Ranks that
    differ in anything but `data` get the same share of a batch. `expert` divides the experts of a layer over ranks
    that see other tokens (of `data` and `context`), and is no factor of its own.
    """

    data: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1

    @classmethod
    def of(cls, config: BackendConfig, size: int) -> Layout:
        """The layout of `size` ranks under these settings, which have been checked to divide it."""
        assert size % config.model_parallel == 0, f"{size} ranks for copies of {config.model_parallel}"
        return cls(
            data=size // config.model_parallel,
            tensor=config.tensor_parallel,
            context=config.context_parallel,
            pipeline=config.pipeline_parallel,
            expert=config.expert_parallel,
        )

    @property
    def size(self) -> int:
        return self.data * self.tensor * self.context * self.pipeline

    def data_rank(self, rank: int) -> int:
        """Which share of a batch this rank works on."""
        return rank // (self.tensor * self.context) % self.data

    def reports(self, rank: int) -> bool:
        """Whether the results of this rank are those of its share: one rank for each, where the outputs are."""
        inner = self.tensor * self.context
        return rank % inner == 0 and rank // (inner * self.data) == self.pipeline - 1

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("data", "tensor", "context", "pipeline", "expert")}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 process"
