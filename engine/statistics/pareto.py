"""Which of several ways is worth its cost."""

from collections.abc import Mapping


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of (cost, quality) points that no other beats in one without losing in the other, from cheap to dear.

    Less cost and more quality are better; of equal points all stay.
    """

    def beaten(name: str) -> bool:
        cost, quality = points[name]
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
