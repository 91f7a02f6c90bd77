"""Work divided evenly: which unit goes to which of several ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` lists with sums as alike as differencing finds (Karmarkar and Karp 1982).

    Every list is sorted; some are empty where there are more parts than costs. The same costs give the same lists.
    """
    # Each entry divides some of the costs: sums and members of its parts, the heaviest part first. The two whose parts
    # differ most are joined, the heaviest of the one with the lightest of the other.
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for index, cost in enumerate(costs):
        division = [(cost, [index]), *((0.0, list[int]()) for _ in range(parts - 1))]
        heap.append((-cost if parts > 1 else 0.0, index, division))
    if not heap:
        return [[] for _ in range(parts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, order, heavier = heapq.heappop(heap)
        _, _, lighter = heapq.heappop(heap)
        joined = [(a + b, [*one, *other]) for (a, one), (b, other) in zip(heavier, reversed(lighter), strict=True)]
        joined.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], order, joined))
    return [sorted(members) for _, members in heap[0][2]]
