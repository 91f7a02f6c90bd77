"""Settings of what samples completions, and of how new weights reach it."""

from typing import Literal

from pydantic import Field

from whet.config.base import Config


class PublishConfig(Config):
    """How new weights reach servers that sample."""

    by: Literal["auto", "file", "broadcast", "shared"] = "auto"
    """`file`: a folder that both can read; `broadcast`: a process group of trainer and servers; `shared`: memory of a
    GPU that both use. `auto` takes what goes with where they run."""
    delta: bool = False
    """Send only what has changed since the last time: by file as compressed differences, by broadcast the tensors that
    are others."""
    adapter_only: bool | None = None
    """Of a policy that trains an adapter, send the adapter alone, where the server can take it. Where it can when not
    given."""
    bucket_mb: int = Field(default=512, ge=1)
    """Most memory, in MiB, for weights that are on their way at a time."""
    verify: Literal["first", "always", "never"] = "first"
    """After which publish the server's logprobs of a probe are held against the trainer's."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Most seconds of one publish."""
    folder: str | None = None
    """Where `file` puts the weights: one that servers on other machines can read as well. Memory (/dev/shm) when not
    given and everything is on this machine, else `output_dir/weights`."""


class EngineConfig(Config):
    """What samples the completions."""

    use: str = "local"
    """`local` (in this process, with the trainer's own weights), `vllm` or `sglang` (servers), or
    `package.module:Class` of your own."""
    max_concurrent: int = Field(default=64, ge=1)
    """Most completions decoded at a time."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Most seconds that one completion may take before the run stops and says so."""
    prefix_cache_mb: float | None = Field(default=None, ge=0)
    """MiB of keys and values kept of completions that have ended, so that a next turn computes only what is new;
    they go when the weights change. 256 where there is an environment when not given, else 0."""

    packed_weights: bool = True
    """On a CPU: while sampling, hold a second copy of the linear layers in the order in which the matrix kernels read
    them. Sampling is up to a half faster; turn it off where memory is short."""

    cache: Literal["auto", "slots", "paged"] = "auto"
    """Where keys and values lie: `slots` of one length for all rows, which is faster on a CPU; `paged`, in pages that
    follow what is written and that the members of a group share; `auto` takes pages on a GPU where PyTorch's kernel
    serves the model from them, else slots."""

    address: str | list[str] | None = None
    """Servers that run already, as in `http://127.0.0.1:8000`; without it the run starts its own."""
    num_engines: int = Field(default=1, ge=1)
    """Servers to start."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one server is spread over."""
    python: str | None = None
    """Python of the environment in which the servers are installed, where it is not this one."""
    options: dict = Field(default_factory=dict)
    """Settings of the server under its own names, as in `--vllm-max-model-len 4096` or
    `--sglang-mem-fraction-static 0.7`. What whet sets itself is refused."""
    router: Literal["auto", "own", "sglang-router"] = "auto"
    """How requests find their way to one of several servers: whet's own choice (`auto`, `own`: the members of a group
    together, else where least is waiting), or a `sglang-router` that is started beside them."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Most seconds until a server that was started answers."""
    health_interval_s: float = Field(default=2.0, gt=0)
    """Seconds between two looks at whether a server is alive."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a server that has died is started again, with the weights as they are then."""
    sleep: bool = False
    """Let servers give up the memory of their weights and caches while the model trains."""
    publish: PublishConfig = PublishConfig()

    def kept_mb(self, *, has_env: bool) -> float:
        """MiB kept of completions that have ended."""
        if self.prefix_cache_mb is not None:
            return self.prefix_cache_mb
        return 256.0 if has_env else 0.0
