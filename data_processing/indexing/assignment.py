"""The cheapest assignment of rows to clusters of bounded sizes: an exact min-cost flow, compiled.

1. Rows are not nodes. The graph has one node per cluster and a sink. The arc from cluster j to cluster k costs what the
   cheapest row of j would lose by moving to k; arcs to and from the sink let sizes move between their bounds.
2. Every row starts in its cheapest cluster at given prices, which are the first node potentials.
3. Successive shortest paths (Ahuja, Magnanti and Orlin, Network Flows, 1993, chapter 9) move rows from clusters that
   hold too many to clusters that hold too few. Each path keeps all reduced costs at zero or above.

The last assignment is therefore optimal for any first prices. Good ones leave few paths, each of O(clusters^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from gream_verl.core.errors import InputError

FAR = np.inf
APART_ROUNDS = 200


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba, and keep the machine code where its folder or the user's cache can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:
        return numba.njit(function)


class _Flow(NamedTuple):
    """State of the flow; nodes are the clusters ``0..K-1`` and the sink ``K``."""

    labels: np.ndarray  # [rows] cluster of each row
    members: np.ndarray  # [K, capacity] rows of each cluster, in the first ``sizes[k]`` slots
    sizes: np.ndarray  # [K] rows per cluster
    sent: np.ndarray  # [K] flow from each cluster to the sink, within the bounds
    excess: np.ndarray  # [K + 1] inflow less outflow of each node; all zero at the end
    prices: np.ndarray  # [K + 1] node potentials
    move_costs: np.ndarray  # [K, K] cost of moving the cheapest row from one cluster to another
    movers: np.ndarray  # [K, K] that row, -1 where the cluster is empty


def assign_balanced(
    costs: np.ndarray, lower: int, upper: int, prices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Assign every row to one cluster so that the summed cost is least and every size is within bounds.

    Args:
        costs: Finite float32 [rows, clusters].
        lower: Smallest size of a cluster.
        upper: Largest size of a cluster.
        prices: [clusters] first guess of the prices; it changes the time taken, not the cost reached.

    Returns:
        int32 [rows], the cluster of each row, and float32 [clusters], prices to start a similar problem from.
    """
    rows, clusters = costs.shape
    if not 0 <= lower <= upper or not clusters * lower <= rows <= clusters * upper:
        raise ValueError(f"{rows} rows cannot fill {clusters} clusters with sizes from {lower} to {upper}")
    start = np.zeros(clusters) if prices is None else np.asarray(prices, dtype=np.float64)
    costs = np.ascontiguousarray(costs, dtype=np.float32)
    flow = _start(costs, start, lower, upper)
    _settle(flow, costs, lower, upper)
    potentials = flow.prices[:clusters]
    return flow.labels, (potentials - potentials.mean()).astype(np.float32)


def assign_apart(costs: np.ndarray, groups: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """Assign rows as ``assign_balanced`` does, no two rows of one group, int [rows] from 0, to the same cluster.

    1. Solve the assignment.
    2. Where rows of a group meet in a cluster, close it to all but the cheapest of them, for good.
    3. Repeat until none meet. The cost is near the least, not proved to be it.

    Raises:
        InputError: When a group has more rows than there are clusters, or nearly as many and closing led nowhere.
    """
    rows, clusters = costs.shape
    largest = int(np.bincount(groups).max())
    left, prices = costs.copy(), None
    closed = np.float32(1e6 * max(float(costs.max() - costs.min()), 1.0))
    for _ in range(APART_ROUNDS if largest <= clusters else 0):
        labels, prices = assign_balanced(left, lower, upper, prices)
        # Sort by group and cluster, then by cost: every row after one with the same pair is a meeting.
        pairs = groups.astype(np.int64) * clusters + labels
        order = np.lexsort((left[np.arange(rows), labels], pairs))
        meets = order[1:][pairs[order[1:]] == pairs[order[:-1]]]
        if not len(meets):
            return labels
        if (left[meets, labels[meets]] == closed).all():
            break
        left[meets, labels[meets]] = closed
    raise InputError(f"{largest} items cannot be kept apart by {clusters} codes of a level; raise --levels or --codes")


@compiled
def _settle(flow, costs, lower, upper):  # type: ignore[no-untyped-def]
    """Run the flow until no cluster holds too many rows or too few; ``flow`` is changed in place."""
    nodes = len(flow.excess)
    distances = np.empty(nodes)
    parents = np.empty(nodes, np.int64)
    for cluster in range(nodes - 1):
        _find_movers(flow, costs, cluster)
    while flow.excess.max() > 0:
        end = _shortest_path(flow, lower, upper, distances, parents)
        _push(flow, costs, end, parents)


def _start(costs: np.ndarray, prices: np.ndarray, lower: int, upper: int) -> _Flow:
    """Give every row its favourite cluster, and set the flow of the sink to what the prices say."""
    rows, clusters = costs.shape
    labels = _favourites(costs, prices)
    sizes = np.bincount(labels, minlength=clusters)
    members = np.full((clusters, max(int(sizes.max()), upper) + 2), -1, np.int32)
    members[np.arange(members.shape[1]) < sizes[:, None]] = np.argsort(labels, kind="stable")
    # The sink's price parts the clusters: dearer ones are full, cheaper ones as small as allowed.
    small = int(clusters - (rows - clusters * lower) / max(upper - lower, 1))
    sink_price = np.sort(prices)[min(max(small, 0), clusters - 1)]
    sent = np.where(prices > sink_price, upper, np.where(prices < sink_price, lower, np.clip(sizes, lower, upper)))
    return _Flow(
        labels=labels,
        members=members,
        sizes=sizes.astype(np.int64),
        sent=sent.astype(np.int64),
        excess=np.append(sizes - sent, sent.sum() - rows).astype(np.int64),
        prices=np.append(prices, sink_price),
        move_costs=np.empty((clusters, clusters)),
        movers=np.empty((clusters, clusters), np.int32),
    )


@compiled
def _favourites(costs, prices):  # type: ignore[no-untyped-def]
    """Return each row's cheapest cluster, prices included; of equally cheap ones, the smallest so far."""
    rows, clusters = costs.shape
    labels = np.empty(rows, np.int32)
    sizes = np.zeros(clusters, np.int64)
    for row in range(rows):
        best = 0
        best_cost = costs[row, 0] + prices[0]
        for k in range(1, clusters):
            cost = costs[row, k] + prices[k]
            if cost < best_cost or (cost == best_cost and sizes[k] < sizes[best]):
                best, best_cost = k, cost
        labels[row] = best
        sizes[best] += 1
    return labels


@compiled
def _find_movers(flow, costs, cluster):  # type: ignore[no-untyped-def]
    """For every other cluster, find the row of ``cluster`` that loses least by moving there."""
    move_costs, movers = flow.move_costs[cluster], flow.movers[cluster]
    move_costs[:] = FAR
    movers[:] = -1
    for slot in range(flow.sizes[cluster]):
        row = flow.members[cluster, slot]
        row_costs = costs[row]
        here = np.float64(row_costs[cluster])
        for k in range(len(movers)):
            loss = row_costs[k] - here
            better = loss < move_costs[k]  # without a branch, the loop runs on vector units
            move_costs[k] = loss if better else move_costs[k]
            movers[k] = row if better else movers[k]


@compiled
def _shortest_path(flow, lower, upper, distances, parents):  # type: ignore[no-untyped-def]
    """Find the cheapest path from a node with too much to one with too little (Dijkstra), and update the prices.

    Returns the path's last node; ``parents`` leads back to its first, whose parent is -1.
    """
    nodes = len(distances)
    sink = nodes - 1
    done = np.zeros(nodes, np.bool_)
    for node in range(nodes):
        distances[node] = 0.0 if flow.excess[node] > 0 else FAR
        parents[node] = -1
    while True:
        # The nearest node that is not done; the search ends at the first that has room.
        here = -1
        for node in range(nodes):
            if not done[node] and distances[node] < (FAR if here < 0 else distances[here]):
                here = node
        done[here] = True
        if flow.excess[here] < 0:
            break
        for node in range(nodes):
            if done[node]:
                continue
            if here == sink:
                length = 0.0 if flow.sent[node] > lower else FAR
            elif node == sink:
                length = 0.0 if flow.sent[here] < upper else FAR
            else:
                length = flow.move_costs[here, node]
            # The reduced cost is zero or above but for rounding.
            length = distances[here] + max(length + flow.prices[node] - flow.prices[here], 0.0)
            if length < distances[node]:
                distances[node] = length
                parents[node] = here
    for node in range(nodes):
        flow.prices[node] -= min(distances[node], distances[here])
    return here


@compiled
def _push(flow, costs, end, parents):  # type: ignore[no-untyped-def]
    """Move one unit along the path that ends in ``end``: a row between clusters, a unit of flow at the sink."""
    sink = len(parents) - 1
    flow.excess[end] += 1
    node, lost = end, -1  # the row that node has just passed on
    while node >= 0:
        source = parents[node]
        gained = -1
        if source < 0:
            flow.excess[node] -= 1
        elif node == sink:
            flow.sent[source] += 1
        elif source == sink:
            flow.sent[node] -= 1
        else:
            gained = flow.movers[source, node]
            # The last member of the source takes the slot of the row that moves.
            slot = 0
            while flow.members[source, slot] != gained:
                slot += 1
            flow.sizes[source] -= 1
            flow.members[source, slot] = flow.members[source, flow.sizes[source]]
            flow.members[node, flow.sizes[node]] = gained
            flow.sizes[node] += 1
            flow.labels[gained] = node
        if node != sink:
            _update_movers(flow, costs, node, lost, gained)
        node, lost = source, gained


@compiled
def _update_movers(flow, costs, cluster, lost, gained):  # type: ignore[no-untyped-def]
    """Bring the cheapest rows of ``cluster`` up to date after it lost and gained a row (-1: none)."""
    move_costs, movers = flow.move_costs[cluster], flow.movers[cluster]
    for k in range(len(movers)):
        if movers[k] == lost:  # look for another among all members, the gained row included
            move_costs[k], movers[k] = FAR, -1
            for slot in range(flow.sizes[cluster]):
                row = flow.members[cluster, slot]
                loss = costs[row, k] - np.float64(costs[row, cluster])
                if loss < move_costs[k]:
                    move_costs[k], movers[k] = loss, row
        elif gained >= 0:
            loss = costs[gained, k] - np.float64(costs[gained, cluster])
            if loss < move_costs[k]:
                move_costs[k], movers[k] = loss, gained
