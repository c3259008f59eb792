"""A worker's view of the others: small collectives over the process group that Ray Train has set up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_ASK_EVERY_S = 0.1


def limit_waiting(timeout_s: float) -> None:
    """Have every process group give up on a missing worker after this long.

    Ray Train says so for the group that it sets up; those that DeepSpeed makes have torch's default of half an hour.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


class DisagreementError(RuntimeError):
    """Workers hold different plans, parameters or data where they must be equal: training cannot go on."""


@dataclass(frozen=True)
class Group:
    """This worker's rank, the number of workers, and the device that their messages travel from."""

    rank: int
    size: int
    device: torch.device

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """Each scalar averaged over the workers."""
        return (self.sum(torch.stack(list(values)).double()) / self.size).tolist()

    def sum(self, vector: Tensor) -> Tensor:
        vector = vector.to(self.device, copy=True)
        dist.all_reduce(vector)
        return vector

    def sum_at(self, owner: int, vector: Tensor) -> Tensor:
        """The sum over the workers on `owner`; undefined elsewhere."""
        vector = vector.to(self.device, copy=True)
        dist.reduce(vector, dst=owner)
        return vector

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        tensor = tensor.to(self.device)
        dist.broadcast(tensor, src=source)
        return tensor

    def from_first(self, value: Any) -> Any:
        """What rank 0 gives, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def together(self, action: Callable[[], T]) -> T:
        """What `action`, which makes no collective calls, returns here, once it has ended on every rank; collective.

        It may take one rank longer than the others wait in any collective: what they do meanwhile is ask again.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="together")
        future = pool.submit(action)
        pool.shutdown(wait=False)  # should another rank be lost, its loss counts and not the rest of the action
        going = True
        while going:
            wait([future], timeout=_ASK_EVERY_S)
            done = future.done()
            if done:
                future.result()  # where it has failed, the others learn of it by our end
            going = float(self.sum(torch.tensor([float(not done)]))) > 0
        return future.result()

    def gather_digests(self, digest: str) -> list[str]:
        """Every worker's SHA-256 digest, by rank, as hexadecimal."""
        own = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        return [bytes(other.cpu().tolist()).hex() for other in everyone]

    def prove_equal(self, what: str, digest: str) -> None:
        """Check that all workers hold the same `what`.

        Raises:
            DisagreementError: on every worker, with the digest of each rank.
        """
        digests = self.gather_digests(digest)
        if len(set(digests)) > 1:
            listing = ", ".join(f"rank {rank}: {value[:12]}" for rank, value in enumerate(digests))
            raise DisagreementError(f"workers disagree on {what}: {listing}")
