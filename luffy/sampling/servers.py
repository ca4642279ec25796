"""Generation on vLLM's own servers (`vllm serve`), which may be larger than a GPU or a machine.

Completions come from the token-in, token-out route `/inference/v1/generate`: token ids with their log-probs, and the
version of the weights that each was sampled with. Weights go through vLLM's trainer-side transfer engines, from the
first rank to all workers of all servers, while the servers are paused: NCCL, or gloo on CPUs (gloo.py). Every load has
a version that no other trainer uses; a completion of another version is an error.

The server's routes for weights have no key (`VLLM_API_KEY` guards generation only): who reaches its port can replace
its weights. So it belongs on loopback, behind a tunnel or in a private network (training/CLUSTER.md).
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, SamplerError
from ..model import adapters
from .protocol import Rollout, SamplingParams, SamplingRequest
from .tensor_parallel import free_port
from .vllm_sampler import request_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource, WeightTransferUpdatePayload

CONNECT_TIMEOUT_S = 30.0


class ServerSampler:
    """Samples on servers that all ranks share. addresses: "host:port" of each; model: whose weights they will get;
    device: where those are when they are sent; sends: whether this rank, the first one, sends them; max_model_len:
    longest prompt and completion together.

    timeout_s: how long no completion may come, or a request take that is not for one. Raises SamplerError if a server
    cannot be reached, ConfigError if its window is too short.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        max_model_len: int,
        device: torch.device,
        sends: bool,
        token: str,
        rows: int = 512,
        timeout_s: float = 600.0,
    ) -> None:
        self.urls = [address if "://" in address else f"http://{address}" for address in addresses]
        self.eos_ids = list(eos_ids)
        self.sends, self.rows, self.timeout_s = sends, rows, timeout_s
        self.cuda = device.type == "cuda"
        self.source = _policy_source(model)
        self.loads, self.token = 0, token
        self.engine: Any = None
        # one connection per request: httpx may close a kept one, idle to its eyes, that it has just given to another
        # thread (encode/httpcore#1110), whose request then fails or waits for ever
        headers = {"Connection": "close"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        self.http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
        )
        for url in self.urls:
            found = self._json("GET", url, "v1/models", "data", 0, "max_model_len")
            if found < max_model_len:
                raise ConfigError(f"the server at {url} has max_model_len {found}, not {max_model_len}")
        self.start()

    def start(self) -> None:
        """Ends what another trainer may have left running, and opens the connection for the weights."""
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if not self.sends:
            return
        for url in self.urls:
            # a transfer that was begun and never finished; the server has no route to give one up, but ends one that
            # fails, as this does, which describes no weights (without a transfer it is an error, and nothing more)
            with suppress(SamplerError):
                self._json("POST", url, "update_weights", json={"update_info": {}})
        self._disconnect()
        workers = [self._json("GET", url, "get_world_size", "world_size") for url in self.urls]
        for url in self.urls:
            self._json("POST", url, "abort_requests", json={})
        where: dict[str, Any] = {"master_address": _own_address(self.urls), "master_port": free_port()}
        size = 1 + sum(workers)
        if self.cuda:
            info: Any = NCCLTrainerInitInfo(rank=0, world_size=size, **where)
        else:
            from .gloo import TrainerMeeting

            info = TrainerMeeting(rank=0, world_size=size, **where)
        self.clients = _Fleet([HTTPVLLMWeightSyncClient(url, self.timeout_s) for url in self.urls], workers)
        try:
            self.engine = WeightTransferTrainerFactory.trainer_init(info, client=self.clients, source=self.source)
        except (OSError, RuntimeError, ValueError) as error:
            raise SamplerError(f"no way for weights to the servers {', '.join(self.urls)}: {error}") from error

    def restart(self) -> None:
        """Connects once more. A server that has ended has to be started again by whoever has started it."""
        self.start()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Sends the policy's weights to all servers. Raises SamplerError."""
        self.loads += 1
        if not self.sends:
            for _ in weights:  # the first rank may need this one to gather them
                pass
            return
        self.source.weights = weights
        self.clients.version = self.version
        try:
            for url in self.urls:
                self._json("POST", url, "pause", params={"mode": "abort"})  # and an empty cache of prompts
            self.engine.send_weights()
            for url in self.urls:
                self._json("POST", url, "resume")
        except (OSError, RuntimeError, ValueError) as error:
            for _ in weights:
                pass
            raise SamplerError(f"the servers did not take the weights: {error}") from error

    def sample(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> Iterator[tuple[int, Rollout]]:
        """As Sampler.sample. The rows of a prompt go to one server, which has it in its cache. Raises SamplerError."""
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt_ids.tobytes() for r in requests))}
        answers: queue.Queue[tuple[int, Rollout | Exception]] = queue.Queue()
        if requests:
            self._check_version()

        def ask(i: int) -> None:
            request = requests[i]
            try:
                url = self.urls[places[request.prompt_ids.tobytes()] % len(self.urls)]
                answers.put((i, self._ask(url, request, params)))
            except Exception as error:
                answers.put((i, error))

        left = iter(range(len(requests)))

        def work() -> None:
            while (i := next(left, None)) is not None:
                ask(i)

        # not an executor's threads: one that waits for a server that hangs must not hold up the end of this process
        for _ in range(min(self.rows * len(self.urls), len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in requests:
                try:
                    i, answer = answers.get(timeout=self.timeout_s)
                except queue.Empty:
                    raise SamplerError(f"no completion has come for {self.timeout_s:.0f} s") from None
                if isinstance(answer, Exception):
                    raise SamplerError(f"the servers failed: {answer or type(answer).__name__}") from answer
                yield i, answer
        finally:
            left = iter(())  # those that still ask are not given more

    @property
    def version(self) -> str:
        """Of the weights that the servers must have."""
        return f"{self.token}-{self.loads}"

    def _check_version(self) -> None:
        """Raises SamplerError if a server has other weights than those sent last."""
        found = {self._json("GET", url, "weight_info", "weight_version") for url in self.urls}
        if found != {self.version}:
            raise SamplerError(f"the servers have weights {sorted(found)}, not {self.version}")

    def _ask(self, url: str, request: SamplingRequest, params: SamplingParams) -> Rollout:
        limit = params.max_new_tokens - request.used
        settings = {
            "max_tokens": limit, "temperature": params.temperature, "top_p": params.top_p, "logprobs": 0,
            "seed": request_seed(params, request), "ignore_eos": True, "stop_token_ids": self.eos_ids,
            "detokenize": False,
        }  # fmt: skip
        body = {"token_ids": request.prompt_ids.tolist(), "sampling_params": settings}
        # no time-out of its own: it may wait for others, whose completions show that the server lives
        patient = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        choice = self._json("POST", url, "inference/v1/generate", "choices", 0, json=body, timeout=patient)
        tokens, reason = choice["token_ids"], choice["finish_reason"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]] if choice["logprobs"] else []
        if reason not in ("stop", "length") or not tokens or len(tokens) > limit or len(logprobs) != len(tokens):
            raise SamplerError(f"a completion of {len(tokens)} tokens and {len(logprobs)} log-probs is {reason}")
        versions = {span["version"] for span in choice["weight_versions"] or ()}
        if versions != {self.version}:
            raise SamplerError(f"{url} answered with weights {sorted(versions)}, not {self.version}")
        ids, known = np.asarray(tokens, np.int32), np.asarray(logprobs, np.float32)
        return Rollout(ids, known, truncated=reason == "length")

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self._disconnect()
        self.http.close()

    def _disconnect(self) -> None:
        """Ends the connection for weights on both sides, as far as they are there."""
        if self.engine is None:
            return
        for url in self.urls:
            with suppress(SamplerError):
                self._json("POST", url, "shutdown_weight_transfer_engine", timeout=CONNECT_TIMEOUT_S)
        with suppress(RuntimeError):
            self.engine.shutdown()
        self.engine = None

    def _json(self, method: str, url: str, path: str, *keys: str | int, **arguments: Any) -> Any:
        """What a route answers under these keys. Raises SamplerError."""
        try:
            response = self.http.request(method, f"{url}/{path}", **arguments)
        except httpx.HTTPError as error:
            raise SamplerError(f"no answer from the server at {url}: {error or type(error).__name__}") from error
        if response.status_code == 404:
            raise SamplerError(f"the server at {url} has no route /{path}: start it with `luffy serve`")
        if not response.is_success:
            text = response.text[:500]
            raise SamplerError(f"the server at {url} answered /{path} with {response.status_code}: {text}")
        try:
            found = response.json()
            for key in keys:
                found = found[key]
        except (ValueError, LookupError, TypeError) as error:
            raise SamplerError(f"the server at {url} answered /{path} with {response.text[:200]!r}") from error
        return found


class _Fleet:
    """vLLM's VLLMWeightSyncClient for several servers, whose workers are one group with the trainer: to each its ranks
    in it, and to all the version of the weights. workers: how many of each server."""

    def __init__(self, clients: Sequence[VLLMWeightSyncClient], workers: Sequence[int]) -> None:
        self.clients, self.workers, self.version = clients, workers, ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = iter(itertools.accumulate(self.workers, initial=init_info["rank_offset"]))
        infos = [{**init_info, "rank_offset": next(first)} for _ in self.clients]
        self._all(lambda client, info: client.init_weight_transfer_engine(info), infos)

    def start_weight_update(self) -> None:
        self._all(lambda client, _: client.start_weight_update())

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self._all(lambda client, _: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda client, _: client.finish_weight_update(weight_version or self.version))

    def _all(self, call: Callable[[VLLMWeightSyncClient, Any], None], arguments: Sequence[Any] = ()) -> None:
        """Calls all at the same time: they wait for each other in their group."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(call, self.clients, arguments or [None] * len(self.clients)))


def _policy_source(model: PreTrainedModel) -> WeightSource:
    """vLLM's WeightSource of a policy: the names and shapes of the model's weights, and what `weights` is set to for
    each load."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        weights: Iterator[tuple[str, Tensor]] = iter(())

        def __init__(self) -> None:
            self.meta = [
                # (of a weight that is sharded DeepSpeed knows the whole shape)
                ParamMeta(name, parts[0].dtype, tuple(getattr(parts[0], "ds_shape", parts[0].shape)))
                for name, parts, _ in adapters.whole(model)
            ]

        def metadata(self) -> list[ParamMeta]:
            return self.meta

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return self.weights

    return PolicySource()


def _own_address(urls: Sequence[str]) -> str:
    """The address of this machine that the servers see: that of the way to one on another machine, if there is one.
    Raises SamplerError."""
    found = set()
    for url in urls:
        parts = urlsplit(url)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((parts.hostname or "", parts.port or 80))
                found.add(str(probe.getsockname()[0]))
        except OSError as error:
            raise SamplerError(f"no way to the server at {url}: {error}") from error
    return min(found, key=lambda address: address.startswith("127."))


# --- the launcher ----------------------------------------------------------------------------------------------------


def serve_command(
    model: str, *, max_model_len: int, host: str, port: int, precision: str, gpu_memory: float, cache_mb: int,
    max_rows: int, tensor_parallel_size: int, data_parallel_size: int, more: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """The command that starts vLLM's server for trainers: tokens in and out, log-probs of the distribution that is
    sampled from, and a way for weights."""
    on_cpu = not torch.cuda.is_available()
    # (the command `vllm` looks for a package of that name, which its CPU build is not)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--tokens-only"]
    flags: dict[str, Any] = {
        "host": host, "port": port, "dtype": precision, "max-model-len": max_model_len, "max-num-seqs": max_rows,
        "logprobs-mode": "processed_logprobs", "generation-config": "vllm",
        "gpu-memory-utilization": gpu_memory, "tensor-parallel-size": tensor_parallel_size,
        "data-parallel-size": data_parallel_size,
        "weight-transfer-config": json.dumps({"backend": "gloo" if on_cpu else "nccl"}),
    }  # fmt: skip
    if on_cpu:
        command.append("--enforce-eager")
        flags["worker-extension-cls"] = "luffy.sampling.gloo.Extension"
    if cache_mb or on_cpu:
        flags["kv-cache-memory-bytes"] = (cache_mb or 512) << 20
    return [*command, *(text for name, value in flags.items() for text in (f"--{name}", str(value))), *more]
